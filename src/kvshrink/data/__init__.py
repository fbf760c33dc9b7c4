"""Text and benchmark files that ship with the package, so that every measurement runs offline.

calibration.txt        book text to fit methods on
heldout.txt            book text to measure on: perplexity, and the haystack of the retrieval tasks
models.json             which model types run (bench/sweep.py)
longeval/              official LongEval line cases, and the conversations that its topic cases are made of

Where each file comes from is in SOURCES.md beside it.
"""

from importlib.resources import files
from pathlib import Path

SUFFIXES = (".txt", ".jsonl", ".json")


def path(name: str) -> Path:
    """The file called `name`, for example ``path("heldout.txt")`` or ``path("longeval/200_lines.jsonl")``.

    Raises FileNotFoundError, with the names there are, for any other name.
    """
    root = Path(str(files(__name__)))
    found = root / name
    if not found.is_file():
        known = sorted(
            str(p.relative_to(root).as_posix()) for p in root.rglob("*") if p.suffix in (".txt", ".jsonl", ".json")
        )
        raise FileNotFoundError(f"No data file {name!r} in kvshrink. Known: {', '.join(known)}.")
    return found
