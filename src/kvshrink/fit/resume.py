"""Finished layers of an interrupted fit, so that it goes on where it stopped."""

import hashlib
import json
import shutil
from pathlib import Path

from torch import Tensor

from kvshrink.errors import ArtifactError
from kvshrink.store import files


class Checkpoint:
    """A folder with one file per finished layer, valid for one job: method, model and calibration rows."""

    def __init__(self, folder: str | Path | None, job: dict) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def load(self, layer: int) -> tuple[dict[str, Tensor], dict] | None:
        """(tensors, record) of a layer that this very job has finished before, or None."""
        if self.folder is None or not self._file(layer).is_file():
            return None
        try:
            tensors, metadata = files.read_tensors(self._file(layer))
        except ArtifactError:
            return None  # a damaged checkpoint costs one layer, not the fit
        return (tensors, json.loads(metadata["record"])) if metadata.get("job") == self.key else None

    def save(self, layer: int, tensors: dict[str, Tensor], record: dict) -> None:
        if self.folder is not None:
            files.write_tensors(self._file(layer), tensors, {"job": self.key, "record": json.dumps(record)})

    def clear(self) -> None:
        """Delete the checkpoint; the artifact is saved."""
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _file(self, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"layer_{layer:03d}.safetensors"
