"""What a saved cache must be like: the tensors that its description implies, and what may be in them.

A description is plain values. With the cache that is to take it over it implies the name, dtype and shape of every
tensor, so that nothing of another kind reaches a codec or a kernel; only numbers are left to be wrong, and those that
say where something lies are compared with what the others imply.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.layout import empty_pages
from kvshrink.cache.passed import STATES, has_states, is_sliding
from kvshrink.errors import ArtifactError
from kvshrink.kernels.records import Layout
from kvshrink.methods._roles import Stored
from kvshrink.store.deflate import Kind
from kvshrink.store.files import DESCRIPTION
from kvshrink.store.parse import parsed

FLOATS = ("float32", "bfloat16", "float16")
MOST = 2**31  # tokens: a position has 32 bits
PLAIN = "plain"  # the tensor that holds the description, as JSON


def description(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The plain values of a state. Raises ArtifactError if there are none."""
    plain = state.get(PLAIN)
    try:
        if plain is None or plain.dtype != torch.uint8 or plain.dim() != 1 or len(plain) > DESCRIPTION:
            raise ValueError("no text")
        values = parsed(plain.cpu().numpy().tobytes())
        if not isinstance(values, dict) or not isinstance(values.get("layers"), list):
            raise ValueError("no layers")
    except ValueError as error:
        raise ArtifactError(
            f"not a kvshrink cache state: its description is missing or edited ({error}). Save it again."
        ) from error
    return values


def require(ok: bool, what: str) -> None:
    if not ok:
        raise ArtifactError(f"the saved cache is incomplete or edited ({what}). Save it again.")


def check_kinds(given: Mapping[str, Kind], wanted: Mapping[str, Kind]) -> None:
    """Raise ArtifactError unless the tensors are just those that are wanted."""
    wrong = sorted(set(given) ^ set(wanted)) or [k for k in sorted(given) if given[k] != wanted[k]]
    if wrong:
        have, want = (str(x.get(wrong[0], "none")).replace("torch.", "") for x in (given, wanted))
        require(False, f"{wrong[0]}: {have}, not {want}")


