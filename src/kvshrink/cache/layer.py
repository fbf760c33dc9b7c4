"""One layer's cache: sinks, body and window, and the one loop that moves tokens from the window into the body.

All per-sequence state of the library is in this class (and in the token table that a cache's layers share).
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvshrink.cache.attend import rebuild
from kvshrink.cache.body import Body
from kvshrink.cache.drift import DriftWatch
from kvshrink.cache.latents import Pending, hand_over
from kvshrink.cache.leaving import left, quiet
from kvshrink.cache.rope import Rope
from kvshrink.cache.rows_layer import RowsLayer
from kvshrink.cache.sinks import Sinks
from kvshrink.cache.snapshot import ExactSinks, HeldRows, Snapshot, WindowRows
from kvshrink.cache.step import SNAPSHOT, Staged, appending
from kvshrink.cache.window import Window
from kvshrink.cache.writing import Leave
from kvshrink.errors import CacheError
from kvshrink.methods._policy import Policy
from kvshrink.methods._roles import Codec, Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.methods._window import WindowForm
from kvshrink.shapes import Float
from kvshrink.store.bytes import Held, nbytes
from kvshrink.store.lanes import Pages
from kvshrink.store.names import under
from kvshrink.store.tokens import TokenTable


class CompressedLayer(RowsLayer):
    """[sinks | body | window]: what leaves the window enters the first of the `tiers`."""

    def __init__(
        self,
        method: Method,
        shape: LayerShape,
        tiers: Sequence[Tier],
        table: TokenTable,
        watch: DriftWatch | None = None,
        base: "CompressedLayer | None" = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # transformers' own
        self.method, self.shape, self.tiers, self.table = method, shape, tiers, table
        self.watch, self.base = watch, base  # base: the layer that this one follows
        self.policy = method.policy(shape, {}) if policy is None else policy
        self.staged: Staged | None = None
        self.exact, self.rounded = WindowForm(None, shape), method.window_form(shape)
        self._clear()

    def like(self, table: TokenTable, watch: DriftWatch | None, base: "CompressedLayer | None") -> "CompressedLayer":
        """An empty layer of the same kind under another table."""
        return CompressedLayer(self.method, self.shape, self.tiers, table, watch, base, self.policy)

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
        self.whole = True
        self.sinks = Sinks(self.method.sinks)
        self.window = Window(self.method.window + self.method.page, self._form)
        lanes = self.method.lanes(self.shape, self.tiers)
        self.body = Body(self.tiers, self.method.page, lanes, self.policy.budget is not None)
        if self.watch is not None:
            self.watch.clear()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @appending
    def update(
        self, key_states: Float[Tensor, "b h s d"], value_states: Float[Tensor, "b h s e"], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append s tokens; return the exact ones with a snapshot of the rest, or all, while nothing is encoded. Of a
        window at 8 bits the new ones alone may come back: the snapshot has what is held."""
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
        self.window.hold(self._form)
        joined, held = self.window.put(key_states, value_states, self.leaves), None
        learns = key_states.requires_grad or value_states.requires_grad  # then attention must see the returned keys
        if joined is None and staged.own_attention and not learns and self._only_attended(before):
            held = WindowRows(*self.window.stored(), self.window.form)
        if held is not None and self.window.form.bits is not None:  # rows are not made where a kernel reads them
            keys, values, count = key_states, value_states, self.window.count
        else:
            keys, values = joined or (self.window.view() if held is None else held.rows())
            count = keys.shape[2]
        snapshot = self._snapshot(before, count, keys.device, staged.rope, held)
        leave = Leave(
            self.method,
            self.policy,
            self.codecs,
            self.tiers[-1].codecs if self.tiers[-1].beside else None,
            self.table,
            self.window,
            self.sinks,
            self.body,
            self.watch,
            self._base_pages,
            snapshot,
        )
        ranked = leave.rank(staged, keys, values, new)
        if self.leaves and held is None:
            leave.run(keys, values, ranked, new, staged)
            self.window.hold(self._form)
        self.whole = True
        if snapshot.first == 0 and not before and snapshot.sinks is None:
            return (key_states, value_states) if keys.shape[2] == new else (keys, values)
        if not staged.own_attention or (staged.maker is not None and learns):
            return rebuild(snapshot, keys, values)  # all tokens at full width: slower, equally right
        if staged.maker is not None:
            hand_over(Pending(staged.maker, keys, values, snapshot))
            return keys, values
        keys = keys.view_as(keys)
        setattr(keys, SNAPSHOT, snapshot)
        return keys, values

    @property
    def _form(self) -> WindowForm:
        """How the window is held: exactly until it has given all sinks, which are exact."""
        return self.rounded if self.sinks.full else self.exact

    # --- what a step reads ---

    def snapshot(self, rope: Rope | None) -> Snapshot:
        """What attention would read now, beside `window.view()`."""
        keys = self.window.stored()[0]
        return self._snapshot(self.body.view(self._base_pages), keys.shape[2], keys.device, rope, None)

    def _only_attended(self, before: tuple[Any, ...]) -> bool:
        """Whether our attention alone reads the exact tokens, all in the window, and others beside them."""
        first, method = self.seen - self.window.count, self.method
        alike = self.window.starts is None and self.table.shifts is None and not self.policy.remembers
        more = first > 0 or bool(before) or self.sinks.keys is not None
        return more and alike and quiet(first, self.seen, method.window, method.page)

    def _snapshot(
        self, before: tuple[Any, ...], count: int, device: torch.device, rope: Rope | None, held: HeldRows | None
    ) -> Snapshot:
        """count: of exact tokens."""
        sinks, exact, table = self.sinks, None, self.table
        shifts = None if table.shifts is None else torch.from_numpy(table.shifts.astype(np.int32)).to(device)
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
            positions=table.positions_on(device)[:, : self.seen],
            padded=table.padded,
            first=self.seen - count,
            seen=self.seen,
            starts=None if starts is None else torch.from_numpy(starts).to(device),
            shifts=shifts,
            hidden=sinks.hidden,
            held=held,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompressedLayer":
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
            self.table.append(staged.positions.expand(b, s), staged.real, staged.visual)
        elif self.seen + s != self.table.length:
            raise CacheError(
                f"this layer holds {self.seen} tokens and the cache {self.table.length}: a step was interrupted. "
                "Call reset()."
            )

    # --- what leaves the window ---

    @property
    def leaves(self) -> bool:
        """Whether, of so many columns, some have left the window."""
        return self.seen >= self.method.window + self.method.page

    def probes(self, count: int) -> Tensor | None:
        """Which of `count` new tokens must give their queries to `stage`; None: none is asked in this step."""
        scorer = self.policy.scorer
        if scorer is None or not scorer.asks:
            return None
        known = self.table.length == self.seen  # else the table has the new columns already
        lengths = (self.table.lengths + (count if known else 0)) if self.table.rows else np.full(1, count)
        starts = 0 if self.window.starts is None else self.window.starts
        exact = np.minimum(lengths, self.window.count - starts + count)
        leaves = left(lengths, self.method.window, self.method.page) > lengths - exact
        return scorer.queries(count) if scorer.remembers or bool(np.any(leaves)) else None

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

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
            "rounded": self.window.form.bits is not None,
            "scores": self.window.scores is not None,
            "sinks": self.sinks.keys is not None,
            "watched": self.watch is not None,
        }
        return own | values, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor], empty: Sequence[Any]) -> None:
        """empty: one page as each tier lays it out."""
        self.reset()
        self.seen, self.whole = values["seen"], False
        self.body.restore(values, tensors, empty)
        self.window.form = self.rounded if values["rounded"] else self.exact
        if window := under(tensors, "window."):
            self.window.restore(window, self.leaves)
            self.window.starts = None if values["starts"] is None else np.array(values["starts"], np.int64)
            self.dtype, self.device, self.is_initialized = self.shape.dtype, window["keys"].device, True
        if sinks := under(tensors, "sinks."):
            self.sinks.restore(sinks)
        if self.watch is not None and "watch.sums" in tensors:  # saved unwatched: counted from here on
            self.watch.sums = tensors["watch.sums"]
        self.whole = True
