"""What a loss in some layers costs the whole model: KL of its predictions where they need what was read long before.

A row is calibration text with a passage of it repeated at the end: to predict the repetition a model must find the
passage in its cache, so errors that would cost retrieval show, whatever the text is about. The passage lies before the
window. (KVzip, arXiv 2505.23416, scores tokens by such a repetition.)
"""

import copy
import math
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from kvshrink.attach.families import LayerInfo, text_config
from kvshrink.errors import DataError
from kvshrink.fit import falls
from kvshrink.fit.falls import Falls
from kvshrink.fit.fisher import squared_gradients
from kvshrink.fit.reader import Reader
from kvshrink.methods._roles import Codec, Method
from kvshrink.methods._stats import Parts, Probe
from kvshrink.shapes import Float, Int

ROWS, LENGTH = 4, 2048  # tokens of a row, or what the model and the text allow
REPEATED = 4  # a quarter of a row is the repetition
APART = math.log(2) / 2  # of budgets whose answers a rough probe does not share
SEED = 0
T = TypeVar("T")


@final
class Recall(Probe):
    """`ROWS` rows, which go through the model together, once. chunk: as a Reader's.

    Holds their cache and, in float32, what the exact model predicts: ROWS x a quarter of LENGTH x the vocabulary. Read
    through codecs the cache is there a second time.
    rough: whether answers are shared by budgets that are near each other, as a search needs them.
    """

    def __init__(
        self,
        model: Any,
        infos: Sequence[LayerInfo],
        rows: Int[Tensor, "rows length"],
        method: Method,
        progress: bool,
        chunk: int | None = None,
        rough: bool = False,
    ) -> None:
        self.reader, self.rows, self.rough = Reader(model, infos, method, chunk), rows, rough
        self.device = next(model.parameters()).device
        made = recall_rows(rows, row_length(model, rows), method)
        self.made, self.tail = made.to(self.device), made.shape[1] // REPEATED
        self.information: dict[int, tuple[float, float]] | None = None
        self.known: dict[Hashable, Any] = {}
        self.bar = tqdm(desc="probe", unit="loss", disable=not progress)

    @cached_property
    @torch.no_grad()
    def exact(self) -> DynamicCache:
        return self.reader.prefill(self.made[:, : -self.tail])

    @cached_property
    @torch.no_grad()
    def wanted(self) -> Float[Tensor, "b s v"]:
        """What the exact model predicts."""
        return self.reader.predict(self.exact, {}, self.made[:, -self.tail :])

    @cached_property
    def falls(self) -> Falls:
        reader = self.reader
        length = min(falls.LENGTH, row_length(reader.model, self.rows))
        made = recall_rows(self.rows, length, reader.method, falls.ROWS, plain=True, repeated=falls.TAIL)
        return Falls(reader, made.to(self.device), made.shape[1] // falls.TAIL)

    def seen_by(self, method: Method) -> "Recall":
        """The same prefills, read with another method's window and sinks, which are no larger than this one's."""
        assert method.window <= self.reader.method.window
        assert method.sinks <= self.reader.method.sinks
        _ = self.wanted  # which all views have in common
        view = copy.copy(self)
        view.reader = Reader(self.reader.model, self.reader.infos, method, self.reader.chunk)
        return view

    @torch.no_grad()
    def kl(self, codecs: Mapping[int, tuple[Codec | None, Codec | None]]) -> float:
        return self.lost(self.reader.predictions(self.exact, codecs, self.made[:, -self.tail :]))

    def lost(self, chunks: Iterable[Float[Tensor, "b s v"]]) -> float:
        """KL of predictions, in nats, the mean over all tokens. Raises DataError where they are no numbers.

        chunks: of the tails, in order; each takes a few times its own memory.
        """
        total, at = 0.0, 0
        for found in chunks:
            wanted = self.wanted[:, at : at + found.shape[1]]
            total += float((wanted.exp() * (wanted - found)).sum((1, 2)).double().sum())
            at += found.shape[1]
        if not math.isfinite(total):
            raise DataError("the model's predictions are NaN or infinite on the calibration text. Check the weights.")
        return max(0.0, total / self.wanted[..., 0].numel())

    def parts(self, codecs: Mapping[int, tuple[Codec | None, Codec | None]], turn: int) -> Parts:
        self.bar.update()
        return self.falls.parts(codecs, turn)

    def once(self, key: Hashable, measure: Callable[[], T]) -> T:
        key = (self.reader.method.window, self.reader.method.sinks, key)
        if key not in self.known:
            self.known[key] = measure()
        found: T = self.known[key]
        return found

    def near(self, budget: float) -> float:
        return math.exp(round(math.log(budget) / APART) * APART) if self.rough else budget

    def fisher(self) -> dict[int, tuple[float, float]]:
        """Of the loss of the repetition, read from the whole text before it."""
        if self.information is None:
            infos = {i: info for i, info in enumerate(self.reader.infos) if info.compressed}
            self.information = squared_gradients(self.reader.model, infos, self.made, self.tail)
        return self.information


def row_length(model: Any, rows: Int[Tensor, "rows length"]) -> int:
    """Tokens of a row: LENGTH, or what the model and the text allow."""
    context = getattr(text_config(model), "max_position_embeddings", None) or LENGTH
    return min(LENGTH, context, rows.numel())


def recall_rows(
    rows: Int[Tensor, "rows length"],
    length: int,
    method: Method,
    count: int = ROWS,
    plain: bool = False,
    repeated: int = REPEATED,
) -> Int[Tensor, "made tokens"]:
    """`count` rows of `length` tokens: text, then a passage of it again; with `plain` every other row just goes on.

    repeated: the passage is one part of so many of a row.

    Raises DataError if the text is too short for a page to leave the window before the repetition.
    """
    first, stream = rows[:, :1].flatten()[:1], rows.flatten()
    length = min(length, len(stream))
    tail = length // repeated
    context = length - tail - 1
    room = context - tail - method.window - method.page
    if room <= method.sinks:
        least = 2 * (method.window + method.page + method.sinks + 2)
        raise DataError(f"{len(stream)} calibration tokens are too few to probe the model. Give {least} or more.")
    draw, made = random.Random(SEED), []
    for i in range(count):
        # evenly over the text, so that a mixed text is probed in all its parts
        at = round(i * (len(stream) - context) / max(1, count - 1))
        passage = at + draw.randrange(method.sinks, room + 1)
        if plain and i % 2:
            at = min(at, len(stream) - context - tail)
            passage = at + context
        made.append(torch.cat([first, stream[at : at + context], stream[passage : passage + tail]]))
    return torch.stack(made)
