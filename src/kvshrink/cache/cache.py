"""The cache object a user holds: a transformers `Cache` whose layers are ours, with bytes, report, save and load."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.owner import Owner
from kvshrink.cache.report import Report, Row
from kvshrink.cache.rope import Rope
from kvshrink.cache.saliency import Asked
from kvshrink.cache.step import Staged
from kvshrink.errors import ArtifactError, CacheError
from kvshrink.identity import Identity, difference
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.store import files
from kvshrink.store.bytes import Held, nbytes
from kvshrink.store.deflate import deflated, inflated
from kvshrink.store.lasting import lasting
from kvshrink.store.tokens import TokenTable

VERSION = 1
SLIDING = ("keys", "values")  # what a sliding-window layer of transformers holds


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

    @lasting
    def __deepcopy__(self, memo: dict) -> "KVCache":
        """A fork: sequences are copied, settings and fitted tensors are shared."""
        fork = self.__class__.__new__(self.__class__)
        memo[id(self)] = fork
        for name, value in vars(self).items():
            setattr(fork, name, copy.deepcopy(value, memo))
        return fork

    # --- the model's side ---

    def stage(
        self,
        layer_idx: int,
        positions: Tensor,
        real: Tensor | None,
        rope: Rope | None,
        own_attention: bool,
        model: str,
        asked: Asked | None = None,
    ) -> None:
        """Called by the attention hook before each layer: what `update` needs and transformers does not pass.

        positions int [b or 1, s]; real bool [b, s], False at pads, None if there are none; asked: for a layer whose
        `probes` named some of the s tokens.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            return
        if model != self.model:
            raise CacheError("this cache was made for another model. Make one with make_cache(model, ...).")
        layer.staged = Staged(positions, real, rope, own_attention, asked)

    def check_whole(self) -> None:
        """Raise CacheError if the layers hold different numbers of tokens."""
        seen = [layer.get_seq_length() for layer in self.layers]  # type: ignore[union-attr]
        same = len({*seen, *([self.table.length] if self.compressed else [])}) == 1
        if not same or not all(layer.whole for layer in self.compressed):
            raise CacheError(f"layers hold {min(seen)} to {max(seen)} tokens: a step was interrupted. Call reset().")

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that a method shrinks; sliding-window layers stay as they are."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    # --- batch and length, over layers and the token table together ---

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last tokens: a negative count. A positive one is the length to keep (older transformers)."""
        given, seen = int(tokens_to_remove), self.get_seq_length()
        count = -given if given <= 0 else max(0, seen - given)
        for layer in self.compressed:  # all or none
            layer.check_crop(count)
        for other in sorted(self.layers, key=lambda x: isinstance(x, CompressedLayer)):  # those that may refuse first
            other.crop(-count)  # type: ignore[union-attr]
        if self.compressed:
            self.table.crop(self.compressed[0].seen)

    def reset(self) -> None:
        """Forget everything; the object can be used again."""
        super().reset()
        self.table.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.table.map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.table.map_rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.table.map_rows(lambda t: t[indices.to(t.device)])

    # --- bytes ---

    def report(self) -> Report:
        """Bytes per layer and purpose, measured, and the share of a full cache that they are."""
        rows = []
        b = self.table.positions.shape[0] if self.table.length else 0
        name = name_of(self.method)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                drift = layer.watch.drift() if layer.watch else None
                full = b * layer.seen * layer.shape.token_bytes
                numbers = b * len(layer.body) * layer.body.page * 2 * layer.shape.width
                rows.append(Row(i, name, layer.seen, layer.held(), full, drift, sum(layer.body.nbytes()), numbers))
            else:
                size = nbytes(_sliding(layer).values())
                rows.append(Row(i, "sliding", self.get_seq_length(i), Held(window=size), size))
        return Report(rows, nbytes(self.table.tensors()))

    @property
    def nbytes(self) -> int:
        """Bytes alive for this cache: payload, scales, window, sinks, positions."""
        return self.report().nbytes

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, and the plain values as one JSON tensor: enough for `load_state_dict` on a like cache."""
        plain: dict = {
            "version": VERSION,
            "model": None if self.owner is None else self.owner.identity.to_dict(),
            "fitted": self.fitted,
            "dtype": self._dtype(),
            "layers": [],
        }
        plain["table"], tensors = self.table.state()
        out = {f"table.{k}": t for k, t in tensors.items()}
        for i, layer in enumerate(self.layers):
            values: dict = {}
            if isinstance(layer, CompressedLayer):
                values, tensors = layer.state()
            else:
                tensors = _sliding(layer)
                values = {"seen": self.get_seq_length(i)}
            plain["layers"].append(values)
            out |= {f"layers.{i}.{k}": t for k, t in tensors.items()}
        plain["tensors"] = {k: list(t.shape) for k, t in sorted(out.items())}
        out["plain"] = torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> "KVCache":
        """Take over a saved state. Raises ArtifactError unless it is of this model, method and version."""
        try:
            plain = json.loads(bytes(state["plain"].tolist()))
            found = (plain["version"], plain["fitted"], plain["dtype"], len(plain["layers"]))
            plain["tensors"].items()
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(
                "not a kvshrink cache state: its description is missing or edited. Save it again."
            ) from error
        wanted = (VERSION, self.fitted, self._dtype(), len(self.layers))
        names = ("version", "method or artifact", "dtype", "number of layers")
        for what, have, want in zip(names, found, wanted, strict=True):
            if have != want:
                raise ArtifactError(
                    f"the saved cache has another {what} ({_short(have)}, not {_short(want)}). "
                    "Use what it was made with."
                )
        self._check_model(plain.get("model"))
        given = {k: list(t.shape) for k, t in sorted(state.items()) if k != "plain"}
        if given != plain["tensors"]:
            wrong = sorted(set(given) ^ set(plain["tensors"])) or [k for k in given if given[k] != plain["tensors"][k]]
            raise ArtifactError(f"the saved cache is incomplete or edited ({wrong[0]}). Save it again.")
        self._restore(plain, state)
        return self

    def save(self, path: str | Path, deflate: bool = False) -> None:
        """Write the state to one safetensors file; a failed save leaves the old file.

        deflate: smaller, bit for bit the same once loaded, and slower to write and to read.
        """
        tensors, packed = deflated(self.state_dict()) if deflate else (self.state_dict(), {})
        files.write_tensors(Path(path), tensors, {"format": "kvshrink cache"} | packed)

    def load(self, path: str | Path) -> "KVCache":
        """Continue from a saved file, on a cache made with the same model and method."""
        return self.load_state_dict(inflated(*files.read_tensors(Path(path))))

    def _check_model(self, saved: object) -> None:
        """Raise ArtifactError unless a saved cache is of the model as it is now."""
        if self.owner is None:
            return
        if different := difference(saved, self.owner.now(), "the saved cache"):
            raise ArtifactError(
                f"the saved cache is of another model: of this one {different}. Use what it was made with."
            )
        self.owner.identity = Identity.from_dict(saved)

    def _dtype(self) -> str:
        return str(self.compressed[0].shape.dtype) if self.compressed else ""

    @lasting
    def _restore(self, plain: dict, state: dict[str, Tensor]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t.clone().to(self.device) for k, t in state.items() if k.startswith(prefix)}

        self.table.restore(plain["table"], under("table."))
        for i, (layer, values) in enumerate(zip(self.layers, plain["layers"], strict=True)):
            tensors = under(f"layers.{i}.")
            if isinstance(layer, CompressedLayer):
                layer.restore(values, tensors)
            elif isinstance(layer, DynamicSlidingWindowLayer):
                layer.reset()
                if tensors:
                    layer.lazy_initialization(tensors["keys"], tensors["values"])
                    layer.keys, layer.values, layer.cumulative_length = (
                        tensors["keys"],
                        tensors["values"],
                        values["seen"],
                    )


def digest(method: Method, tensors: list[Tensor]) -> str:
    """Short hash of a method's settings and fitted tensors."""
    h = hashlib.sha256(json.dumps([name_of(method), method.settings()], sort_keys=True).encode())
    for t in tensors:
        h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def _sliding(layer: Any) -> dict[str, Tensor]:
    return {k: t for k in SLIDING if isinstance(t := getattr(layer, k, None), Tensor)}


def _short(x: object) -> str:
    return x[:8] if isinstance(x, str) else str(x)
