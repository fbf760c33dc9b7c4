"""Files of tensors (safetensors, never pickle), JSON and text: written whole or not at all, read within bounds.

What is read must be an ordinary file of a size that we would have written: a pipe or a device could keep us waiting,
and a file of the wrong kind fill the memory.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvshrink.errors import ArtifactError
from kvshrink.store import reason
from kvshrink.store.atomic import Put, write_all
from kvshrink.store.parse import parsed

DESCRIPTION = 2**22  # bytes of a JSON file that describes something
TEXT = 2**30  # bytes of a text

__all__ = [
    *("Put", "json_of", "opened", "read_about", "read_json", "read_tensors", "read_text", "tensors_of"),
    *("write_all", "write_json", "write_tensors"),
]


def json_of(data: object) -> Put:
    text = json.dumps(data, indent=1) + "\n"
    return lambda part: part.write_text(text)


def tensors_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Put:
    """A safetensors file. Views are copied, so that a file never holds more than it shows."""
    plain = {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}

    def put(part: Path) -> None:
        try:
            save_file(plain, part, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise OSError(reason.number_of(error) or errno.EIO, reason.reason(error)) from error

    return put


def write_json(path: Path, data: object) -> None:
    write_all({Path(path): json_of(data)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    write_all({Path(path): tensors_of(tensors, metadata)})


@contextmanager
def opened(path: Path, most: int | None = None) -> Iterator[BinaryIO]:
    """An ordinary file of at most so many bytes. Raises OSError on anything else."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(fd, "rb") as f:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise OSError(errno.EISDIR, "it is a folder")
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, and may have {most}")
        yield f


def read_text(path: Path | str, most: int = TEXT) -> str:
    """A file of UTF-8 text. Raises OSError or ValueError."""
    with opened(Path(path), most) as f:
        return f.read().decode("utf-8")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises ArtifactError if the file is missing, truncated or no safetensors file."""
    path = Path(path)
    with _refusing(path):
        with opened(path):
            pass
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}


def read_about(path: Path) -> dict[str, str]:
    """A safetensors file's metadata alone. Raises ArtifactError as `read_tensors`."""
    with _refusing(path):
        with opened(path):
            pass
        with safe_open(path, framework="pt") as f:
            return f.metadata() or {}


def read_json(path: Path, most: int = DESCRIPTION, finite: bool = True) -> dict[str, Any]:
    """A JSON object. Raises ArtifactError if the file is missing, too large, or does not hold one.

    finite: whether NaN and infinite numbers are refused.
    """
    path = Path(path)
    with _refusing(path):
        with opened(path, most) as f:
            data = parsed(f.read(), most // 16, finite)
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds a {type(data).__name__}, not an object. It is edited; make it again.")
    return data


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Check the path, or save it first.") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {reason.reason(error)}. Check the path.") from error
    except Exception as error:  # whatever the readers say of a file that is not as they know it
        raise ArtifactError(
            f"{path} cannot be read: {reason.line(error)}. It is truncated or edited; make it again."
        ) from error
