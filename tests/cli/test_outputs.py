"""What a command writes: looked at before the work, its own, in a folder of one run, under the name that is printed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvshrink
from kvshrink import cli
from kvshrink.cli import _outputs
from tests.fuzz import world

FIT = ["fit", "--length", 128, "--method", "cskv:keep=0.5,window=16"]


@pytest.fixture
def fit(place):
    return [*FIT, "--model", place / "M", "--text", place / "T" / "good.txt"]


def test_a_fit_goes_on_in_its_folder_and_refuses_anothers(run, refused, fit, place):
    assert run(*fit, "--out", "a")[0] == 0
    before = world.snapshot(Path("a"))
    line = refused(*fit[:4], "cskv:keep=0.25,window=16", *fit[5:], "--out", "a")
    assert "a holds what was made with other settings: settings" in line
    assert "'keep': 0.5" in line
    assert "length 128, now 64. Choose another folder" in refused(*fit, "--out", "a", "--length", 64)
    assert "text" in refused(*fit[:-1], place / "T" / "long.txt", "--out", "a")
    assert "command 'fit', now 'eval'" in refused("eval", "--model", place / "M", "--method", "rtn", "--out", "a")
    assert world.snapshot(Path("a")) == before
    assert run(*fit, "--out", "a")[0] == 0


def test_a_fit_that_ends_before_it_has_anything_leaves_the_folder_as_it_was(run, refused, fit):
    slip = [*fit[:4], "cskv:keep=0.5,bits=4,group_heads=7", *fit[5:]]
    refused(*slip, "--out", "a/b")
    assert not Path("a/b").exists()
    Path("a/b").mkdir()
    refused(*slip, "--out", "a/b")
    assert list(Path("a/b").iterdir()) == []
    assert run(*fit, "--out", "a/b")[0] == 0


def test_files_of_the_user_are_left_alone(run, refused, fit):
    for name in ("kvshrink.json", "results.json", "accuracy.png"):
        Path("mine").mkdir(exist_ok=True)
        (Path("mine") / name).write_text("mine")
    assert "has kvshrink.json, which no run with a record made" in refused(*fit, "--out", "mine")
    assert "has results.json" in refused("eval", "--model", fit[6], "--method", "rtn", "--out", "mine")
    assert {p.read_text() for p in Path("mine").iterdir()} == {"mine"}
    Path("a/.unfinished").mkdir(parents=True)
    Path("a/.unfinished/letter.txt").write_text("mine")
    assert run(*fit, "--out", "a")[0] == 0
    assert Path("a/.unfinished/letter.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".kvshrink-run.json", ".unfinished", "kvshrink.json"])
def test_nothing_is_written_through_a_link(refused, fit, name):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("mine")
    Path("a").mkdir()
    (Path("a") / name).symlink_to(Path("mine" if name == ".unfinished" else "mine/letter.txt").resolve())
    assert f"{name} is a link" in refused(*fit, "--out", "a")
    assert world.snapshot(Path("mine")).keys() == {"letter.txt"}
    assert Path("mine/letter.txt").read_text() == "mine"


def test_two_runs_do_not_share_a_folder(run, refused, fit):
    with _outputs.run_folder(Path("a"), {"command": "other"}, ["x"]):
        assert "another run works in a now" in refused(*fit, "--out", "a")
    assert run(*fit, "--out", "a")[0] == 0, "a run that made nothing has left the folder"


def test_a_damaged_record_is_no_licence(refused, fit):
    Path("a").mkdir()
    for text in ("{", "[" * 100_000, "3", "null"):
        (Path("a") / _outputs.RECORD).write_text(text)
        assert "is damaged" in refused(*fit, "--out", "a")


BAD = ["x" * 300, "file", "file/x", "/proc/kvshrink", "/dev/null"]


@pytest.mark.parametrize("out", BAD)
def test_folders_that_cannot_be_written_are_refused_before_the_work(refused, fit, place, monkeypatch, out):
    Path("file").write_text("mine")
    for module in ("fit", "evaluate", "demo", "suite"):
        monkeypatch.setattr(f"kvshrink.cli.{module}.load", None)
    monkeypatch.setattr("kvshrink.cli.fit.fit_all", None)
    assert "cannot write" in refused(*fit, "--out", out)
    assert "cannot write" in refused("demo", "--out", out)
    for command in ("eval --method rtn", "eval suite --methods rtn"):
        assert "cannot write" in refused(*command.split(), "--model", place / "M", "--out", out)
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("out", [*BAD, "folder", "link", ""])
def test_files_that_cannot_be_written_are_refused_before_the_work(refused, place, monkeypatch, out):
    Path("file").write_text("mine")
    Path("folder").mkdir()
    Path("link").symlink_to("file")
    monkeypatch.setattr("kvshrink.cli.plan.load", None)
    plan = ["plan", "--model", place / "M", "--byte-ratio", 0.4]
    if out != "file":
        assert out[:9] in refused(*plan, "--out", out)
    ending = out if out in ("", "folder", "link", "/dev/null") else f"{out}.png"
    if out != "file":
        assert "cannot write" in refused(*plan, "--picture", ending) or out == "link"
        assert "cannot write" in refused("inspect", "--model", place / "M", "--out", ending) or out == "link"
    assert Path("file").read_text() == "mine"
    assert Path("link").is_symlink()


def test_a_picture_is_written_under_the_name_that_is_printed_or_refused(run, refused, place):
    model = ("--model", place / "M")
    Path("folder.png").mkdir()
    Path("link.png").symlink_to(place / "T" / "good.txt")
    for name in ("name", "folder.png", "link.png", "name.txt", ".png", "."):
        assert name in refused("inspect", *model, "--out", name)
    made = ["a.png", "a.svg", "A.PDF", "[b] :smile: $x_$.png", "new/c.png"]
    for name in made:
        code, out, _ = run("inspect", *model, "--out", name)
        assert (code, out.splitlines()[-1]) == (0, f"wrote {name}")
        assert Path(name).stat().st_size > 1000
    assert sorted(str(p) for p in Path(".").rglob("*") if p.is_file() and not p.is_symlink()) == sorted(made)


def test_a_plan_is_not_written_over_another_nor_over_a_file(run, refused, place):
    plan = ["plan", "--model", place / "M", "--text", place / "T" / "good.txt", "--length", 256, "--tokens", 300]
    plan += ["--trials", 1, "--methods", "rtn", "--out", "p.json", "--work", "w", "--json"]
    code, out, _ = run(*plan, "--byte-ratio", 0.4)
    assert (code, type(json.loads(out.splitlines()[-1]))) == (0, dict)
    before = Path("p.json").read_bytes()
    assert "'byte_ratio': 0.4" in refused(*plan, "--byte-ratio", 0.5)
    assert "trials 1, now 2" in refused(*plan, "--byte-ratio", 0.4, "--trials", 2)
    assert run(*plan, "--byte-ratio", 0.4)[0] == 0
    assert Path("p.json").read_bytes() == before
    Path("p.json").write_text("mine")
    assert "is there and no plan" in refused(*plan, "--byte-ratio", 0.4)
    assert Path("p.json").read_text() == "mine"


def test_eval_goes_on_with_the_same_settings_only(run, refused, place):
    args = [
        "eval",
        "--model",
        place / "M",
        "--task",
        "copy",
        "--tokens",
        150,
        "--method",
        "rtn",
        "--out",
        "e",
        "--json",
    ]
    code, out, _ = run(*args, "--cases", 1)
    assert code == 0
    assert run(*args, "--cases", 1)[1].splitlines()[-1] == out.splitlines()[-1]
    before = world.snapshot(Path("e"))
    assert "cases 1, now 2" in refused(*args, "--cases", 2)
    assert "seed 0, now 5" in refused(*args, "--cases", 1, "--seed", 5)
    assert world.snapshot(Path("e")) == before


def test_a_stdout_that_is_closed_or_narrow(run, refused, place, monkeypatch):
    model = ("--model", place / "M")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        patch.setattr("sys.argv", ["kvshrink", "inspect", *map(str, model)])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
    assert not Path("spectra.png").exists()
    with monkeypatch.context() as patch:
        narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
        patch.setattr("sys.stdout", narrow)
        assert run("inspect", *model, "--out", "\u00e9.png")[0] == 0
        assert narrow.buffer.getvalue().endswith(b"wrote \\xe9.png\n")


STREAMS = {
    "> /dev/full": "standard output: No space left on device.",
    "| head -c 1": "was closed before all was written.",
}


def test_a_stdout_that_is_full_or_ends_early(tmp_path):
    """At once, since most of the time is spent on importing torch."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(kvshrink.__file__).parents[1])}
    lines = [f"set -o pipefail; {sys.executable} -m kvshrink.cli fit --help {end}" for end in STREAMS]
    runs = [
        subprocess.Popen(["bash", "-c", line], cwd=tmp_path, env=env, stdout=-1, stderr=-1, text=True) for line in lines
    ]
    for process, reason in zip(runs, STREAMS.values(), strict=True):
        _, err = process.communicate(timeout=240)
        assert (process.returncode, err.count("\n")) == (2, 1), err
        assert err.endswith(f"{reason}\n")
