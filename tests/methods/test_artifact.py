"""Saved artifacts: what is loaded is what was saved, or an error that says what is wrong."""

import errno
import json

import pytest
import torch
from safetensors.torch import save_file

from kvshrink import CSKV, Artifact
from kvshrink.errors import ArtifactError
from kvshrink.methods.artifact import CONFIG, WEIGHTS
from kvshrink.store import files


@pytest.fixture
def artifact():
    layers = {i: {"key_up": torch.randn(1, 4, 16), "key_mean": torch.randn(1, 16)} for i in (0, 2)}
    method = CSKV(keep=0.25, bits=4, key_share="auto")
    return Artifact(method, layers, {"name": "m", "identity": "f"}, {"rows": [1, 2]})


@pytest.fixture
def folder(artifact, tmp_path):
    return artifact.save_pretrained(tmp_path / "artifact")


def test_round_trip(artifact, folder):
    back = Artifact.from_pretrained(folder)
    assert (back.method, back.model, back.provenance) == (artifact.method, artifact.model, artifact.provenance)
    for i, layer in artifact.layers.items():
        assert back.layers[i].keys() == layer.keys()
        assert all(torch.equal(back.layers[i][k], t) for k, t in layer.items())
    assert back.nbytes == artifact.nbytes == 2 * 4 * (4 * 16 + 16)


def _edit(folder, change):
    data = json.loads((folder / CONFIG).read_text())
    change(data)
    (folder / CONFIG).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(extra=1), "unknown keys.*extra"),
        (lambda d: d.pop("model"), "missing.*model"),
        (lambda d: d["settings"].update(keeep=0.3), "no setting 'keeep'"),
        (lambda d: d["settings"].update(keep=7), "keep=7"),
        (lambda d: d.update(method="nope"), "no method 'nope'"),
        (lambda d: d["layers"].pop("2"), "edited"),
    ],
)
def test_an_edited_description_is_refused(folder, change, reason):
    _edit(folder, change)
    with pytest.raises(ArtifactError, match=reason) as caught:
        Artifact.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_truncated_missing_and_foreign_files_are_refused(folder, tmp_path):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="cannot be read"):
        Artifact.from_pretrained(folder)
    save_file({"0.key_up": torch.zeros(1, 4, 16)}, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="sha256"):
        Artifact.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        Artifact.from_pretrained(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Artifact.from_pretrained(folder)
    with pytest.raises(ArtifactError, match="no artifact"):
        Artifact.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("failing", ["save_file", "fsync"])
def test_a_full_disk_leaves_the_old_artifact(artifact, folder, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full) if failing == "save_file" else monkeypatch.setattr("os.fsync", full)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = Artifact(CSKV(keep=0.5), artifact.layers)
    with pytest.raises(ArtifactError, match=r"No space left on device\. Free some space"):
        other.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(ArtifactError):
        other.save_pretrained(folder / "new")
    assert not list((folder / "new").iterdir())


def test_push_to_hub_uploads_both_files(artifact, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen["repo"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path):
            seen["files"] = sorted(p.name for p in __import__("pathlib").Path(folder_path).iterdir())
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert artifact.push_to_hub("me/it", private=True, token="t") == "https://hub/me/it"
    assert seen == {"token": "t", "repo": ("me/it", True), "files": sorted([CONFIG, WEIGHTS])}
