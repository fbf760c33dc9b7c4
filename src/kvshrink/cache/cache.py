"""The cache object a user holds: a transformers `Cache` whose layers are ours, with bytes, report, save and load."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvshrink.cache.contents import check_contents
from kvshrink.cache.joining import check_alike, joined_layers, layers_of_row
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.owner import Owner
from kvshrink.cache.report import Report, Row
from kvshrink.cache.rope import Rope
from kvshrink.cache.rows import crop_count, repeats_of, row_indices
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.cache.sliding import check_crop, restore_sliding, sliding_state, sliding_tensors
from kvshrink.cache.state import PLAIN, Schema, check_kinds, description, require
from kvshrink.cache.step import Staged
from kvshrink.errors import ArtifactError, CacheError
from kvshrink.identity import Identity, difference
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.store import files
from kvshrink.store.bytes import Held, nbytes
from kvshrink.store.deflate import claimed, deflated, inflated
from kvshrink.store.digest import digest
from kvshrink.store.files import DESCRIPTION
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.names import under
from kvshrink.store.tokens import TokenTable

VERSION = 3  # of a saved state


class KVCache(Cache):
    """One sequence batch's cache. Make it with `kvshrink.make_cache(model, method)`, give it as `past_key_values`."""

    def __init__(
        self,
        layers: list[CacheLayerMixin],
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
        self.whole = True  # False while, and after, a change of all layers that did not come to its end

    @outside_inference_mode
    def __deepcopy__(self, memo: dict) -> "KVCache":
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

    def _with(self, layers: list[CacheLayerMixin], table: TokenTable) -> "KVCache":
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
    ) -> None:
        """Called by the attention hook before each layer: what `update` needs and transformers does not pass.

        positions int [b or 1, s]; real bool [b, s], False at pads, None if there are none; probe_queries: for a
        layer whose `probes` named some of the s tokens.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            return
        if model != self.model:
            raise CacheError("this cache was made for another model. Make one with make_cache(model, ...).")
        layer.staged = Staged(positions, real, rope, own_attention, probe_queries)

    def check_whole(self) -> None:
        """Raise CacheError if an interrupt left the layers with different tokens or rows."""
        if not self.whole:
            raise CacheError("a change of the cache was interrupted, and its layers differ. Call reset().")
        seen = [layer.get_seq_length() for layer in self.layers]  # type: ignore[union-attr]
        same = len({*seen, *([self.table.length] if self.compressed else [])}) == 1
        if not same or not all(layer.whole for layer in self.compressed):
            raise CacheError(f"layers hold {min(seen)} to {max(seen)} tokens: a step was interrupted. Call reset().")

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that a method shrinks; sliding-window layers stay as they are."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    # --- batch and length, over layers and the token table together ---

    @property
    def rows(self) -> int:
        """Sequences held; 0 while there are no tokens."""
        if self.table.length:
            return self.table.rows
        return next((len(t) for layer in self.layers for t in sliding_tensors(layer).values() if t.numel()), 0)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What is interrupted within, by Ctrl-C or for want of memory, is refused until `reset`."""
        self.whole = False
        yield
        self.whole = True

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
            for layer in self.layers:
                if count or getattr(layer, "record_past", False):  # which keeps more than the window until a crop
                    layer.crop(-count)  # type: ignore[union-attr]
            self.table.crop(seen - count)

    def reset(self) -> None:
        """Forget everything; the object can be used again."""
        with self._changing():
            super().reset()
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
                super().reorder_cache(index)  # type: ignore[arg-type]
                self.table.select(index)

    def batch_repeat_interleave(self, repeats: Any) -> None:
        """Each row `repeats` times, one beside the other. Raises CacheError for less than once."""
        self.check_whole()
        count = repeats_of(repeats)
        if self.rows:
            with self._changing():
                every = torch.arange(self.rows).repeat_interleave(count)
                super().batch_repeat_interleave(count)
                self.table.select(every)

    @property
    def is_initialized(self) -> bool:
        """Whether every layer holds tokens, as DynamicCache says; transformers' own asks only layers of fixed size."""
        return all(layer.is_initialized for layer in self.layers)  # type: ignore[union-attr]

    # --- bytes ---

    def report(self) -> Report:
        """Bytes per layer and purpose, measured, and the share of a full cache that they are."""
        rows = []
        b = self.rows
        name = name_of(self.method)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                drift = layer.watch.drift() if layer.watch else None
                full = b * layer.seen * layer.shape.token_bytes
                numbers = layer.body.slots * 2 * layer.shape.width // layer.body.lanes
                held = layer.held()
                rows.append(Row(i, name, layer.seen, held, full, drift, nbytes(layer.body.tensors()), numbers))
            else:
                size = nbytes(sliding_tensors(layer).values())
                rows.append(Row(i, "sliding", self.get_seq_length(i), Held(window=size), size))
        return Report(rows, nbytes(self.table.tensors()))

    @property
    def nbytes(self) -> int:
        """Bytes alive for this cache: payload, scales, window, sinks, positions."""
        return self.report().nbytes

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, and the plain values as one JSON tensor: enough for `load_state_dict` on a like cache."""
        self.check_whole()
        table, tensors = self.table.state()
        out = {f"table.{k}": t for k, t in tensors.items()}
        layers: list[dict] = []
        for i, layer in enumerate(self.layers):
            values, tensors = layer.state() if isinstance(layer, CompressedLayer) else sliding_state(layer)
            layers.append(values)
            out |= {f"layers.{i}.{k}": t for k, t in tensors.items()}
        plain = {
            "version": VERSION,
            "model": None if self.owner is None else self.owner.identity.to_dict(),
            "fitted": self.fitted,
            "dtype": self._dtype(),
            "batch": self.rows,
            "table": table,
            "layers": layers,
        }
        text = json.dumps({**plain, "sha256": digest(plain, out)}).encode()
        return out | {PLAIN: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> "KVCache":
        """Take over a saved state. Raises ArtifactError unless it is of this model, method and version, and as it was
        saved; the cache then stays as it is."""
        plain, schema = self._schema(state)
        tensors = {k: t for k, t in state.items() if k != PLAIN}
        check_kinds({k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, schema.kinds)
        require(plain.pop("sha256", None) == digest(plain, tensors), "sha256 differs")
        check_contents(schema, tensors)
        with self._changing():
            self._restore(plain, tensors, schema)
            if self.owner is not None:  # what it was saved with: a model that drifts by roundings stays the same
                self.owner.identity = Identity.from_dict(plain["model"])
        return self

    def save(self, path: str | Path, deflate: bool = False) -> None:
        """Write the state to one safetensors file; a failed save leaves the old file.

        deflate: smaller, bit for bit the same once loaded, and slower to write and to read.
        """
        tensors, packed = deflated(self.state_dict()) if deflate else (self.state_dict(), {})
        files.write_tensors(Path(path), tensors, {"format": "kvshrink cache"} | packed)

    def load(self, path: str | Path) -> "KVCache":
        """Continue from a saved file, on a cache made with the same model and method."""
        tensors, metadata = files.read_tensors(Path(path))
        _, schema = self._schema(inflated(tensors, metadata, {PLAIN: DESCRIPTION}))
        given = {k: kind for k, kind in claimed(tensors, metadata).items() if k != PLAIN}
        check_kinds(given, schema.kinds)  # before anything is inflated
        return self.load_state_dict(inflated(tensors, metadata))

    def _schema(self, state: Mapping[str, Tensor]) -> tuple[dict, Schema]:
        """The description of a state, and what it implies. Raises ArtifactError on one of something else."""
        plain = description(state)
        wanted = (VERSION, self.fitted, self._dtype(), len(self.layers))
        found = (*(plain.get(k) for k in ("version", "fitted", "dtype")), len(plain["layers"]))
        names = ("version", "method or artifact", "dtype", "number of layers")
        for what, have, want in zip(names, found, wanted, strict=True):
            if type(have) is not type(want) or have != want:
                raise ArtifactError(
                    f"the saved cache has another {what} ({have!s:.8}, not {want!s:.8}). Use what it was made with."
                )
        self._check_model(plain.get("model"))
        return plain, Schema(self.layers, self.device, plain)

    def _check_model(self, saved: object) -> None:
        """Raise ArtifactError unless a saved cache is of the model as it is now."""
        if self.owner is None:
            return
        if different := difference(saved, self.owner.now(), "the saved cache"):
            raise ArtifactError(
                f"the saved cache is of another model: of this one {different}. Use what it was made with."
            )

    def _dtype(self) -> str:
        return str(self.compressed[0].shape.dtype) if self.compressed else ""

    @outside_inference_mode
    def _restore(self, plain: dict, state: Mapping[str, Tensor], schema: Schema) -> None:
        copies = {k: t.detach().clone().to(self.device) for k, t in state.items()}
        for compressed in self.compressed:
            compressed.whole = False  # until all are
        self.table.restore(plain["table"], under(copies, "table."))
        for i, (layer, values) in enumerate(zip(self.layers, plain["layers"], strict=True)):
            if isinstance(layer, CompressedLayer):
                layer.restore(values, under(copies, f"layers.{i}."), schema.empty[i])
            else:
                restore_sliding(layer, values, under(copies, f"layers.{i}."))
