"""What a command must know before its work, or must not lose after it."""

import importlib.util
import json
import os
import sys
import threading

import pytest

from kvshrink import data
from tests.probes import small_probe

TEXT = ("--length", 128)


@pytest.mark.parametrize("method", ["zipcache", "mikv", "edgeqat"])
@small_probe()
def test_a_plan_of_a_method_that_ranks_tokens_comes_to_its_end(run, place, tmp_path, method):
    args = ("plan", "--model", place / "M", "--methods", method, "--byte-ratio", 0.9, "--tokens", 300, "--trials", 1)
    code, _, err = run(*args, *TEXT, "--out", "p.json")
    assert code == 0, err
    assert json.loads((tmp_path / "p.json").read_text())["method"] == method


def test_a_plan_and_its_picture_are_two_files(refused, place):
    args = ("plan", "--model", place / "M", "--byte-ratio", 0.5, "--out", "p.png", "--picture", "./p.png")
    assert "are one file" in refused(*args)


@pytest.mark.parametrize(
    ("command", "mine"),
    [
        (("eval", "suite", "--methods", "rtn"), "accuracy.png"),
        (("eval", "suite", "--methods", "rtn"), "kl-agnostic.svg"),
    ],
)
def test_a_picture_of_the_users_is_not_replaced(refused, place, tmp_path, command, mine):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / mine).write_text("mine")
    assert f"has {mine}, which no run with a record made" in refused(*command, "--model", place / "M", "--out", "out")
    assert (tmp_path / "out" / mine).read_text() == "mine"


def test_conversations_beyond_the_context_are_refused(refused, place):
    args = ("eval", "--model", place / "M", "--task", "scbench_like:kind=mf", "--mode", "multi_turn", "--cases", 1)
    assert "the longest conversation) are more than the model's context of 512" in refused(
        *args, "--method", "rtn", "--tokens", 500
    )


def test_an_artifact_is_inspected_with_its_own_model_only(run, refused, place):
    spec = ("--method", "leank:keep=0.5,window=16")
    code, _, err = run("fit", "--model", place / "M", *spec, *TEXT, "--out", "L")
    assert code == 0, err
    code, out, err = run("inspect", "--model", place / "M", "--artifact", "L", "--json")
    assert code == 0, err
    assert len(json.loads(out.splitlines()[-1])["layers"]) == 2
    assert "was fitted on" in refused("inspect", "--model", "reference", "--artifact", "L", "--out", "other.png")


def test_a_tracker_that_is_not_installed_is_refused(refused, place, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trackio" else found(name, *a))
    args = ("fit", "--model", place / "M", "--method", "cskv:keep=0.5,steps=2", *TEXT, "--out", "a")
    assert "pip install trackio" in refused(*args, "--log-with", "trackio")


@pytest.mark.parametrize("command", [("eval", "suite", "--methods", "rtn"), ("demo",)])
def test_what_draws_is_looked_for_before_the_work(refused, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "plots need matplotlib" in refused(*command, "--out", "out")


def test_a_quantised_model_on_disk_is_refused(refused, place, tmp_path):
    config = json.loads((place / "M" / "config.json").read_text())
    (tmp_path / "Q").mkdir()
    for file in (place / "M").iterdir():
        (tmp_path / "Q" / file.name).write_bytes(file.read_bytes())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "Q" / "config.json").write_text(json.dumps(config))
    for args in (("fit", "--method", "cskv:keep=0.5", *TEXT, "--out", "a"), ("inspect", "--method", "rtn")):
        assert "are quantised" in refused(*args, "--model", tmp_path / "Q")


def test_trajectories_are_shown(run, place):
    args = ("eval", "perplexity", "--model", place / "M", "--method", "rtn:bits=4", "--prefix", 128, "--scored", 8)
    code, out, err = run(*args, "--documents", 1, "--trajectory", 4)
    assert code == 0, err
    assert "of 4 tokens in common" in " ".join(out.split())


def test_a_record_of_other_bytes_is_damaged(refused, place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".kvshrink-run.json").write_bytes(b"\xff\xfe")
    args = ("fit", "--model", place / "M", "--method", "cskv:keep=0.5", *TEXT, "--out", "out")
    assert "is damaged" in refused(*args)


def test_text_from_a_pipe_is_read_once(run, place):
    reading, writing = os.pipe()
    text = data.path("heldout.txt").read_bytes()[:20_000]
    writer = threading.Thread(target=lambda: os.close(writing) if os.write(writing, text) else None)
    writer.start()
    args = ("eval", "perplexity", "--model", place / "M", "--method", "rtn:bits=4", "--prefix", 64, "--scored", 8)
    code, _, err = run(*args, "--documents", 1, "--on", f"/dev/fd/{reading}")
    writer.join()
    assert code == 0, err
