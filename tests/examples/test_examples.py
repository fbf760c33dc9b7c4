"""Every example runs, and is short."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path, capsys):
    assert len(path.read_text().splitlines()) <= 35
    runpy.run_path(str(path))
    assert capsys.readouterr().out.strip()
