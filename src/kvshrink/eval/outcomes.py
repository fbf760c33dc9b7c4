"""One answer as a line of JSON: appended as it comes, read again when a run is resumed."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kvshrink.errors import EvalError


@dataclass(frozen=True)
class Outcome:
    """One sample through one cache.

    key:     hash of all that the answer depends on: token ids, model, method and its fitted tensors, mode.
    context: number of the context; several answers about one context are no independent samples.
    length:  tokens that were asked for; tokens: how many the cache had seen at the end.
    nbytes:  bytes held at the end, a batch's shared out over its rows; full: of a full cache for the same tokens.
    seconds: per generated token, the question's forward included.
    encode:  seconds to compress the prefilled context.
    """

    key: str
    task: str
    mode: str
    length: int
    method: str
    index: int
    context: int
    depth: float | None
    score: float
    output: str
    expected: list[str]
    tokens: int
    nbytes: int
    full: int
    seconds: float
    encode: float

    @property
    def kept(self) -> float:
        """Bytes held over the full cache's."""
        return self.nbytes / self.full


@dataclass(frozen=True)
class Failure:
    """A method that could not answer a task, while the others went on."""

    method: str
    task: str
    length: int
    error: str


def key_of(*parts: object) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Log:
    """A JSONL file of records, found by key; without a path it only remembers."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict] = {row["key"]: row for row in _read(path)}

    def add(self, row: dict) -> None:
        self.rows[row["key"]] = row
        if self.path is not None:
            _append(self.path, row)

    def add_outcome(self, outcome: Outcome) -> None:
        self.add(asdict(outcome))


def _append(path: Path, row: dict) -> None:
    """Add a line; first end one that an interrupt cut off, so that it does not spoil this one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as f:
            if f.tell():
                f.seek(-1, 2)
                if f.read(1) != b"\n":
                    f.write(b"\n")
            f.write((json.dumps(row) + "\n").encode())
    except OSError as error:
        raise EvalError(f"cannot write {path}: {error.strerror}. Choose another folder.") from error


def _read(path: Path | None) -> list[dict]:
    if path is None or not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of an interrupted run may be cut; it is run again
        if isinstance(row, dict) and "key" in row:
            rows.append(row)
    return rows
