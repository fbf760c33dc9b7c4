"""A model of two layers, broken ones, texts of all kinds, and the program called as the shell would."""

import os
import sys
from pathlib import Path

import pytest

from kvshrink import cli
from tests.fuzz import world


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """M: the model; B: broken ones; T: texts. Nothing in it may be changed."""
    root = tmp_path_factory.mktemp("world")
    world.model(root / "M")
    (root / "B").mkdir()
    world.broken_models(root / "M", root / "B")
    world.texts(root / "T")
    return root


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the program in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["kvshrink", *(os.fspath(a) if isinstance(a, Path) else str(a) for a in args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def refused(run):
    """Call the program and expect exit 2 with one line, bars of progress aside: the line."""

    def call(*args):
        code, _, err = run(*args)
        lines = [x for x in err.split("\n") if x.strip() and "\r" not in x]
        assert (code, len(lines)) == (2, 1), err
        assert lines[0].startswith("kvshrink: ")
        assert "this is a bug" not in lines[0]
        return lines[0]

    return call
