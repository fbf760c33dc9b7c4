"""What a saved cache must be like: the tensors that its description implies, and what may be in them.

A description is plain values. With the cache that is to take it over it implies the name, dtype and shape of every
tensor, so that nothing of another kind reaches a codec or a kernel; only numbers are left to be wrong, and those that
say where something lies are compared with what the others imply.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvshrink.cache.exact import Sinks
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.layout import empty_pages, kinds_of
from kvshrink.errors import ArtifactError
from kvshrink.methods._roles import Stored
from kvshrink.store.deflate import Kind
from kvshrink.store.files import DESCRIPTION
from kvshrink.store.names import under
from kvshrink.store.parse import parsed

if TYPE_CHECKING:
    from kvshrink.cache.cache import KVCache

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


@dataclass(frozen=True)
class Run:
    """Pages one after the other that hold as many tokens each."""

    column: int
    pages: int
    used: int


class Schema:
    """A description, checked, for the cache that is to take it over. Raises ArtifactError if it cannot be its own."""

    def __init__(self, cache: "KVCache", plain: Mapping[str, Any]) -> None:
        self.cache = cache
        table = _object(plain, "table", {"length", "padded"})
        self.batch = _number(plain, "batch", "the description", 0, MOST)
        self.length = _number(table, "length", "table", 0, MOST)
        require(isinstance(table["padded"], bool), "table: padded")
        require((self.batch > 0) == any(self._seen(x) > 0 for x in plain["layers"]), "batch")
        self.padded: bool = table["padded"]
        self.kinds: dict[str, Kind] = {}
        self.gaps: dict[int, list[tuple[int, int]]] = {}  # columns before the window that are in no page
        self.exact: dict[int, int] = {}  # the window's first column
        if self.length:
            self.kinds["table.positions"] = (torch.int32, (self.batch, self.length))
        pages: dict[int, Stored] = {}
        seen = {self._seen(x) for x in plain["layers"]}
        require(len(seen) == 1 and self.length == (max(seen) if cache.compressed else 0), "layers of different lengths")
        for i, (layer, values) in enumerate(zip(cache.layers, plain["layers"], strict=True)):
            if isinstance(layer, CompressedLayer):
                found = self._compressed(i, layer, values, pages)
                if layer.base is not None:
                    first = next(n for n, x in enumerate(cache.layers) if x is layer.base)
                    require(values["pages"] == plain["layers"][first]["pages"], f"layer {i}: pages of its own")
            else:
                found = self._sliding(i, layer, values)
            self.kinds |= {f"layers.{i}.{name}": kind for name, kind in found.items()}

    @staticmethod
    def _seen(values: Any) -> int:
        require(isinstance(values, dict), "a layer without values")
        return _number(values, "seen", "a layer", 0, MOST)

    def _sliding(self, i: int, layer: Any, values: dict) -> dict[str, Kind]:
        _keys(values, {"seen", "shape", "dtype"} if values["seen"] else {"seen"}, f"layer {i}")
        if not values["seen"]:
            return {}
        tokens = min(values["seen"], max(1, layer.sliding_window - 1))
        shape = getattr(layer, "shape", None)
        wanted = None if shape is None else [shape.heads, tokens, shape.head_dim]
        given = values["shape"]
        alike = isinstance(given, list) and len(given) == 3 and all(type(n) is int and 0 < n < MOST for n in given)
        require(alike and given[1] == tokens and wanted in (None, given), f"layer {i}: shape {given!s:.60}")
        dtype = str(shape.dtype).removeprefix("torch.") if shape else values["dtype"]
        require(values["dtype"] == dtype and dtype in ("float32", "bfloat16", "float16"), f"layer {i}: dtype")
        kind = (getattr(torch, dtype), (self.batch, *given))
        return {"keys": kind, "values": kind}

    def _compressed(self, i: int, layer: CompressedLayer, values: dict, known: dict[int, Stored]) -> dict[str, Kind]:
        """Kinds of the layer's tensors. known: the empty pages of layers, by the layer's identity."""
        older = [f"older.{n}" for n in range(len(layer.tiers) - 1)]
        _keys(values, {"seen", "window", "watched", "pages", *older}, f"layer {i}")
        window = _number(values, "window", f"layer {i}", 0, min(layer.window.capacity, values["seen"]))
        require(isinstance(values["watched"], bool), f"layer {i}: watched")
        exact = self.exact[i] = values["seen"] - window
        b, shape = self.batch, layer.shape
        found: dict[str, Kind] = {}
        if values["seen"]:
            rows = (shape.dtype, (b, shape.heads, window, shape.head_dim))
            found |= {"window.keys": rows, "window.values": rows}
        if exact and layer.sinks.size:
            rows = (shape.dtype, (b, shape.heads, layer.sinks.size, shape.head_dim))
            found |= {"sinks.keys": rows, "sinks.values": rows, "sinks.columns": (torch.int32, (b, layer.sinks.size))}
        if values["watched"]:
            found["watch.sums"] = (torch.float64, (2, 2))
        base = None if layer.base is None else known[id(layer.base)]
        empty = empty_pages(layer.tiers, shape, layer.method.page, self.cache.device, base)
        known[id(layer)] = empty[0]
        shelves = []
        for tier, name, page in zip(layer.tiers, ["pages", *older], empty, strict=True):
            most = 0 if tier.codecs is None else None if tier.tokens is None else tier.tokens // layer.method.page
            runs, extents = _pages(values, name, f"layer {i}", layer.method.page, most)
            shelves.append(runs)
            for n, pages in enumerate(extents):
                found |= {f"{name}.{n}.{k}": (d, (b, pages, *rest)) for k, (d, rest) in kinds_of(page).items()}
        runs = [run for shelf in reversed(shelves) for run in shelf]
        self.gaps[i] = _gaps(runs, layer.method.page, exact, layer.body.drops, f"layer {i}")
        return found

    def check_contents(self, state: Mapping[str, Tensor]) -> None:
        """Raise ArtifactError if tensors of the right kind hold what no cache holds."""
        positions = state.get("table.positions", torch.zeros(0, 0, dtype=torch.int32)).cpu()
        least = -1 if self.padded else 0
        require(not positions.numel() or int(positions.min()) >= least, "table.positions")
        for i, layer in enumerate(self.cache.layers):
            if not isinstance(layer, CompressedLayer):
                continue
            own = under(state, f"layers.{i}.")
            self._check_sinks(i, layer, positions >= 0, own.get("sinks.columns"))
            sums = own.get("watch.sums")
            require(sums is None or bool((sums.isfinite() & (sums >= 0)).all()), f"layers.{i}.watch.sums")
            for n, tier in enumerate(layer.tiers):
                name = f"older.{n - 1}." if n else "pages."
                stored = under(own, name)
                for kv, codec in zip("kv", tier.codecs or (), strict=False):
                    for extent in {k.split(".", 1)[0] for k in stored}:
                        start = f"{extent}.{kv}."
                        part = under(stored, start)
                        require(not part or codec.sound(part), f"layers.{i}.{name}{start[:-1]}")

    def _check_sinks(self, i: int, layer: CompressedLayer, real: Tensor, columns: Tensor | None) -> None:
        """Sinks are the first real tokens of each row; what else is in no page is a pad, or was dropped."""
        exact = self.exact[i]
        wanted = Sinks(layer.sinks.size).wanted(real[:, :exact], 0)
        if columns is not None:
            row, at = wanted.nonzero(as_tuple=True)
            columns = columns.cpu()
            right = torch.full_like(columns, -1)
            right[row, wanted.cumsum(1)[row, at] - 1] = at.to(columns.dtype)
            require(torch.equal(columns, right), f"layers.{i}.sinks.columns")
        needed = (real[:, :exact] & ~wanted).any(0)
        require(not any(bool(needed[a:b].any()) for a, b in self.gaps[i]), f"layers.{i}: tokens are missing")


def _gaps(runs: list[Run], page: int, exact: int, drops: bool, where: str) -> list[tuple[int, int]]:
    """Columns before `exact` that are in no page and were not dropped, as (start, stop). Runs are the oldest first."""
    gaps, at = [], 0
    for n, run in enumerate(runs):
        require(run.column >= at, f"{where}: pages out of order")
        if not (drops and n == 0):
            gaps.append((at, run.column))
        at = run.column + (run.pages - 1) * page + run.used
    require(at <= exact, f"{where}: pages in the window")
    return gaps + ([] if drops and not runs else [(at, exact)])


def _pages(values: dict, name: str, where: str, page: int, most: int | None) -> tuple[list[Run], list[int]]:
    """(runs, extents) of a shelf of pages, of which there may be `most`."""
    given = _object(values, name, {"runs", "extents"})
    runs, extents = given["runs"], given["extents"]
    require(isinstance(runs, list) and isinstance(extents, list), f"{where}: {name}")
    for run in runs:
        right = isinstance(run, list) and len(run) == 3 and all(type(n) is int and 0 <= n < MOST for n in run)
        require(right and 1 <= run[2] <= page and (run[1] == 1 or (run[1] > 0 and run[2] == page)), f"{where}: {name}")
    require(all(type(n) is int and 0 < n < MOST for n in extents), f"{where}: {name}")
    count = sum(run[1] for run in runs)
    require(count == sum(extents) and (most is None or count <= most), f"{where}: number of {name}")
    return [Run(*run) for run in runs], extents


def _number(values: Mapping, key: str, where: str, low: int, high: int) -> int:
    value = values.get(key)
    require(type(value) is int and low <= value <= high, f"{where}: {key}={value!s:.40}")
    return value  # type: ignore[return-value]


def _keys(values: Mapping, keys: set[str], where: str) -> None:
    wrong = sorted(set(values) ^ keys)
    require(not wrong, f"{where}: {', '.join(wrong)[:60]}")


def _object(values: Mapping, key: str, keys: set[str]) -> dict:
    found = values.get(key)
    require(isinstance(found, dict), f"no {key}")
    assert isinstance(found, dict)
    _keys(found, keys, key)
    return found
