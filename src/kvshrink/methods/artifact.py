"""What `fit` makes and a cache is built from: a method, its tensors per layer, and where they came from.

On disk: `kvshrink.json` (format version, method and settings, layers, model, provenance of the calibration text) and
`kvshrink.safetensors`. No pickle. Unknown keys, another version or another model are refused.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvshrink.errors import ArtifactError, SettingError
from kvshrink.methods import artifact_file, name_of
from kvshrink.methods._roles import Fitted, Method
from kvshrink.methods.artifact_file import CONFIG, WEIGHTS, Content

LOOKED_AT = ("_spectrum", "_errors", "_centre")  # endings of tensors that no codec reads


@dataclass(frozen=True, eq=False)
class Artifact:
    """A fitted method. `layers` maps a layer's index to its tensors; layers that stay as they are have no entry.

    model: {"name", "identity"} of the model it was fitted on.
    provenance: calibration text hash, tokens, seconds, versions.
    """

    method: Method
    layers: Mapping[int, Fitted]
    model: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the fitted tensors that a cache reads: held once per model, not per sequence."""
        return sum(t.nbytes for x in self.layers.values() for k, t in x.items() if not k.endswith(LOOKED_AT))

    @property
    def apart(self) -> str | None:
        """`Method.apart` of any layer."""
        layers = list(self.layers.values()) or [{}]
        return next((why for fitted in layers if (why := self.method.apart(fitted))), None)

    def at(self, keep: float) -> "Artifact":
        """The artifact of a lower `keep`, from the leading components of this one: nothing is fitted again.

        Exactly what a fit at that keep gives for a closed form; after training only with matryoshka=True, which trains
        for it. key_share="auto" stays as it was chosen at the higher keep. Raises SettingError on anything else.
        """
        lower = self.method.at_ratio(keep)
        if lower is None:
            raise SettingError(
                f"{name_of(self.method)} has no components to leave out. Fit it again with other settings."
            )
        layers, records = {}, dict(self.provenance.get("layers", {}))
        for i, fitted in self.layers.items():
            record = dict(records.get(str(i), {}))
            layers[i] = lower.cut(fitted, record)
            errors = {
                f"{s}_error": float(e[-1]) for s in ("key", "value") if (e := layers[i].get(f"{s}_errors")) is not None
            }
            records[str(i)] = record | errors
        provenance = self.provenance | {
            "cut_from": self.method.settings()[str(lower.budget_setting)],
            "layers": records,
        }
        return Artifact(lower, layers, dict(self.model), provenance)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the artifact to a folder. A failed save leaves what was there."""
        artifact_file.write(
            Path(folder),
            Content(name_of(self.method), self.method.settings(), self.layers, self.model, self.provenance),
        )
        return Path(folder)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Artifact":
        """From a local folder or a hub id. Raises ArtifactError if anything in it is not as it was written."""
        folder = Path(name)
        if not os.path.isdir(folder):
            folder = _download(str(name))
        return cls(*artifact_file.read(folder))

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Upload the artifact to a hub repository, which is made if need be. Returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def _download(name: str) -> Path:
    """A hub artifact in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's own errors, and what it says of a name that is none
        raise ArtifactError(
            f"no artifact {name!r:.200}: no such folder, and the hub did not give one. Check the path."
        ) from error
