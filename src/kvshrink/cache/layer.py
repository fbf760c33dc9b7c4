"""One layer's cache: sinks, body and window, and the one loop that moves tokens from the window into the body.

All per-sequence state of the library is in this class (and in the token table that a cache's layers share).
"""

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvshrink.cache.attend import rebuild, stored_keys
from kvshrink.cache.body import Body
from kvshrink.cache.drift import DriftWatch
from kvshrink.cache.exact import Sinks, Window
from kvshrink.cache.leaving import left, spans
from kvshrink.cache.rope import Rope
from kvshrink.cache.scoring import received
from kvshrink.cache.snapshot import ExactSinks, Snapshot
from kvshrink.cache.step import Staged, appending
from kvshrink.cache.writing import Leave
from kvshrink.errors import CacheError
from kvshrink.methods._roles import Codec, Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.shapes import Float
from kvshrink.store.bytes import Held, nbytes
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.lanes import Pages
from kvshrink.store.names import under
from kvshrink.store.tokens import TokenTable


class CompressedLayer(CacheLayerMixin):
    """[sinks | body | window]: what leaves the window enters the first of the `tiers`."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        method: Method,
        shape: LayerShape,
        tiers: Sequence[Tier],
        table: TokenTable,
        watch: DriftWatch | None = None,
        base: "CompressedLayer | None" = None,
    ) -> None:
        super().__init__()
        self.method, self.shape, self.tiers, self.table = method, shape, tiers, table
        self.watch, self.base = watch, base  # base: the layer that this one follows
        self.staged: Staged | None = None
        self._clear()

    @property
    def codecs(self) -> tuple[Codec, Codec] | None:
        """Of what leaves the window; None: it is dropped."""
        return self.tiers[0].codecs

    @property
    def pages(self) -> Pages:
        """Of the youngest tier."""
        return self.body.youngest

    def _clear(self) -> None:
        self.seen = 0
        self.whole = True  # False while, and after, an update that did not come to its end
        self.window = Window(self.method.window + self.method.page)
        self.sinks = Sinks(self.method.sinks)
        self.body = Body(
            self.tiers, self.method.page, self.method.lanes(self.shape), self.method.token_budget is not None
        )
        if self.watch is not None:
            self.watch.clear()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @appending
    def update(
        self, key_states: Float[Tensor, "b h s d"], value_states: Float[Tensor, "b h s d"], *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append s tokens; return the exact ones, with a snapshot of the rest; or all, while nothing is encoded."""
        staged, self.staged = self.staged, None
        if staged is None:
            raise CacheError("this cache is used with a model that is not attached. Call kvshrink.attach(model) first.")
        if key_states.dtype != self.shape.dtype:  # the model's may have changed since
            made, given = self.shape.dtype, key_states.dtype
            raise CacheError(f"the cache was made for {made}, the model gives {given}. Make a new cache.")
        self.check_next(staged.own_attention)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self._count(staged, key_states.shape[0], new)
        self.whole = False
        before, self.seen = self.body.view(self._base_pages), self.seen + new
        leaves = self._leaves
        keys, values = self.window.extend(key_states, value_states, leaves)
        snapshot = self._snapshot(before, keys, staged.rope)
        ranked = self._rank(staged, keys, snapshot, new)
        if leaves:
            self._leave(keys, values, staged, ranked)
        self.whole = True
        if snapshot.first == 0 and not before and snapshot.sinks is None:
            return (key_states, value_states) if keys.shape[2] == new else (keys, values)
        if not staged.own_attention:  # all tokens at full width: slower, equally right
            return rebuild(snapshot, keys, values)
        keys = keys.view_as(keys)
        keys._kvshrink = snapshot  # type: ignore[attr-defined]
        return keys, values

    # --- what a step reads ---

    def snapshot(self, rope: Rope | None) -> Snapshot:
        """What attention would read now, beside `window.view()`."""
        return self._snapshot(self.body.view(self._base_pages), self.window.view()[0], rope)

    def _snapshot(self, before: tuple, keys: Tensor, rope: Rope | None) -> Snapshot:
        sinks, exact, table = self.sinks, None, self.table
        shifts = None if table.shifts is None else torch.from_numpy(table.shifts.astype(np.int32)).to(keys.device)
        if sinks.keys is not None and sinks.values is not None and sinks.columns is not None and sinks.size:
            own = sinks.columns
            columns = own if shifts is None else torch.where(own < 0, own, own + shifts[:, None])
            exact = ExactSinks(sinks.keys, sinks.values, columns, sinks.size, sinks.simple and shifts is None)
        starts = self.window.starts
        return Snapshot(
            shape=self.shape,
            rope=rope,
            tiers=before,
            sinks=exact,
            positions=table.positions_on(keys.device)[:, : self.seen],
            padded=table.padded,
            first=self.seen - keys.shape[2],
            seen=self.seen,
            starts=None if starts is None else torch.from_numpy(starts).to(keys.device),
            shifts=shifts,
            hidden=sinks.hidden,
        )

    def __deepcopy__(self, memo: dict) -> "CompressedLayer":
        """A fork: what is stored is shared, and nothing is copied before one of the two writes."""
        fork = self.__class__.__new__(self.__class__)
        memo[id(self)] = fork
        vars(fork).update(vars(self))
        fork.table, fork.base = copy.deepcopy(self.table, memo), copy.deepcopy(self.base, memo)
        fork.window, fork.sinks, fork.body = self.window.fork(), self.sinks.fork(), self.body.fork()
        fork.watch, fork.staged = copy.deepcopy(self.watch, memo), None
        return fork

    @property
    def _base_pages(self) -> Pages | None:
        return None if self.base is None else self.base.pages

    @property
    def shrunken(self) -> bool:
        """Whether some tokens are in the window no more."""
        return self.seen > self.window.count or self.window.starts is not None

    def check_next(self, own_attention: bool) -> None:
        """Raise CacheError if the next step cannot be given what it must read."""
        if not own_attention and self.shrunken and self.body.drops:
            raise CacheError(
                f"{type(self.method).__name__} drops tokens, which other attention cannot express. "
                "Use model.set_attn_implementation('kvshrink')."
            )

    def _count(self, staged: Staged, b: int, s: int) -> None:
        """Enter the new columns into the token table, which the step's first compressed layer does for all."""
        if self.table.length == self.seen:
            self.table.append(staged.positions.expand(b, s), staged.real)
        elif self.seen + s != self.table.length:
            raise CacheError(
                f"this layer holds {self.seen} tokens and the cache {self.table.length}: a step was interrupted. "
                "Call reset()."
            )

    # --- what leaves the window ---

    @property
    def _leaves(self) -> bool:
        """Whether, of so many columns, some have left the window."""
        return self.seen >= self.method.window + self.method.page

    def probes(self, count: int) -> Tensor | None:
        """Which of `count` new tokens must give their queries to `stage`; None: none is asked in this step."""
        scorer = self.method.scorer
        if scorer is None:
            return None
        known = self.table.length == self.seen  # else the table has the new columns already
        lengths = (self.table.lengths + (count if known else 0)) if self.table.rows else np.full(1, count)
        starts = 0 if self.window.starts is None else self.window.starts
        exact = np.minimum(lengths, self.window.count - starts + count)
        leaves = left(lengths, self.method.window, self.method.page) > lengths - exact
        return scorer.queries(count) if scorer.running or bool(np.any(leaves)) else None

    def _leave(self, keys: Tensor, values: Tensor, staged: Staged, ranked: Tensor | None) -> None:
        """Move what leaves of these exact tokens to sinks and body; the window keeps the rest."""
        window, page = self.method.window, self.method.page
        lengths, slots = self.table.lengths, keys.shape[2]
        exact = np.minimum(lengths, slots - (0 if self.window.starts is None else self.window.starts))
        positions = self.table.positions_on(keys.device)[:, self.seen - slots : self.seen]
        first, parts = self.seen - slots, (self.body, self.sinks, self.watch, self._base_pages)
        leave = Leave(self.method, self.codecs, self.table, *parts, staged.rope, first)
        for span in spans(lengths, exact, slots, window, page):
            leave.capture(span, keys, values)
            if self.codecs is not None:
                leave.store(span, keys, values, positions, ranked)
        stay = np.minimum(exact, lengths - left(lengths, window, page))
        if slots <= self.window.capacity and (stay == exact).all():
            return
        gone = slots - int(stay.max())
        starts = slots - stay
        self.window.starts = starts if (starts != gone).any() else None
        self.window.keep(keys, values, gone)

    def _rank(self, staged: Staged, keys: Tensor, before: Snapshot, new: int) -> Tensor | None:
        """Importance of the exact tokens, where something asks for it; a running scorer's goes on from step to step."""
        scorer, probe = self.method.scorer, staged.probe_queries
        if scorer is None or probe is None:
            return None
        positions = before.positions[:, before.first :]
        real = positions >= 0
        blocks = partial(stored_keys, before) if scorer.everything else tuple
        got, stored = received(probe, keys, real, new, blocks)
        ranked = scorer.importance(got)
        if scorer.running:
            ranked = self.window.add_scores(ranked)
            if stored is not None and before.tiers:
                self.body.add_importance(stored[..., 0 if before.sinks is None else before.sinks.size :])
        return ranked

    # --- joined and alone ---

    @classmethod
    def joined(
        cls, layers: Sequence["CompressedLayer"], table: TokenTable, base: "CompressedLayer | None"
    ) -> "CompressedLayer":
        """The rows of these layers, which are alike, under one table."""
        some, rows = layers[0], [layer.table.rows for layer in layers]
        other = cls(some.method, some.shape, some.tiers, table, copy.deepcopy(some.watch), base)
        other.seen = table.length
        other.window = Window.joined([layer.window for layer in layers], other._leaves)
        other.sinks = Sinks.joined([layer.sinks for layer in layers], rows)
        other.body = Body.joined([layer.body for layer in layers], rows)
        other.dtype, other.device, other.is_initialized = some.dtype, some.device, True
        for layer in layers:
            if other.watch is not None and layer.watch is not None and layer is not some:
                other.watch.sums = other.watch.sums + layer.watch.sums
        return other

    def row(self, number: int, table: TokenTable, base: "CompressedLayer | None") -> "CompressedLayer":
        """One row alone, under a table of its own."""
        other = copy.deepcopy(self, {id(self.table): table, id(self.base): base})
        other.seen = table.length
        other.window = self.window.row(number, other._leaves)
        other.sinks.selected(torch.tensor([number]))
        other.body.select(torch.tensor([number]))
        return other

    # --- what transformers asks of a cache layer ---

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def check_crop(self, count: int) -> None:
        """Raise CacheError if the last `count` tokens cannot be taken back."""
        if count > self.seen:
            raise CacheError(f"cannot crop {count} tokens: the cache holds {self.seen}. Crop fewer or call reset().")
        held = self.window.count + (0 if self.body.chooses else self.body.tokens)
        if self.body.drops and held < count < self.seen:
            raise CacheError(
                f"cannot crop {count} tokens: {type(self.method).__name__} holds only the last {held} "
                "and dropped what came before. Use a larger window."
            )

    @outside_inference_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative count). A page that is cut stays short; nothing is encoded again."""
        count = abs(tokens_to_remove)
        self.check_crop(count)
        if count == 0:
            return
        if count == self.seen:
            self.reset()
            return
        whole, self.whole = self.whole, False
        self.seen -= count
        self.window.crop(count)
        lengths = np.maximum(0, self.seen - (0 if self.table.shifts is None else self.table.shifts))
        lengths = np.broadcast_to(lengths, (self.table.rows,)).astype(np.int64)
        self.body.crop(lengths)
        self.sinks.crop(torch.from_numpy(lengths))
        self.whole = whole

    def reset(self) -> None:
        self._clear()
        self.is_initialized = False
        self.staged = None

    @outside_inference_mode
    def select(self, index: Tensor) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        whole, self.whole = self.whole, False
        for part in (self.window, self.sinks, self.body):
            part.selected(index) if not isinstance(part, Body) else part.select(index)
        self.whole = whole

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self.table.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    @outside_inference_mode
    def _move(self, device: torch.device | str) -> None:
        whole, self.whole = self.whole, False
        for part in (self.window, self.sinks, self.body):
            part.to(device)
        self.whole = whole

    # --- bytes and state ---

    def tensors(self) -> list[Tensor]:
        own = [*self.window.tensors().values(), *self.sinks.tensors().values(), *self.body.tensors()]
        return own if self.watch is None else [*own, self.watch.sums]

    def held(self) -> Held:
        """Bytes by purpose, from the storages that are alive."""
        metadata = self.body.metadata()
        payload = nbytes(self.body.tensors()) - metadata
        metadata += self.watch.sums.nbytes if self.watch else 0
        return Held(
            payload,
            metadata,
            nbytes(self.window.tensors().values()),
            nbytes(self.sinks.tensors().values()),
            self.body.index_bytes,
        )

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """(plain values, tensors) from which `restore` rebuilds the layer."""
        values, tensors = self.body.state()
        tensors |= {f"window.{k}": t for k, t in self.window.state().items()}
        tensors |= {f"sinks.{k}": t for k, t in self.sinks.tensors().items()}
        if self.watch is not None:
            tensors["watch.sums"] = self.watch.sums
        starts = None if self.window.starts is None else self.window.starts.tolist()
        own = {
            "seen": self.seen,
            "window": self.window.count,
            "starts": starts,
            "scores": self.window.scores is not None,
            "sinks": self.sinks.keys is not None,
            "watched": self.watch is not None,
        }
        return own | values, tensors

    def restore(self, values: dict, tensors: dict[str, Tensor], empty: Sequence) -> None:
        """empty: one page as each tier lays it out."""
        self.reset()
        self.seen, self.whole = values["seen"], False
        self.body.restore(values, tensors, empty)
        if window := under(tensors, "window."):
            self.window.restore(window, self._leaves)
            self.window.starts = None if values["starts"] is None else np.array(values["starts"], np.int64)
            self.dtype, self.device, self.is_initialized = window["keys"].dtype, window["keys"].device, True
        if sinks := under(tensors, "sinks."):
            self.sinks.restore(sinks)
        if self.watch is not None and "watch.sums" in tensors:  # saved unwatched: counted from here on
            self.watch.sums = tensors["watch.sums"]
        self.whole = True
