"""The cache object a user holds: a transformers `Cache` whose layers are ours, with bytes, report, save and load."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvshrink.cache.joining import check_alike, joined_layers, layers_of_row
from kvshrink.cache.latents import Maker
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.owner import Owner
from kvshrink.cache.passed import (
    check_crop,
    clear_states,
    has_states,
    is_sliding,
    kind_name,
    passed_tensors,
    select_rows,
    tokens_seen,
)
from kvshrink.cache.report import Report, Row
from kvshrink.cache.rope import Rope
from kvshrink.cache.rows import crop_count, repeats_of, row_indices
from kvshrink.cache.saving import SavedCache
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.cache.step import Staged
from kvshrink.errors import CacheError
from kvshrink.methods import name_of
from kvshrink.methods._evidence import Judged
from kvshrink.methods._roles import Method
from kvshrink.store.bytes import Held, nbytes
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.tokens import TokenTable

LATENT = "none (latents of all heads, read a block at a time)"


class KVCache(SavedCache):
    """One sequence batch's cache. Make it with `kvshrink.make_cache(model, method)`, give it as `past_key_values`."""

    def __init__(
        self,
        layers: list[Any],
        method: Method,
        table: TokenTable,
        model: str,
        fitted: str,
        device: str | torch.device = "cpu",
        owner: Owner | None = None,
    ) -> None:
        super().__init__(layers=list(layers))
        self.device = torch.device(device)
        self.method, self.table = method, table
        self.model = model  # the attachment that may use it
        self.owner = owner  # None: nothing is known of the model
        self.fitted = fitted  # digest of the method's settings and tensors
        self.turned_by: Tensor | None = None  # of a step, positions that are not what attention modules are given
        self.visual: Tensor | None = None  # of a step, bool [b, s]: which new tokens came from images, where one asks
        self.judged: dict[int, Judged] | None = None  # of a step, by layer, when the model read its tokens again
        self.stepping = False  # whether the attached decoder is within a step
        self.whole = True  # False while, and after, a change of all layers that did not come to its end

    @outside_inference_mode
    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        """A fork: sequences are copied, settings and fitted tensors are shared."""
        fork = self.__class__.__new__(self.__class__)
        memo[id(self)] = fork
        for name, value in vars(self).items():
            setattr(fork, name, copy.deepcopy(value, memo))
        return fork

    # --- rows that come and go ---

    @classmethod
    @outside_inference_mode
    def join(cls, caches: Sequence["KVCache"]) -> "KVCache":
        """One cache of all rows, of whatever lengths; nothing stored is copied, and the caches go on as they are.

        Rows end together: a shorter one begins in a later column, as if it were padded on the left, which
        `attention_mask` says. Raises CacheError for caches that are empty or of another model or method.
        """
        caches = list(caches)
        kinds = [(c.model, c.fitted, c.device, len(c.layers), c._dtype()) for c in caches]
        check_alike(kinds, [c.get_seq_length() for c in caches])
        for cache in caches:
            cache.check_whole()
        some, table = caches[0], TokenTable.joined([cache.table for cache in caches])
        return some._with(joined_layers([cache.layers for cache in caches], table), table)

    @outside_inference_mode
    def split(self) -> list["KVCache"]:
        """A cache for each row, in its own length; nothing stored is copied, and this cache goes on as it is."""
        self.check_whole()
        tables = [self.table.row(i) for i in range(self.table.rows)]
        return [self._with(layers_of_row(self.layers, i, table), table) for i, table in enumerate(tables)]

    def _with(self, layers: list[Any], table: TokenTable) -> "KVCache":
        owner = copy.copy(self.owner)
        return self.__class__(layers, self.method, table, self.model, self.fitted, self.device, owner)

    @property
    def attention_mask(self) -> Tensor:
        """What to pass for the tokens so far, int64 [b, columns]: 0 at pads, and before a joined row's first token."""
        if not self.table.length:
            return torch.zeros(0, 0, dtype=torch.int64, device=self.device)
        return (self.table.positions >= 0).long()

    # --- the model's side ---

    def stage(
        self,
        layer_idx: int,
        positions: Tensor,
        real: Tensor | None,
        rope: Rope | None,
        own_attention: bool,
        model: str,
        probe_queries: ProbeQueries | None = None,
        maker: Maker | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        """Called by the attention hook before each layer: what `update` needs and transformers does not pass.

        positions int [b or 1, s]; real bool [b, s], False at pads, None if there are none; probe_queries: for a
        layer whose `probes` named some of the s tokens; maker: of latents, what makes keys of them; hidden: the layer's
        input, where its tokens are ranked by it.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            return
        if model != self.model:
            raise CacheError("this cache was made for another model. Make one with make_cache(model, ...).")
        judged = None if self.judged is None else self.judged.get(layer_idx)
        visual = self.visual
        layer.staged = Staged(
            positions, real, rope, own_attention, probe_queries, hidden, judged, visual=visual, maker=maker
        )

    # --- batch and length, over layers and the token table together ---

    def crop(self, tokens_to_remove: Any) -> None:
        """Take back the last tokens: a negative count. A positive one is the length to keep (older transformers).

        Raises CacheError, before anything is changed, if a layer cannot go back so far.
        """
        seen = self.get_seq_length()
        count = crop_count(tokens_to_remove, seen)
        if count == seen:  # nothing stays, so an interrupted step does not matter, nor that a window has moved on
            self.reset()
            return
        self.check_whole()
        for layer in self.layers:
            layer.check_crop(count) if isinstance(layer, CompressedLayer) else check_crop(layer, count)
        with self._changing():
            layers: list[Any] = list(self.layers)
            for layer in layers:
                if count or getattr(layer, "record_past", False):  # which keeps more than the window until a crop
                    layer.crop(-count)
            self.table.crop(seen - count)

    def reset(self) -> None:
        """Forget everything; the object can be used again."""
        with self._changing():
            for layer in self.layers:
                if has_states(layer):
                    clear_states(layer)  # before transformers writes zeros into them
            super().reset()  # type: ignore[no-untyped-call] # transformers' own
            self.table.reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes what row beam_idx[i] was. Raises CacheError for rows that are not there."""
        self._select(beam_idx, "reorder_cache")

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows, in this order. Raises CacheError for rows that are not there."""
        self._select(indices, "batch_select_indices")

    def _select(self, given: Any, what: str) -> None:
        self.check_whole()
        if self.rows:
            index = row_indices(given, self.rows, what)
            with self._changing():
                self._take(index)

    def batch_repeat_interleave(self, repeats: Any) -> None:
        """Each row `repeats` times, one beside the other. Raises CacheError for less than once."""
        self.check_whole()
        count = repeats_of(repeats)
        if self.rows:
            with self._changing():
                self._take(torch.arange(self.rows).repeat_interleave(count))

    def _take(self, index: Tensor) -> None:
        layers: list[Any] = list(self.layers)
        for layer in layers:
            layer.select(index) if isinstance(layer, CompressedLayer) else select_rows(layer, index)
        self.table.select(index)

    @property
    def is_initialized(self) -> bool:
        """Whether every layer holds tokens, as DynamicCache says; transformers' own asks only layers of fixed size."""
        layers: list[Any] = list(self.layers)
        return all(x.is_initialized for x in layers if isinstance(x, CompressedLayer) or is_sliding(x))

    # --- bytes ---

    def report(self) -> Report:
        """Bytes per layer and purpose, measured, and the share of a full cache that they are."""
        rows = []
        b = self.rows
        name = name_of(self.method)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                drift = layer.watch.drift() if layer.watch else None
                full = b * layer.seen * layer.shape.token_bytes + layer.fixed
                numbers = layer.body.slots * layer.shape.numbers // layer.body.lanes
                held = layer.held()
                tiers = layer.body.view(None if layer.base is None else layer.base.pages)
                fused = next((str(tier.kernel) for tier in tiers), None) if layer.shape.one_width else LATENT
                body = nbytes(layer.body.tensors())
                rows.append(Row(i, name, layer.seen, held, full, drift, body, numbers, fused))
            else:
                size = nbytes(passed_tensors(layer).values())
                rows.append(Row(i, kind_name(layer), tokens_seen(layer) or 0, Held(window=size), size))
        return Report(rows, nbytes(self.table.tensors()))

    @property
    def nbytes(self) -> int:
        """Bytes alive for this cache: payload, scales, window, sinks, positions."""
        return self.report().nbytes
