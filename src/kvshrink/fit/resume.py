"""Finished layers of an interrupted fit, so that it goes on where it stopped."""

import hashlib
import json
import shutil
from pathlib import Path

from torch import Tensor

from kvshrink.errors import ArtifactError
from kvshrink.store import files


class Checkpoint:
    """A folder with a file per finished layer and method, valid for one job: methods, model and calibration rows."""

    def __init__(self, folder: str | Path | None, job: dict) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def load(self, layer: int, methods: int) -> list[tuple[dict[str, Tensor], dict]] | None:
        """(tensors, record) per method of a layer that this job has finished before, or None."""
        results = []
        for n in range(methods):
            file = self._file(layer, n)
            if file is None or not file.is_file():
                return None
            try:
                tensors, metadata = files.read_tensors(file)
            except ArtifactError:
                return None  # a damaged checkpoint costs one layer, not the fit
            if metadata.get("job") != self.key:
                return None
            results.append((tensors, json.loads(metadata["record"])))
        return results

    def save(self, layer: int, results: list[tuple[dict[str, Tensor], dict]]) -> None:
        for n, (tensors, record) in enumerate(results):
            file = self._file(layer, n)
            if file is not None:
                files.write_tensors(file, tensors, {"job": self.key, "record": json.dumps(record)})

    def _file(self, layer: int, method: int) -> Path | None:
        return None if self.folder is None else self.folder / f"layer_{layer:03d}_{method}.safetensors"


def clear(folder: str | Path) -> None:
    """Delete a checkpoint whose artifact is saved."""
    if Path(folder).is_dir():
        shutil.rmtree(folder)
