"""The page of the CSKV paper's ablations in docs/ is what the program makes of the numbers beside it."""

import shutil
from pathlib import Path

import pytest

from recipes.cskv_paper.__main__ import main


def test_the_committed_page_is_what_its_numbers_give(tmp_path, capsys):
    committed = Path(__file__).parents[2] / "docs" / "results" / "ablations"
    for path in committed.glob("*.json"):
        shutil.copy(path, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--redraw", str(tmp_path)])
    assert stop.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "ablations.md").read_text() == (committed / "ablations.md").read_text()
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in committed.glob("*.png")}
