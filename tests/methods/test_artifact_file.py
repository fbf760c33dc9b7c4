"""An artifact's two files: they change as one, and no change of either goes unseen or passes for what it is not."""

import json
import multiprocessing as mp
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvshrink
from kvshrink import CSKV, RTN, Artifact
from kvshrink.attach.families import shape_of
from kvshrink.attach.identity import identity_of
from kvshrink.errors import ArtifactError
from kvshrink.methods.artifact_file import CONFIG, WEIGHTS
from kvshrink.store.digest import digest
from tests.cache.build import bases
from tests.scenarios.families import Family


def artifact(seed: int) -> Artifact:
    layers = {i: {"key_up": torch.full((1, 4, 16), float(seed)), "key_mean": torch.zeros(1, 16)} for i in (0, 2)}
    return Artifact(CSKV(keep=0.25, bits=4), layers, {"name": "m"}, {"seed": seed})


def is_of(folder: Path, seed: int) -> bool:
    back = Artifact.from_pretrained(folder)
    return back.provenance == {"seed": seed} and float(back.layers[2]["key_up"][0, 0, 0]) == seed


def killed_at(step: int, folder: Path) -> int:
    """Save artifact 2 in a process that is killed before its n-th rename; the exit code."""

    def run() -> None:
        replace, done = Path.replace, []

        def counted(self, target):
            done.append(self)
            if len(done) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = counted
        artifact(2).save_pretrained(folder)

    child = mp.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.mark.parametrize(("step", "seed"), [(1, 1), (2, 1), (3, 2)])
def test_a_kill_at_any_point_leaves_the_old_artifact_or_the_new_one(tmp_path, step, seed):
    artifact(1).save_pretrained(tmp_path)
    assert killed_at(step, tmp_path) == -signal.SIGKILL
    assert is_of(tmp_path, seed)
    artifact(3).save_pretrained(tmp_path)
    assert is_of(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_who_reads_while_others_write_gets_one_of_theirs(tmp_path):
    artifact(0).save_pretrained(tmp_path)
    failed: list = []

    def write(seed: int) -> None:
        try:
            for _ in range(10):
                artifact(seed).save_pretrained(tmp_path)
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(n,)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seed = Artifact.from_pretrained(tmp_path).provenance["seed"]
        assert seed in (0, 1, 2)
    assert not failed


def test_an_artifact_without_tensors_is_read_back(tmp_path):
    assert Artifact.from_pretrained(Artifact(RTN(bits=3), {}).save_pretrained(tmp_path)).method == RTN(bits=3)


def edit(folder: Path, change, rightly: bool) -> None:
    """Change the description or the tensors, with a digest that fits or not."""
    data, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(data, tensors)
    save_file(tensors, folder / WEIGHTS)
    if rightly:
        data["sha256"] = digest({k: v for k, v in data.items() if k != "sha256"}, tensors)
    (folder / CONFIG).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda d, t: d["settings"].update(keep=0.9),
        lambda d, t: d["settings"].update(bits=2),
        lambda d, t: d["settings"].update(codec="turboquant"),
        lambda d, t: d["provenance"].update(seed=5),
        lambda d, t: d["model"].update(name="other"),
        lambda d, t: t.update({"0.key_up": t["2.key_up"] + 1}),
    ],
)
def test_what_was_changed_is_seen(tmp_path, change):
    artifact(1).save_pretrained(tmp_path)
    edit(tmp_path, lambda d, t: d.update(layers=dict(reversed(d["layers"].items()))), False)
    assert is_of(tmp_path, 1), "another order of keys is no change"
    edit(tmp_path, change, False)
    with pytest.raises(ArtifactError, match=r"^[^\n]+sha256[^\n]+$"):
        Artifact.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d, t: d.update(version=True),
        lambda d, t: d.update(version=2.0),
        lambda d, t: d.update(model=[]),
        lambda d, t: d.update(model=None),
        lambda d, t: d.update(provenance="x"),
        lambda d, t: d["provenance"].update(layers=[1]),
        lambda d, t: d["provenance"].update(layers={"0": {"key_share": "x"}}),
        lambda d, t: d.update(layers=[0, 2]),
        lambda d, t: d.update(layers="02"),
        lambda d, t: d["layers"].update({"-1": {}}),
        lambda d, t: d["layers"].update({"00": {}}),
        lambda d, t: d["layers"].update({"0": [1]}),
        lambda d, t: d["layers"]["0"].update(key_up=[1, 4, 17]),
        lambda d, t: d["settings"].update(bits=[4]),
        lambda d, t: d["settings"].update(window=10**9),
        lambda d, t: d["settings"].update(sinks=10**9),
        lambda d, t: d.update(settings=[1]),
        lambda d, t: d.update(method=["cskv"]),
        lambda d, t: t.update({"0.key_up": torch.full((1, 4, 16), float("nan"))}),
        lambda d, t: t.update({"key_up": t.pop("0.key_up")}),
        lambda d, t: t.update({"7.key_up": t["0.key_up"].clone()}),
    ],
)
def test_what_no_fit_writes_is_refused_whatever_its_digest(tmp_path, change):
    artifact(1).save_pretrained(tmp_path)
    edit(tmp_path, change, True)
    with pytest.raises(ArtifactError, match=r"^[^\n]+$"):
        Artifact.from_pretrained(tmp_path)


def test_a_key_that_comes_twice_is_refused(tmp_path):
    artifact(1).save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace("{", '{"method": "rtn", ', 1))
    with pytest.raises(ArtifactError, match="the key 'method' comes twice"):
        Artifact.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def model():
    return Family("Llama").build()


def of(model, change) -> Artifact:
    """An artifact of random bases with a change to each layer's tensors."""
    layers = {i: bases(shape_of(kvshrink.attach(model).layers[i]), 8, 8) for i in range(2)}
    for tensors in layers.values():
        change(tensors)
    return Artifact(CSKV(keep=0.5, bits=4), layers, {"name": "m", "identity": identity_of(model).to_dict()})


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(key_up=t["key_up"][:, :, :-1]),
        lambda t: t.update(key_up=t["key_up"].double()),
        lambda t: t.update(key_up=t["key_up"].long()),
        lambda t: t.update(key_up=t["key_up"][0]),
        lambda t: t.update(key_mean=t["key_mean"][:, :3]),
        lambda t: t.update(value_up=t["value_up"][:, :0]),
        lambda t: t.update(key_up=t["key_up"][:0]),
        lambda t: t.pop("value_mean"),
        lambda t: t.update(unknown=torch.zeros(3)),
    ],
)
def test_tensors_of_another_kind_are_refused_when_a_cache_is_made(model, change):
    kvshrink.make_cache(model, of(model, lambda t: None))
    with pytest.raises(ArtifactError, match=r"^[^\n]*the artifact[^\n]+\. Fit [^\n]+\.$"):
        kvshrink.make_cache(model, of(model, change))


def test_a_name_that_is_no_hub_id_is_refused_in_one_line():
    for name in ("a\0b", "x" * 300, "../../etc", "a b", "", "/", "a/b/c", "\ud800"):
        with pytest.raises(ArtifactError, match=r"^[^\n]+$"):
            Artifact.from_pretrained(name)
