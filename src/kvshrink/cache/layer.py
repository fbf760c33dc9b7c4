"""One layer's cache: sinks, body and window, and the one loop that moves tokens from the window into the body.

All per-sequence state of the library is in this class (and in the token table that a cache's layers share).
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvshrink.cache.body import Body, Shelf
from kvshrink.cache.drift import DriftWatch
from kvshrink.cache.encode import encode
from kvshrink.cache.exact import Sinks, Window
from kvshrink.cache.rope import Rope
from kvshrink.cache.saliency import importance, probes
from kvshrink.cache.step import Handle, Staged, appending
from kvshrink.errors import CacheError
from kvshrink.methods._roles import Codec, Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.shapes import Float
from kvshrink.store.bytes import Held, nbytes
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.names import under
from kvshrink.store.pages import Pages
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

    def shelves(self) -> list[Shelf]:
        """What attention reads of the body, the oldest first."""
        found = self.body.shelves()
        return found if self.base is None else [shelf._replace(base=self.base.pages) for shelf in found]

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
        """Append s tokens; return the exact ones, with a handle for the rest; or all, while nothing is encoded."""
        staged, self.staged = self.staged, None
        if staged is None:
            raise CacheError("this cache is used with a model that is not attached. Call kvshrink.attach(model) first.")
        if key_states.dtype != self.shape.dtype:  # the model's may have changed since
            made, given = self.shape.dtype, key_states.dtype
            raise CacheError(f"the cache was made for {made}, the model gives {given}. Make a new cache.")
        self.check_next(staged.own_attention)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._count(staged, *key_states.shape[::2])
        self.whole = False
        shelves = self.shelves()
        keys, values = self.window.extend(key_states, value_states)
        self.seen += key_states.shape[2]
        first = self.seen - keys.shape[2]
        if keys.shape[2] > self.window.capacity:
            self._spill(keys, values, first, staged, key_states.shape[2])
        self.whole = True
        if first == 0:
            return (key_states, value_states) if keys.shape[2] == key_states.shape[2] else (keys, values)
        handle = Handle(self, staged.rope, shelves, first)
        if not staged.own_attention:  # all tokens at full width: slower, equally right
            from kvshrink.cache.attend import rebuild

            return rebuild(handle, keys, values)
        keys = keys.view_as(keys)
        keys._kvshrink = handle  # type: ignore[attr-defined]
        return keys, values

    @property
    def shrunken(self) -> bool:
        """Whether some tokens are in the window no more."""
        return self.seen > self.window.count

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

    def probes(self, count: int) -> Tensor | None:
        """Which of `count` new tokens must give their queries to `stage`; None: no codec asks, or none leaves for the
        body in this step."""
        wanted = self.codecs is not None and any(codec.needs_importance for codec in self.codecs)
        return probes(count) if wanted and self.window.count + count > self.window.capacity else None

    def _spill(self, keys: Tensor, values: Tensor, first: int, staged: Staged, new: int) -> None:
        """Move the oldest of these exact tokens to sinks and body, in whole pages; the window keeps the rest."""
        spare, page = keys.shape[2] - self.method.window, self.method.page
        wanted, skip = None, 0
        if not self.sinks.full:
            wanted = self.sinks.wanted(self.table.positions[:, : self.seen] >= 0, first)[:, :spare]
            skip = self._skip(wanted, first, spare)
        out = skip + (spare - skip) // page * page
        if wanted is not None and out:
            self.sinks.capture(keys, values, first, wanted[:, :out])
        if self.codecs is not None and out > skip:
            if (room := self.body.room) is not None:  # what would be dropped at once is not encoded
                skip = max(skip, out - room * page)
            real = self.table.positions[:, first : self.seen] >= 0
            ranked = None if staged.probe_queries is None else importance(staged.probe_queries, keys, real, new)
            starts = range(skip, out, ENCODE_TOKENS)
            parts = (slice(start, min(start + ENCODE_TOKENS, out)) for start in starts)
            cuts = ((p, first + p.start, None if ranked is None else ranked[:, :, p]) for p in parts)
            encoded = (self._encode(keys[:, :, p], values[:, :, p], at, staged.rope, w) for p, at, w in cuts)
            self.body.append(encoded, (out - skip) // page, first + skip)
        self.window.keep(keys[:, :, out:], values[:, :, out:])

    def _skip(self, wanted: Tensor, first: int, spare: int) -> int:
        """Leading columns that no row needs in the body: each is a pad or a sink in every row."""
        if not self.table.padded:
            return max(0, min(self.sinks.size - first, spare))
        real = self.table.positions[:, first : first + spare] >= 0
        needed = (real & ~wanted).any(0)
        return int(needed.int().argmax()) if bool(needed.any()) else spare

    def _encode(
        self, keys: Tensor, values: Tensor, column: int, rope: Rope | None, ranked: Tensor | None
    ) -> dict[str, Tensor]:
        """Pages of the exact tokens from a column on."""
        assert self.codecs is not None
        count = keys.shape[2]
        positions = self.table.positions[:, column : column + count]
        if self.codecs[0].site == "k_pre" and rope is not None:
            keys = rope.undo(keys, positions)
        valid = positions >= 0 if self.table.padded else None
        base = None if self.base is None else partial(self.base.stored, column, count // self.method.page)
        stored = encode(self.codecs, keys, values, valid, ranked, base)
        if self.watch is not None:
            self.watch.add(keys, values, self.sinks.others(valid, column, count))
        return stored

    def stored(self, column: int, pages: int, side: str) -> dict[str, Tensor]:
        """One side of the pages from a column on, for a layer that follows this one."""
        return under(self.pages.part(self.pages.first.index(column), pages), side)

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
        self.window.count = max(0, self.window.count - count)
        self.body.crop(self.seen)
        self.sinks.crop(self.seen)
        self.whole = whole

    def reset(self) -> None:
        self._clear()
        self.is_initialized = False
        self.staged = None

    @outside_inference_mode
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch operation, or a move between devices, to everything held."""
        whole, self.whole = self.whole, False
        for part in (self.window, self.sinks, self.body):
            part.map(change)
        self.whole = whole

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_rows(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self.map_rows(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.map_rows(lambda t: t.to(self.device, non_blocking=True))

    # --- bytes and state ---

    def tensors(self) -> list[Tensor]:
        own = [*self.window.tensors().values(), *self.sinks.tensors().values(), *self.body.tensors()]
        return own if self.watch is None else [*own, self.watch.sums]

    def held(self) -> Held:
        """Bytes by purpose, from the storages that are alive."""
        payload, side = self.body.nbytes()
        side += self.watch.sums.nbytes if self.watch else 0
        return Held(payload, side, nbytes(self.window.tensors().values()), nbytes(self.sinks.tensors().values()))

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """(plain values, tensors) from which `restore` rebuilds the layer."""
        values, tensors = self.body.state()
        tensors |= {f"window.{k}": t for k, t in self.window.state().items()}
        tensors |= {f"sinks.{k}": t for k, t in self.sinks.tensors().items()}
        if self.watch is not None:
            tensors["watch.sums"] = self.watch.sums
        return {"seen": self.seen, "window": self.window.count, "watched": self.watch is not None, **values}, tensors

    def restore(self, values: dict, tensors: dict[str, Tensor]) -> None:
        self.reset()
        self.seen, self.whole = values["seen"], False
        self.body.restore(values, tensors)
        if window := under(tensors, "window."):
            self.window.restore(window)
            self.dtype, self.device, self.is_initialized = window["keys"].dtype, window["keys"].device, True
        if sinks := under(tensors, "sinks."):
            self.sinks.restore(sinks)
        if self.watch is not None and "watch.sums" in tensors:  # saved unwatched: counted from here on
            self.watch.sums = tensors["watch.sums"]
        self.whole = True
