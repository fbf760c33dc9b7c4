"""A cache's state: all its tensors and a description, checked before anything is taken over; files of it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvshrink.cache.contents import check_contents
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.owner import Owner
from kvshrink.cache.passed import passed_state, passed_tensors, restore_passed, tokens_seen
from kvshrink.cache.state import PLAIN, Schema, check_kinds, description, require
from kvshrink.errors import ArtifactError, CacheError
from kvshrink.identity import Identity, difference
from kvshrink.store import files
from kvshrink.store.deflate import claimed, deflated, inflated
from kvshrink.store.digest import digest
from kvshrink.store.files import DESCRIPTION
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.names import under
from kvshrink.store.tokens import TokenTable

VERSION = 5  # of a saved state


class SavedCache(Cache):
    """A cache that can be saved, and continue from what was saved."""

    table: TokenTable
    device: torch.device
    owner: Owner | None
    fitted: str
    whole: bool

    def check_whole(self) -> None:
        """Raise CacheError if an interrupt left the layers with different tokens or rows."""
        if not self.whole:
            raise CacheError("a change of the cache was interrupted, and its layers differ. Call reset().")
        layers: list[Any] = list(self.layers)
        counts = [x.seen if isinstance(x, CompressedLayer) else tokens_seen(x) for x in layers]
        seen = [n for n in counts if n is not None]
        same = len({*seen, *([self.table.length] if self.compressed else [])}) == 1
        if not same or not all(layer.whole for layer in self.compressed):
            raise CacheError(f"layers hold {min(seen)} to {max(seen)} tokens: a step was interrupted. Call reset().")

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that a method shrinks; the others stay as they are."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def rows(self) -> int:
        """Sequences held; 0 while there are no tokens."""
        if self.table.length:
            return self.table.rows
        return next((len(t) for layer in self.layers for t in passed_tensors(layer).values() if t.numel()), 0)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What is interrupted within, by Ctrl-C or for want of memory, is refused until `reset`."""
        self.whole = False
        yield
        self.whole = True

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, and the plain values as one JSON tensor: enough for `load_state_dict` on a like cache."""
        self.check_whole()
        table, tensors = self.table.state()
        out = {f"table.{k}": t for k, t in tensors.items()}
        layers: list[dict[str, Any]] = []
        for i, layer in enumerate(self.layers):
            values, tensors = layer.state() if isinstance(layer, CompressedLayer) else passed_state(layer)
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

    def load_state_dict(self, state: dict[str, Tensor]) -> "SavedCache":
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

    def load(self, path: str | Path) -> "SavedCache":
        """Continue from a saved file, on a cache made with the same model and method."""
        tensors, metadata = files.read_tensors(Path(path))
        _, schema = self._schema(inflated(tensors, metadata, {PLAIN: DESCRIPTION}))
        given = {k: kind for k, kind in claimed(tensors, metadata).items() if k != PLAIN}
        check_kinds(given, schema.kinds)  # before anything is inflated
        return self.load_state_dict(inflated(tensors, metadata))

    def _schema(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], Schema]:
        """The description of a state, and what it implies. Raises ArtifactError on one of something else."""
        plain = description(state)
        wanted = (VERSION, self.fitted, self._dtype(), len(self.layers))
        found = (*(plain.get(k) for k in ("version", "fitted", "dtype")), len(plain["layers"]))
        names = ("version", "method or artifact", "dtype", "number of layers")
        for what, have, want in zip(names, found, wanted, strict=True):
            if type(have) is not type(want) or have != want:
                shown = [str(x).removeprefix("torch.")[:8] for x in (have, want)]  # digests are long
                raise ArtifactError(
                    f"the saved cache has another {what} ({shown[0]}, not {shown[1]}). Use what it was made with."
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
    def _restore(self, plain: dict[str, Any], state: Mapping[str, Tensor], schema: Schema) -> None:
        copies = {k: t.detach().clone().to(self.device) for k, t in state.items()}
        for compressed in self.compressed:
            compressed.whole = False  # until all are
        self.table.restore(plain["table"], under(copies, "table."))
        for i, (layer, values) in enumerate(zip(self.layers, plain["layers"], strict=True)):
            if isinstance(layer, CompressedLayer):
                layer.restore(values, under(copies, f"layers.{i}."), schema.empty[i])
            else:
                restore_passed(layer, values, under(copies, f"layers.{i}."))
