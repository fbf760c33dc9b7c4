"""What a loss in some layers costs the whole model: KL of its predictions where they need what was read long before.

A row is calibration text with a passage of it repeated at the end: to predict the repetition a model must find the
passage in its cache, so errors that would cost retrieval show, whatever the text is about. The passage lies before the
window. (KVzip, arXiv 2505.23416, scores tokens by such a repetition.)
"""

import copy
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from kvshrink.attach.families import LayerInfo, text_config
from kvshrink.cache.lossy import through
from kvshrink.errors import DataError
from kvshrink.methods._roles import Codec, Method, Probe
from kvshrink.shapes import Int

ROWS, LENGTH = 4, 2048  # tokens of a row, or what the model and the text allow
REPEATED = 4  # a quarter of a row is the repetition
SEED = 0


@final
class Recall(Probe):
    """`ROWS` rows through the model, prefilled once.

    chunk: tokens of the repetition that the model reads at a time, while pages leave the window as they do in use: only
           so is a window worth what it is. None: all in one forward, which says what a loss far behind costs.
    """

    def __init__(
        self,
        model: Any,
        infos: Sequence[LayerInfo],
        rows: Int[Tensor, "rows length"],
        method: Method,
        progress: bool,
        chunk: int | None = None,
    ) -> None:
        self.model, self.infos, self.method, self.chunk = model, infos, method, chunk
        context = getattr(text_config(model), "max_position_embeddings", None) or LENGTH
        made = recall_rows(rows, min(LENGTH, context), method)
        self.asked = made.shape[1] // REPEATED
        device = next(model.parameters()).device
        self.caches, self.tails, self.wanted = [], [], []
        with torch.no_grad():
            for row in made.to(device)[:, None]:
                cache, tail = DynamicCache(config=model.config), row[:, -self.asked :]
                model(input_ids=row[:, : -self.asked], past_key_values=cache, logits_to_keep=1)
                self.caches.append(cache)
                self.tails.append(tail)
                self.wanted.append(self._predict(cache, {}, tail))
        self.known: dict[Hashable, float] = {}
        self.bar = tqdm(desc="probe", unit="loss", disable=not progress)

    @torch.no_grad()
    def kl(self, codecs: Mapping[int, tuple[Codec | None, Codec | None]]) -> float:
        total = 0.0
        for cache, tail, wanted in zip(self.caches, self.tails, self.wanted, strict=True):
            found = self._predict(cache, codecs, tail)
            total += float((wanted.exp() * (wanted - found)).sum(-1).mean())
        self.bar.update()
        return max(0.0, total / len(self.caches))

    def once(self, key: Hashable, measure: Callable[[], float]) -> float:
        key = (self.method.window, self.method.sinks, key)
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

    def seen_by(self, method: Method) -> "Recall":
        """The same prefills, read with another method's window and sinks, which are no larger than this one's."""
        assert method.window <= self.method.window
        assert method.sinks <= self.method.sinks
        view = copy.copy(self)
        view.method = method
        return view

    def _predict(self, exact: DynamicCache, codecs: Mapping, tail: Tensor) -> Tensor:
        """Log-probabilities [s, v] after each token of the tail, the cache read through the codecs."""
        cache = DynamicCache(config=self.model.config)
        for i, layer in enumerate(exact.layers):
            keys, values = self._lossy(i, layer.keys, layer.values, *codecs.get(i, (None, None)))  # type: ignore
            cache.update(keys, values, i)
        found, done = [], cache.get_seq_length()
        for part in tail.split(self.chunk or tail.shape[1], 1):
            self._slide(cache, codecs, done)
            done = cache.get_seq_length()
            found.append(self.model(input_ids=part, past_key_values=cache).logits[0].float().log_softmax(-1))
        return torch.cat(found)

    def _slide(self, cache: DynamicCache, codecs: Mapping, before: int) -> None:
        """Read the pages through the codecs that left the window since the cache had `before` tokens."""
        first, end = self._body(before)[1], self._body(cache.get_seq_length())[1]
        if end == first:
            return
        for i, pair in codecs.items():
            layer: Any = cache.layers[i]
            for rows, codec, rope in zip((layer.keys, layer.values), pair, (self.infos[i].rope, None), strict=True):
                if codec is not None:
                    rows[:, :, first:end] = through(codec, rows[:, :, first:end], rope, self.method.page, first)

    def _lossy(
        self, index: int, keys: Tensor, values: Tensor, key_codec: Codec | None, value_codec: Codec | None
    ) -> tuple[Tensor, Tensor]:
        m, out = self.method, []
        first, end = self._body(keys.shape[2])
        for rows, codec, rope in ((keys, key_codec, self.infos[index].rope), (values, value_codec, None)):
            if codec is not None and end > first:
                body = through(codec, rows[:, :, first:end], rope, m.page, first)
                rows = torch.cat([rows[:, :, :first], body, rows[:, :, end:]], 2)
            out.append(rows)
        return out[0], out[1]

    def _body(self, tokens: int) -> tuple[int, int]:
        """The positions, from first to end, that are neither sinks nor window when the cache has `tokens` tokens."""
        m = self.method
        return m.sinks, m.sinks + max(0, tokens - m.sinks - m.window) // m.page * m.page


def recall_rows(rows: Int[Tensor, "rows length"], length: int, method: Method) -> Int[Tensor, "made tokens"]:
    """Up to ROWS rows of `length` tokens, or shorter ones if the text is: text, then a passage of it again.

    Raises DataError if the text is too short for a page to leave the window before the repetition.
    """
    first, stream = rows[:, :1].flatten()[:1], rows.flatten()
    length = min(length, len(stream))
    asked = length // REPEATED
    context = length - asked - 1
    room = context - asked - method.window - method.page
    if room <= method.sinks:
        least = REPEATED * (method.window + method.page + method.sinks + 2)
        raise DataError(f"{len(stream)} calibration tokens are too few to probe the model. Give {least} or more.")
    draw, made = random.Random(SEED), []
    for i in range(ROWS):
        # evenly over the text, so that a mixed text is probed in all its parts
        at = round(i * (len(stream) - context) / max(1, ROWS - 1))
        passage = at + draw.randrange(method.sinks, room + 1)
        made.append(torch.cat([first, stream[at : at + context], stream[passage : passage + asked]]))
    return torch.stack(made)