class Schema:
    """A description, checked, for the cache that is to take it over. Raises ArtifactError if it cannot be its own.

    kinds: dtype and shape of every tensor. empty: of each compressed layer, one page as each tier lays it out.
    """

    def __init__(self, layers: Sequence[Any], device: torch.device, plain: Mapping[str, Any]) -> None:
        self.layers, self.device = layers, device
        table = _object(plain, "table", {"length", "padded", "shifts", "visual"})
        self.batch = _number(plain, "batch", "the description", 0, MOST)
        self.length = _number(table, "length", "table", 0, MOST)
        require(isinstance(table["padded"], bool), "table: padded")
        require(isinstance(table["visual"], bool) and table["visual"] <= (self.length > 0), "table: visual")
        counted = [x for layer, x in zip(layers, plain["layers"], strict=True) if _counts(layer)]
        require((self.batch > 0) == any(self._seen(x) > 0 for x in counted), "batch")
        self.padded: bool = table["padded"]
        self.shifts = self._per_row(table["shifts"], "table: shifts", self.length)
        self.kinds: dict[str, Kind] = {}
        self.empty: dict[int, list[Stored | None]] = {}
        self.windows: dict[int, tuple[int, list[int]]] = {}  # tokens in the window, and each row's first slot
        if self.length:
            self.kinds["table.positions"] = (torch.int32, (self.batch, self.length))
        if table["visual"]:
            self.kinds["table.visual"] = (torch.bool, (self.batch, self.length))
        seen = {self._seen(x) for x in counted}
        compressed = any(isinstance(layer, CompressedLayer) for layer in layers)
        require(len(seen) == 1 and self.length == (max(seen) if compressed else 0), "layers of different lengths")
        for i, (layer, values) in enumerate(zip(layers, plain["layers"], strict=True)):
            known = isinstance(layer, CompressedLayer)
            require(isinstance(values, dict), f"layer {i}")
            values = dict(values)
            states = self._states(i, values.pop("states", None)) if has_states(layer) else {}
            found = self._compressed(i, layer, values) if known else self._passed(i, layer, values)
            self.kinds |= {f"layers.{i}.{name}": kind for name, kind in {**found, **states}.items()}

    def _per_row(self, given: Any, what: str, most: int) -> list[int]:
        """A number for each row, from 0 on; none given: 0 for all."""
        if given is None:
            return [0] * self.batch
        right = isinstance(given, list) and len(given) == self.batch
        require(right and all(type(n) is int and 0 <= n <= most for n in given) and any(given), what)
        return list(given)

    @staticmethod
    def _seen(values: Any) -> int:
        require(isinstance(values, dict), "a layer without values")
        return _number(values, "seen", "a layer", 0, MOST)

    def _passed(self, i: int, layer: Any, values: dict[str, Any]) -> dict[str, Kind]:
        if not is_sliding(layer):
            _keys(values, set(), f"layer {i}")
            return {}
        _keys(values, {"seen", "shapes", "dtype"} if values["seen"] else {"seen"}, f"layer {i}")
        if not values["seen"]:
            return {}
        tokens = min(values["seen"], max(1, layer.sliding_window - 1))
        shape = getattr(layer, "shape", None)
        given = values["shapes"]
        require(isinstance(given, list) and len(given) == 2, f"layer {i}: shapes")
        wanted = None if shape is None else [[shape.heads, tokens, d] for d in (shape.head_dim, shape.value_dim)]
        for own in given:
            require(_sizes(own) and len(own) == 3 and own[1] == tokens, f"layer {i}: shape {own!s:.60}")
        require(wanted in (None, given), f"layer {i}: shapes {given!s:.60}")
        dtype = str(shape.dtype).removeprefix("torch.") if shape else values["dtype"]
        require(values["dtype"] == dtype and dtype in FLOATS, f"layer {i}: dtype")
        kinds = [(getattr(torch, dtype), (self.batch, *own)) for own in given]
        return {"keys": kinds[0], "values": kinds[1]}

    def _states(self, i: int, given: Any) -> dict[str, Kind]:
        """Kinds of a layer's states, which say their shapes themselves."""
        require(isinstance(given, dict) and bool(given) == (self.batch > 0), f"layer {i}: states")
        found: dict[str, Kind] = {}
        names = {f"{name}.{n}" for name in STATES for n in self.layers[i].conv_states}
        for name, kind in given.items():
            right = name in names and isinstance(kind, list) and len(kind) == 2 and kind[0] in FLOATS
            require(right and _sizes(kind[1]), f"layer {i}: states {name!s:.20}")
            found[f"states.{name}"] = (getattr(torch, kind[0]), (self.batch, *kind[1]))
        return found

    def _compressed(self, i: int, layer: CompressedLayer, values: dict[str, Any]) -> dict[str, Kind]:
        """Kinds of the layer's tensors."""
        names = ["pages", *(f"older.{n}" for n in range(len(layer.tiers) - 1))]
        _keys(values, {"seen", "window", "starts", "rounded", "scores", "sinks", "watched", *names}, f"layer {i}")
        window = _number(values, "window", f"layer {i}", 0, min(layer.window.capacity, values["seen"]))
        require(isinstance(values["watched"], bool), f"layer {i}: watched")
        rounds = layer.rounded.bits is not None
        require(isinstance(values["rounded"], bool) and values["rounded"] <= rounds, f"layer {i}: rounded")
        self.windows[i] = window, self._per_row(values["starts"], f"layer {i}: starts", window)
        b, shape = self.batch, layer.shape
        found: dict[str, Kind] = {}
        if values["seen"]:
            forms = (layer.rounded if values["rounded"] else layer.exact).kinds
            rows = [(dtype, (b, shape.heads, window, numbers)) for dtype, numbers in forms]
            found |= {"window.keys": rows[0], "window.values": rows[1]}
        require(isinstance(values["scores"], bool), f"layer {i}: scores")
        require(not values["scores"] or (layer.policy.remembers and window > 0), f"layer {i}: scores")
        if values["scores"]:
            found["window.scores"] = (torch.float32, (b, shape.heads, window))
        require(isinstance(values["sinks"], bool), f"layer {i}: sinks")
        if values["sinks"]:
            pair = [(shape.dtype, (b, shape.heads, layer.sinks.size, d)) for d in (shape.head_dim, shape.value_dim)]
            found |= {"sinks.keys": pair[0], "sinks.values": pair[1]}
            found["sinks.columns"] = (torch.int32, (b, layer.sinks.size))
        if values["watched"]:
            found["watch.sums"] = (torch.float64, (2, 2))
        first = next((n for n, x in enumerate(self.layers) if x is layer.base), None)
        base = None if first is None else self.empty[first][0]
        pages = empty_pages(layer.tiers, shape, layer.method.page, self.device, base)
        self.empty[i] = [page or None for page in pages]
        for tier, name, page in zip(layer.tiers, names, pages, strict=True):
            most = 0 if tier.codecs is None else None if tier.tokens is None else tier.tokens // layer.method.page
            own = self._pages(values, name, f"layer {i}", layer, page, most, tier.every)
            found |= {f"{name}.{k}": kind for k, kind in own.items()}
        return found

    def _pages(
        self,
        values: dict[str, Any],
        name: str,
        where: str,
        layer: CompressedLayer,
        page: Stored,
        most: int | None,
        every: bool,
    ) -> dict[str, Kind]:
        """Kinds of the tensors of pages, of which a row may have `most`. every: of a tier of all tokens."""
        given = _object(values, name, {"pages", "records", "columns"})
        count = _number(given, "pages", f"{where}: {name}", 0, MOST if most is None else most)
        b, lanes = self.batch, 1 if every else layer.body.lanes
        records = _number(given, "records", f"{where}: {name}", min(1, count), b * lanes * count)
        chooses = layer.body.chooses and count > 0 and not every
        require(given["columns"] is chooses, f"{where}: {name}: columns")
        if not count:
            return {}
        found: dict[str, Kind] = {
            "records": (torch.uint8, (records, Layout.of(page, lanes).size)),
            "table": (torch.int32, (b, lanes, count)),
            "used": (torch.uint8, (b, lanes, count)),
            "first": (torch.int32, (b, count)),
        }
        if given["columns"]:
            found["columns"] = (torch.int32, (b, lanes, count * layer.method.page))
            found["importance"] = (torch.float32, (b, lanes, count * layer.method.page))
        return found


def _counts(layer: Any) -> bool:
    return isinstance(layer, CompressedLayer) or is_sliding(layer)


def _sizes(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(n) is int and 0 < n < MOST for n in given)


def _number(values: Mapping[str, Any], key: str, where: str, low: int, high: int) -> int:
    value: Any = values.get(key)
    require(type(value) is int and low <= value <= high, f"{where}: {key}={value!s:.40}")
    return int(value)


def _keys(values: Mapping[str, Any], keys: set[str], where: str) -> None:
    wrong = sorted(set(values) ^ keys)
    require(not wrong, f"{where}: {', '.join(wrong)[:60]}")


def _object(values: Mapping[str, Any], key: str, keys: set[str]) -> dict[str, Any]:
    found = values.get(key)
    require(isinstance(found, dict), f"no {key}")
    assert isinstance(found, dict)
    _keys(found, keys, key)
    return found
