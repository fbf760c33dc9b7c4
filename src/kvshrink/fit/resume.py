"""Finished layers of an interrupted fit, so that it goes on where it stopped."""

import json
import re
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from kvshrink.errors import ArtifactError
from kvshrink.store import files
from kvshrink.store.digest import digest
from kvshrink.store.parse import parsed

NAME = re.compile(r"layer_\d{3,}_\d+\.safetensors")
KEYS = {"job", "record", "sha256"}

Result = tuple[dict[str, Tensor], dict]  # tensors of a layer, record of its fit


class Checkpoint:
    """A folder with a file per finished layer and method, valid for one job: methods, model and calibration rows."""

    def __init__(self, folder: str | Path | None, job: dict) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key = digest(json.dumps(job, sort_keys=True, default=str))[:16]

    def load(self, layer: int, methods: int) -> list[Result] | None:
        """(tensors, record) per method of a layer that this job has finished before, or None: a checkpoint
        that is damaged costs one layer, not the fit."""
        results = []
        for n in range(methods):
            file = self._file(layer, n)
            found = None if file is None or not file.is_file() else _read(file, self.key)
            if found is None:
                return None
            results.append(found)
        return results

    def save(self, layer: int, results: list[Result]) -> None:
        for n, (tensors, record) in enumerate(results):
            file = self._file(layer, n)
            if file is not None:
                about = {"job": self.key, "record": json.dumps(record)}
                files.write_tensors(file, tensors, about | {"sha256": digest(about, tensors)})

    def _file(self, layer: int, method: int) -> Path | None:
        return None if self.folder is None else self.folder / f"layer_{layer:03d}_{method}.safetensors"


def _read(file: Path, job: str) -> Result | None:
    try:
        tensors, about = files.read_tensors(file)
    except ArtifactError:
        return None
    sha256 = about.pop("sha256", None)
    if about.get("job") != job or sha256 != digest(about, tensors):
        return None
    try:
        record = parsed(about.get("record", ""), finite=False)
    except ValueError:
        return None
    if not isinstance(record, dict) or not all(bool(t.float().isfinite().all()) for t in tensors.values()):
        return None
    return {k: t.clone() for k, t in tensors.items()}, record


def clear(folder: str | Path) -> None:
    """Delete the layers of a checkpoint whose artifact is saved, and the folder if nothing else is in it.

    Only files that a fit wrote: others stay, and what lies behind a link is not looked at.
    """
    folder = Path(folder)
    if folder.is_symlink() or not folder.is_dir():
        return
    for file in folder.iterdir():
        if NAME.fullmatch(file.name) and file.is_file() and not file.is_symlink() and _is_ours(file):
            file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _is_ours(file: Path) -> bool:
    try:
        return set(files.read_about(file)) == KEYS
    except ArtifactError:
        return False
