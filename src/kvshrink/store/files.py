"""Files written whole or not at all: safetensors and JSON, never pickle."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvshrink.errors import ArtifactError

Put = Callable[[Path], object]  # writes one file


def write_all(puts: Mapping[Path, Put]) -> None:
    """Write files that belong together: all to temporary names, then all renamed. On a failure the old ones stay.

    Raises ArtifactError when the disk is full or the folder cannot be written.
    """
    parts = {Path(p): Path(p).with_name(f".{Path(p).name}.{os.getpid()}.part") for p in puts}
    path = next(iter(parts))
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            puts[path](part)
            with part.open("rb+") as f:
                os.fsync(f.fileno())
        for path, part in parts.items():
            part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = _reason(error)
        raise ArtifactError(f"cannot write {path}: {reason}. Free some space or choose another folder.") from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def json_of(data: object) -> Put:
    text = json.dumps(data, indent=1) + "\n"
    return lambda part: part.write_text(text)


def tensors_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Put:
    """A safetensors file. Views are copied, so that a file never holds more than it shows."""
    plain = {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}
    return lambda part: save_file(plain, part, metadata=dict(metadata or {}))


def write_json(path: Path, data: object) -> None:
    write_all({Path(path): json_of(data)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    write_all({Path(path): tensors_of(tensors, metadata)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises ArtifactError if the file is missing, truncated or no safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist. Check the path, or save it first.")
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {_reason(error)}. It is truncated or edited; make it again."
        ) from error


def read_json(path: Path) -> dict:
    """A JSON object. Raises ArtifactError if the file is missing or does not hold one."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist. Check the path, or save it first.")
    try:
        data = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {_reason(error)}. It is truncated or edited; make it again."
        ) from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds a {type(data).__name__}, not an object. It is edited; make it again.")
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
