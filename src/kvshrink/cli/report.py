"""kvshrink report: the page, figures and leaderboard of a suite, made again from its results."""

from pathlib import Path
from typing import Annotated

import typer

from kvshrink.cli._common import JsonOption, console, print_json
from kvshrink.cli._outputs import check_file
from kvshrink.eval import report as reports


def report(
    folder: Annotated[Path, typer.Argument(help="What `kvshrink eval suite --out` wrote.")],
    leaderboard: Annotated[
        Path | None, typer.Option(help="A Markdown page with the two marks; the leaderboard goes between them.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make report.html, leaderboard.md and all figures again from FOLDER/results.json. Nothing is measured."""
    if leaderboard is not None:
        check_file(leaderboard)
    page = reports.build(folder)
    written = [page]
    if leaderboard is not None:
        reports.write_leaderboard(folder / "results.json", leaderboard)
        written.append(leaderboard)
    for path in written:
        console.print(f"wrote {path}")
    if json:
        print_json({"report": str(page), "leaderboard": str(leaderboard) if leaderboard else None})
