"""README's Python runs, block by block, in an empty folder."""

import re
from functools import partial
from pathlib import Path

import pytest

import kvshrink
from kvshrink import data

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*some_text_like_yours")  # which is read without being closed, for brevity
def test_python_of_the_readme(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert blocks
    # what the reader brings along; and an allocation of bits that does not ask the whole model, which takes a minute
    (tmp_path / "some_text_like_yours.txt").write_text(data.path("calibration.txt").read_text(encoding="utf-8")[:5_000])
    monkeypatch.setattr(kvshrink, "Spectral", partial(kvshrink.Spectral, allocation="energy"))
    names = {"prompt": data.path("heldout.txt").read_text(encoding="utf-8")[:2000]}
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert capsys.readouterr().out.strip()
