"""What a loss in some layers costs the whole model: KL of its predictions where they need what was read long before.

A row is calibration text with a passage of it repeated at the end: to predict the repetition a model must find the
passage in its cache, so errors that would cost retrieval show, whatever the text is about. The passage lies before the
window. (KVzip, arXiv 2505.23416, scores tokens by such a repetition.)
"""

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from kvshrink.attach.families import LayerInfo
from kvshrink.errors import DataError
from kvshrink.fit import falls
from kvshrink.fit.falls import Falls
from kvshrink.fit.fisher import squared_gradients
from kvshrink.fit.of_tokens import OfTokens
from kvshrink.fit.reader import Reader
from kvshrink.fit.recall import REPEATED, recall_rows, row_length
from kvshrink.methods._roles import Codec, Method
from kvshrink.methods._stats import Parts, Probe
from kvshrink.methods._token_probe import TokenProbe
from kvshrink.shapes import Float, Int

APART = math.log(2) / 2  # of budgets whose answers a rough probe does not share
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

    @cached_property
    def tokens(self) -> TokenProbe:
        reader = self.reader
        return OfTokens(reader.model, reader.infos, self.rows, not self.bar.disable)

    def fisher(self) -> dict[int, tuple[float, float]]:
        """Of the loss of the repetition, read from the whole text before it."""
        if self.information is None:
            infos = {i: info for i, info in enumerate(self.reader.infos) if info.compressed}
            self.information = squared_gradients(self.reader.model, infos, self.made, self.tail)
        return self.information
