"""One layer's cache: sinks, body and window, and the one loop that moves tokens from the window into the body.

All per-sequence state of the library is in this class (and in the token table that a cache's layers share).
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvshrink.cache.attend import rebuild
from kvshrink.cache.body import Body
from kvshrink.cache.drift import DriftWatch
from kvshrink.cache.encode import encode
from kvshrink.cache.exact import Sinks, Window
from kvshrink.cache.leaving import Paged, Span, cut, left, paged, spans
from kvshrink.cache.rope import Rope
from kvshrink.cache.saliency import importance, probes
from kvshrink.cache.snapshot import ExactSinks, Snapshot
from kvshrink.cache.step import Staged, appending
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

ENCODE_TOKENS = 2048  # encoded at a time in a prefill, so that float32 copies stay small


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
        self.body = Body(self.tiers, self.method.page)
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
        if leaves:
            self._leave(keys, values, staged, new)
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
        """Which of `count` new tokens must give their queries to `stage`; None: no codec asks, or none leaves for the
        body in this step."""
        if self.codecs is None or not any(codec.needs_importance for codec in self.codecs):
            return None
        lengths = self.table.lengths if self.table.length == self.seen else self.table.lengths - count
        window, page = self.method.window, self.method.page
        lengths = lengths if len(lengths) else np.zeros(1, np.int64)
        more = left(lengths + count, window, page) > np.maximum(
            left(lengths, window, page), lengths - self._held(lengths)
        )
        return probes(count) if bool(np.any(more)) else None

    def _held(self, lengths: np.ndarray) -> np.ndarray:
        """Exact tokens of each row."""
        starts = self.window.starts
        return np.minimum(lengths, self.window.count - (0 if starts is None else starts))

    def _leave(self, keys: Tensor, values: Tensor, staged: Staged, new: int) -> None:
        """Move what leaves of these exact tokens to sinks and body; the window keeps the rest."""
        window, page = self.method.window, self.method.page
        lengths, slots = self.table.lengths, keys.shape[2]
        starts = self.window.starts
        exact = np.minimum(lengths, slots - (0 if starts is None else starts))
        positions = self.table.positions_on(keys.device)[:, self.seen - slots : self.seen]
        ranked = None if staged.probe_queries is None else importance(staged.probe_queries, keys, positions >= 0, new)
        for span in spans(lengths, exact, slots, window, page):
            self._capture(span, keys, values)
            if self.codecs is not None:
                self._store(span, keys, values, positions, staged.rope, ranked)
        stay = np.minimum(exact, lengths - left(lengths, window, page))
        if slots <= self.window.capacity and (stay == exact).all():
            return
        gone = slots - int(stay.max())
        rest = slots - gone - stay
        self.window.starts = rest + gone if rest.any() else None
        self.window.keep(keys, values, gone)

    def _capture(self, span: Span, keys: Tensor, values: Tensor) -> None:
        """Keep those of the span's tokens that are sinks."""
        if self.sinks.full:
            return
        shifts = np.zeros(len(keys), np.int64) if self.table.shifts is None else self.table.shifts
        first = self.seen - keys.shape[2]  # the batch's column of slot 0
        real = self.table.positions_on(keys.device)[:, : self.seen] >= 0
        wanted = self.sinks.wanted(real, first).clone()
        slot = torch.arange(keys.shape[2], device=keys.device)
        wanted &= (slot >= span.start) & (slot < span.stop)
        if span.rows is not None:
            others = np.setdiff1d(np.arange(len(keys)), span.rows)
            wanted[torch.from_numpy(others).to(keys.device)] = False
        columns = (slot + first) - torch.from_numpy(shifts).to(keys.device)[:, None]
        part = slice(0, span.stop)
        self.sinks.capture(keys[:, :, part], values[:, :, part], columns[:, part], wanted[:, part])

    def _store(
        self, span: Span, keys: Tensor, values: Tensor, positions: Tensor, rope: Rope | None, ranked: Tensor | None
    ) -> None:
        """Encode what leaves, some pages at a time, into the body."""
        assert self.codecs is not None
        if self.codecs[0].site == "k_pre" and rope is not None:
            turned = rope
        else:
            turned = None
        page, b = self.method.page, len(keys)
        whole = paged(span, keys, values, positions, self.table.padded, page, self.body.lanes)
        spots = _spread(span.of(positions, 1), span, page)
        importance = None if ranked is None else _spread(span.of(ranked), span, page)
        pages = whole.first.shape[1]
        skip = 0 if (room := self.body.room) is None else max(0, pages - room)  # would be dropped at once
        step = max(1, ENCODE_TOKENS // page)
        parts = [(at, min(at + step, pages)) for at in range(skip, pages, step)]
        encoded = (self._encode(cut(whole, *part, page), spots, importance, part[0] * page, turned) for part in parts)
        if parts:
            self.body.append(encoded, whole.first[:, skip:], whole.used[:, :, skip:], span.rows, b)

    def _encode(
        self, part: Paged, positions: Tensor, ranked: Tensor | None, at: int, rope: Rope | None
    ) -> dict[str, Tensor]:
        """Pages of some leaving tokens, whose positions and importance are those from slot `at` on."""
        assert self.codecs is not None
        keys, count = part.keys, part.keys.shape[2]
        if rope is not None:
            keys = rope.undo(keys, positions[:, at : at + count])
        base = None
        if self.base is not None:
            base = self._base_of(part)
        own = None if ranked is None else ranked[:, :, at : at + count]
        stored = encode(self.codecs, keys, part.values, part.valid, own, base)
        if self.watch is not None:
            slots = np.arange(self.method.page)
            columns = torch.from_numpy((part.first[:, :, None] + slots).reshape(len(keys), -1)).to(keys.device)
            self.watch.add(keys, part.values, self.sinks.others(part.valid, columns))
        return stored

    def _base_of(self, part: Paged):
        """The pages of the same tokens in the layer that this one follows, by side."""
        assert self.base is not None
        pages = self.base.pages
        start = int(np.nonzero(pages.first[0] == part.first[0, 0])[0][-1])
        records = pages.records(start, start + part.first.shape[1])
        return lambda side: dict(records.under(side))

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
        held = self.window.count + self.body.tokens
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
        own = {"seen": self.seen, "window": self.window.count, "starts": starts, "watched": self.watch is not None}
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


def _spread(x: Tensor, span: Span, page: int) -> Tensor:
    """Numbers of the span's tokens, on their last axis, where `paged` puts the tokens; the last one again at gaps."""
    begin = int(span.columns[0]) % page
    head = min(x.shape[-1], page - begin) if begin else 0
    if not head:
        return x
    fill = x[..., head - 1 : head].expand(*x.shape[:-1], page - head)
    return torch.cat([x[..., :head], fill, x[..., head:]], -1)
