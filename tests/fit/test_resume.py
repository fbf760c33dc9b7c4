"""Checkpoints of a fit: what was damaged costs one layer, and only what a fit wrote is cleared away."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvshrink.fit.resume import Checkpoint, clear
from kvshrink.store import files

RESULTS = [({"up": torch.randn(2, 3), "kept": torch.arange(4)}, {"key_error": 0.5, "share": None})]


@pytest.fixture
def folder(tmp_path):
    Checkpoint(tmp_path / "fit", {"a": 1}).save(0, RESULTS)
    return tmp_path / "fit"


def load(folder):
    return Checkpoint(folder, {"a": 1}).load(0, 1)


def test_a_layer_is_read_as_it_was_saved(folder):
    (tensors, record), (wanted, about) = load(folder)[0], RESULTS[0]
    assert record == about
    assert all(torch.equal(tensors[k], t) for k, t in wanted.items())
    assert Checkpoint(folder, {"a": 2}).load(0, 1) is None


def test_no_bit_of_the_file_can_change_unseen(folder):
    (file,) = folder.iterdir()
    data = file.read_bytes()
    for at in range(0, len(data), 3):
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        found = load(folder)
        assert found is None or found[0][1] == RESULTS[0][1]
        assert found is None or all(torch.equal(found[0][0][k], t) for k, t in RESULTS[0][0].items())
    assert load(folder) is None


@pytest.mark.parametrize("field", ["job", "record", "sha256", None])
def test_a_checkpoint_without_a_part_costs_one_layer(folder, field):
    (file,) = folder.iterdir()
    about = {k: v for k, v in files.read_about(file).items() if field and k != field}
    save_file(load_file(file), file, about or None)
    assert load(folder) is None


def test_only_what_a_fit_wrote_is_cleared(folder, tmp_path):
    clear(folder)
    assert not folder.exists()
    clear(folder)  # it is gone
    Checkpoint(folder, {"a": 1}).save(3, RESULTS)
    (tmp_path / "mine").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "layer_001_0.safetensors").mkdir()
    (folder / "layer_002_0.safetensors").symlink_to(tmp_path / "mine")
    save_file({"a": torch.zeros(1)}, folder / "layer_004_0.safetensors")  # somebody's weights
    clear(folder)
    left = ["layer_001_0.safetensors", "layer_002_0.safetensors", "layer_004_0.safetensors", "notes.txt"]
    assert sorted(p.name for p in folder.iterdir()) == left
    assert (tmp_path / "mine").read_text() == "mine"


def test_nothing_is_cleared_through_a_link(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    clear(link)
    assert link.is_symlink()
    assert load(folder) is not None
    link.unlink()
    link.write_text("a file")
    clear(link)
    assert link.read_text() == "a file"
