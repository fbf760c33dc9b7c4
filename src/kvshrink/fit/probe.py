"""What a loss in some layers costs the whole model: KL of its predictions where they need what was read long before.

A row is calibration text with a passage of it repeated at the end: to predict the repetition a model must find the
passage in its cache, so errors that would cost retrieval show, whatever the text is about. The passage lies before the
window. (KVzip, arXiv 2505.23416, scores tokens by such a repetition.)
"""

import copy
import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from kvshrink.attach.families import LayerInfo, text_config
from kvshrink.attach.fill import held_by
from kvshrink.cache.lossy import round_trip
from kvshrink.cache.rope import Rope
from kvshrink.errors import DataError
from kvshrink.fit.fisher import squared_gradients
from kvshrink.fit.replay import Outputs, recorded, replayed, stands_alone
from kvshrink.methods._roles import Codec, Method
from kvshrink.methods._stats import Probe
from kvshrink.shapes import Float, Int

ROWS, LENGTH = 4, 2048  # tokens of a row, or what the model and the text allow
REPEATED = 4  # a quarter of a row is the repetition
# layers, from which on there is so much to measure that rows are half as long, a twelfth is the repetition, and all go
DEEP = 16  # through the model together
SEED = 0


@final
class Reader:
    """A model that prefills exactly and then reads some of what it prefilled through codecs.

    chunk: tokens that are read at a time, while pages leave the window as they do in use: only so does a window count
           as it does there. None: all in one forward, which says what a loss far behind costs.
    """

    def __init__(self, model: Any, infos: Sequence[LayerInfo], method: Method, chunk: int | None = None) -> None:
        self.model, self.infos, self.method, self.chunk = model, infos, method, chunk

    def prefill(self, ids: Int[Tensor, "b s"]) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def predict(
        self,
        exact: DynamicCache,
        codecs: Mapping,
        tail: Int[Tensor, "b s"],
        known: Outputs | None = None,
    ) -> Float[Tensor, "n v"]:
        """Log-probabilities after each token of the tails, the cache read through the codecs.

        known: what the layers gave for the tail where all are exact; those below the first codec are then not run.
        """
        cache: Any = DynamicCache(config=self.model.config)
        for i, layer in enumerate(exact.layers):
            keys, values = self._lossy(i, *held_by(layer), *codecs.get(i, (None, None)))
            cache.update(keys, values, i)
            if hasattr(layer, "cumulative_length"):  # a sliding layer holds its last tokens alone
                cache.layers[i].cumulative_length = layer.cumulative_length
        found, before = [], cache.get_seq_length()
        with replayed(self.layers[: min(codecs, default=0)] if known else [], known or []):
            for part in tail.split(self.chunk or tail.shape[1], 1):
                self._slide(cache, codecs, before)
                before = cache.get_seq_length()
                logits = self.model(input_ids=part, past_key_values=cache).logits
                found.append(logits.float().log_softmax(-1))
        return torch.cat(found, 1).flatten(0, 1)

    @property
    def layers(self) -> list[nn.Module]:
        """All decoder layers, the first one first."""
        return list(self.model.get_decoder().layers)

    def _lossy(
        self, index: int, keys: Tensor, values: Tensor, key_codec: Codec | None, value_codec: Codec | None
    ) -> tuple[Tensor, Tensor]:
        out = []
        end = self._left(keys.shape[2])
        for rows, codec, rope in ((keys, key_codec, self.infos[index].rope), (values, value_codec, None)):
            if codec is not None and end:
                rows = torch.cat([self._read(codec, rows[:, :, :end], rope, 0), rows[:, :, end:]], 2)
            out.append(rows)
        return out[0], out[1]

    def _slide(self, cache: DynamicCache, codecs: Mapping, before: int) -> None:
        """Read the pages through the codecs that left the window since the cache had `before` tokens."""
        first, end = self._left(before), self._left(cache.get_seq_length())
        if end == first:
            return
        for i, pair in codecs.items():
            layer: Any = cache.layers[i]
            for rows, codec, rope in zip((layer.keys, layer.values), pair, (self.infos[i].rope, None), strict=True):
                if codec is not None:
                    rows[:, :, first:end] = self._read(codec, rows[:, :, first:end], rope, first)

    def _left(self, tokens: int) -> int:
        """How many tokens have left the window of a cache of `tokens` tokens."""
        return max(0, tokens - self.method.window) // self.method.page * self.method.page

    def _read(self, codec: Codec, rows: Tensor, rope: Rope | None, first: int) -> Tensor:
        """Rows of the positions from `first` on as they come back from their pages, sinks as they are."""
        exact = max(0, self.method.sinks - first)
        back = round_trip(codec, rows, rope, self.method.page, first)
        return torch.cat([rows[:, :, :exact], back[:, :, exact:]], 2)


@final
class Recall(Probe):
    """`ROWS` rows through the model, prefilled once. chunk: as a Reader's; the rows then go through it one by one.

    Holds their caches, what each layer gives for the repetitions, and, in float32, what the exact model predicts:
    ROWS x a quarter of LENGTH x the vocabulary.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        infos: Sequence[LayerInfo],
        rows: Int[Tensor, "rows length"],
        method: Method,
        progress: bool,
        chunk: int | None = None,
    ) -> None:
        self.reader = Reader(model, infos, method, chunk)
        deep = sum(info.compressed for info in infos) >= DEEP
        short, repeated = (2, 3 * REPEATED) if deep else (1, REPEATED)
        made = recall_rows(rows, row_length(model, rows) // short, method, repeated=repeated)
        self.made, self.tail = made.to(next(model.parameters()).device), made.shape[1] // repeated
        self.information: dict[int, tuple[float, float]] | None = None
        self.caches, self.tails, self.wanted = [], [], []
        self.outputs: list[Outputs | None] = []
        replays = chunk is None and stands_alone(model)
        for part in self.made.split(ROWS if deep and chunk is None else 1):
            self.caches.append(self.reader.prefill(part[:, : -self.tail]))
            self.tails.append(part[:, -self.tail :])
            with recorded(self.reader.layers if replays else []) as outputs:
                self.wanted.append(self.reader.predict(self.caches[-1], {}, self.tails[-1]))
            self.outputs.append(outputs or None)
        self.known: dict[Hashable, float] = {}
        self.bar = tqdm(desc="probe", unit="loss", disable=not progress)

    def seen_by(self, method: Method) -> "Recall":
        """The same prefills, read with another method's window and sinks, which are no larger than this one's."""
        assert method.window <= self.reader.method.window
        assert method.sinks <= self.reader.method.sinks
        view = copy.copy(self)
        view.reader = Reader(self.reader.model, self.reader.infos, method, self.reader.chunk)
        return view

    @torch.no_grad()
    def kl(self, codecs: Mapping[int, tuple[Codec | None, Codec | None]]) -> float:
        total = 0.0
        for cache, tail, wanted, outputs in zip(self.caches, self.tails, self.wanted, self.outputs, strict=True):
            found = self.reader.predict(cache, codecs, tail, outputs)
            total += float((wanted.exp() * (wanted - found)).sum(-1).mean())
        self.bar.update()
        if not math.isfinite(total):
            raise DataError("the model's predictions are NaN or infinite on the calibration text. Check the weights.")
        return max(0.0, total / len(self.caches))

    def once(self, key: Hashable, measure: Callable[[], float]) -> float:
        key = (self.reader.method.window, self.reader.method.sinks, key)
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

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
