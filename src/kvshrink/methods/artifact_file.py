"""A fitted artifact on disk: two files that change as one, read only as they were written.

`kvshrink.json` has a digest of itself and of all tensors. New weights are first written under a name of their own,
`kvshrink-<digest>.safetensors`; then the description that asks for them takes its place; then they take theirs. Killed
at any point, the folder holds the old artifact or the new one, whole.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvshrink.errors import ArtifactError
from kvshrink.methods import build
from kvshrink.methods._roles import Fitted, Method
from kvshrink.store import files
from kvshrink.store.atomic import refusing, staged, sync_names
from kvshrink.store.digest import digest
from kvshrink.store.lock import locked
from kvshrink.store.reason import line

VERSION = 4
CONFIG, WEIGHTS = "kvshrink.json", "kvshrink.safetensors"
KEYS = {"version", "method", "settings", "layers", "model", "provenance", "sha256"}
SPARE = re.compile(r"kvshrink-[0-9a-f]{16}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Content:
    """What the two files hold, as plain values and tensors."""

    method: str
    settings: dict[str, Any]
    layers: Mapping[int, Fitted]
    model: dict[str, Any]
    provenance: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{k}": t for i, layer in self.layers.items() for k, t in layer.items()}


def write(folder: Path, content: Content) -> None:
    """Write both files; a failed or killed write leaves what was there, or all that is new."""
    tensors = content.tensors()
    description = {
        "version": VERSION,
        "method": content.method,
        "settings": content.settings,
        "layers": {str(i): {k: list(t.shape) for k, t in layer.items()} for i, layer in content.layers.items()},
        "model": content.model,
        "provenance": _finite(content.provenance),
    }
    sha256 = digest(description, tensors)
    config, weights = folder / CONFIG, folder / WEIGHTS
    puts = {weights: files.tensors_of(tensors), config: files.json_of({**description, "sha256": sha256})}
    with refusing(puts), staged(puts) as parts:
        spare = folder / _spare(sha256)
        parts[weights].replace(spare)
        sync_names(folder)
        parts[config].replace(config)
        sync_names(folder)
        spare.replace(weights)
        for other in folder.iterdir():  # of a write that was killed
            if SPARE.fullmatch(other.name) and other.is_file() and not other.is_symlink():
                other.unlink()


def read(folder: Path) -> tuple[Method, dict[int, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """(method, layers, model, provenance). Raises ArtifactError on anything that was not written so."""
    try:
        return _read(folder)
    except ArtifactError as error:  # perhaps it is being written just now, so once more while nobody may
        try:
            with locked(folder):
                return _read(folder)
        except OSError:
            raise error from None


def _read(folder: Path) -> tuple[Method, dict[int, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    data = files.read_json(folder / CONFIG)
    method, tensors = _described(data, folder / CONFIG), _weights(folder, data)
    return method, _layers(tensors, data, folder / CONFIG), data["model"], data["provenance"]


def _spare(sha256: str) -> str:
    return f"kvshrink-{sha256[:16]}.safetensors"


def _described(data: dict[str, Any], path: Path) -> Method:
    """The method, after everything but the tensors was looked at."""
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise ArtifactError(f"{path} has format version {version!s:.20}, this kvshrink reads {VERSION}. Fit again.")
    if extra := sorted(set(data) ^ KEYS):
        raise ArtifactError(f"{path} has missing or unknown keys {extra!s:.80}. It is edited or of another program.")
    for key, kind in (("method", str), ("settings", dict), ("layers", dict), ("model", dict), ("provenance", dict)):
        _require(isinstance(data[key], kind), path, f"{key} is no {kind.__name__}.")
    _require(isinstance(data["sha256"], str) and SHA256.fullmatch(data["sha256"]) is not None, path, "sha256.")
    _require(isinstance(data["model"].get("name", ""), str), path, "the model's name is no text.")
    records = data["provenance"].get("layers", {})
    alike = isinstance(records, dict) and all(isinstance(r, dict) for r in records.values())
    _require(alike and all(_share(r.get("key_share")) for r in records.values()), path, "provenance of layers.")
    for index, shapes in data["layers"].items():
        _require(index.isdecimal() and index == str(int(index)), path, f"layer {index!r:.20}.")
        _require(isinstance(shapes, dict), path, f"layer {index} is no object.")
    try:
        return build(data["method"], data["settings"])
    except Exception as error:  # settings of any type meet checks that expect another one
        raise ArtifactError(f"{path} is edited: {line(error)}. Fit again.") from error


def _share(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value <= 1)


def _weights(folder: Path, data: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that the description is about, as tensors of their own, which no later change of the file reaches."""
    plain = {k: v for k, v in data.items() if k != "sha256"}
    for path in (folder / _spare(data["sha256"]), folder / WEIGHTS):
        if path.name == WEIGHTS or path.is_file():
            tensors, _ = files.read_tensors(path)
            if digest(plain, tensors) == data["sha256"]:
                return {k: t.clone() for k, t in tensors.items()}
    raise ArtifactError(
        f"{folder / WEIGHTS} does not belong to {CONFIG} beside it, or one was changed (sha256 differs). Fit again."
    )


def _layers(tensors: Mapping[str, Tensor], data: dict[str, Any], path: Path) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {int(i): {} for i in data["layers"]}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        _require(index in data["layers"] and bool(name), path, f"no layer for {key!r:.60}.")
        _require(not tensor.is_floating_point() or bool(tensor.float().isfinite().all()), path, f"{key:.60} has NaN.")
        layers[int(index)][name] = tensor
    shapes = {str(i): {k: list(t.shape) for k, t in layer.items()} for i, layer in layers.items()}
    _require(shapes == data["layers"], path, "layers are not those of its tensors.")
    return layers


def _require(ok: bool, path: Path, what: str) -> None:
    if not ok:
        raise ArtifactError(f"{path} is edited: {what} Fit again.")


def _finite(values: Any) -> Any:
    """Plain values with None for numbers that JSON does not have: a layer that never varied has no error."""
    if isinstance(values, dict):
        return {k: _finite(v) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(v) for v in values]
    return None if isinstance(values, float) and not abs(values) < float("inf") else values
