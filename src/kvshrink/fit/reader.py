"""A model that prefills exactly and then reads what it prefilled through codecs, without a cache of ours."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache

from kvshrink.attach.families import LayerInfo, shape_of
from kvshrink.attach.fill import held_by
from kvshrink.cache.lossy import round_trip
from kvshrink.cache.passed import has_states, learning, restore_states, states_of
from kvshrink.cache.rope import Rope
from kvshrink.methods._roles import Codec, Method
from kvshrink.shapes import Float, Int


@final
class Reader:
    """A model that prefills exactly and then reads some of what it prefilled through codecs.

    chunk: tokens that are read at a time, while pages leave the window as they do in use: only so does a window count
           as it does there. None: all in one forward, which says what a loss far behind costs.
    """

    def __init__(self, model: Any, infos: Sequence[LayerInfo], method: Method, chunk: int | None = None) -> None:
        self.model, self.infos, self.method, self.chunk = model, infos, method, chunk
        self.forms = {i: method.window_form(shape_of(x)) for i, x in enumerate(infos) if x.compressed}

    def prefill(self, ids: Int[Tensor, "b s"]) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def predict(
        self,
        exact: DynamicCache,
        codecs: Mapping,
        tail: Int[Tensor, "b s"],
    ) -> Float[Tensor, "b s v"]:
        """Log-probabilities after each token of the tails, the cache read through the codecs."""
        return torch.cat(list(self.predictions(exact, codecs, tail)), 1)

    def predictions(self, exact: DynamicCache, codecs: Mapping, tail: Int[Tensor, "b s"]) -> Iterator[Tensor]:
        """The same, a chunk [b, s, v] at a time."""
        cache = self.lossy(exact, codecs)
        before = cache.get_seq_length()
        for part in tail.split(self.chunk or tail.shape[1], 1):
            self._slide(cache, codecs, before)
            before = cache.get_seq_length()
            logits = self.model(input_ids=part, past_key_values=cache).logits
            yield logits.float().log_softmax(-1)

    def lossy(self, exact: DynamicCache, codecs: Mapping) -> DynamicCache:
        """A cache of what the codecs give for what this one holds."""
        cache: Any = DynamicCache(config=self.model.config)
        for i, layer in enumerate(exact.layers):
            if not self.infos[i].compressed:
                cache.layers[i] = copy.deepcopy(layer)
            if has_states(layer):
                learning(cache.layers[i])
                restore_states(cache.layers[i], {k: t.clone() for k, t in states_of(layer).items()})
            if self.infos[i].compressed:
                keys, values = self._lossy(i, *held_by(layer), *codecs.get(i, (None, None)))
                cache.update(keys, values, i)
        found: DynamicCache = cache
        return found

    def _lossy(
        self, index: int, keys: Tensor, values: Tensor, key_codec: Codec | None, value_codec: Codec | None
    ) -> tuple[Tensor, Tensor]:
        out = []
        end = self._left(keys.shape[2])
        for rows, codec, rope in ((keys, key_codec, self.infos[index].rope), (values, value_codec, None)):
            if codec is not None:
                left = [self._read(codec, rows[:, :, :end], rope, 0, rows.shape[2])] if end else []
                rows = torch.cat([*left, self._held(index, rows[:, :, end:])], 2)
            out.append(rows)
        return out[0], out[1]

    def _slide(self, cache: DynamicCache, codecs: Mapping, before: int) -> None:
        """Read the pages through the codecs that left the window since the cache had `before` tokens."""
        first, end = self._left(before), self._left(cache.get_seq_length())
        for i, pair in codecs.items():
            layer: Any = cache.layers[i]
            for rows, codec, rope in zip((layer.keys, layer.values), pair, (self.infos[i].rope, None), strict=True):
                if codec is not None and rows.shape[2] > before:
                    rows[:, :, before:] = self._held(i, rows[:, :, before:])
                if codec is not None and end > first:
                    reach = before if end <= before else rows.shape[2]
                    rows[:, :, first:end] = self._read(codec, rows[:, :, first:end], rope, first, reach)

    def _held(self, index: int, rows: Tensor) -> Tensor:
        """Rows as a window gives them back."""
        form = self.forms[index]
        return form.rows(form.stored(rows)).to(rows.dtype)

    def _left(self, tokens: int) -> int:
        """How many tokens have left the window of a cache of `tokens` tokens."""
        return max(0, tokens - self.method.window) // self.method.page * self.method.page

    def _read(self, codec: Codec, rows: Tensor, rope: Rope | None, first: int, reach: int) -> Tensor:
        """Rows of the positions from `first` on as they come back from their pages, sinks as they are. reach: of the
        step that turned them."""
        exact = max(0, self.method.sinks - first)
        back = round_trip(codec, rows, rope, self.method.page, first, reach)
        return torch.cat([rows[:, :, :exact], back[:, :, exact:]], 2)
