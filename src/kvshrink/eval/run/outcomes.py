"""One answer to one sample, as a log keeps it."""

from dataclasses import dataclass, fields

from kvshrink.store.log import is_number

TEXTS = ("key", "task", "mode", "method", "output")
COUNTS = ("length", "index", "tokens", "nbytes", "full")
NUMBERS = ("score", "seconds", "encode")


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

    @classmethod
    def of(cls, row: dict) -> "Outcome | None":
        """From a row of a log; None if it is not what a run would have written."""
        names = {f.name for f in fields(cls)}
        right = (
            set(row) == names
            and all(isinstance(row[name], str) for name in TEXTS)
            and all(type(row[name]) is int and row[name] >= 0 for name in COUNTS)
            and all(is_number(row[name]) and row[name] >= 0 for name in NUMBERS)
            and (row["depth"] is None or is_number(row["depth"]))
            and isinstance(row["context"], int | str)
            and isinstance(row["expected"], list)
            and all(isinstance(x, str) for x in row["expected"])
            and row["full"] > 0
        )
        return cls(**row) if right else None

    @property
    def byte_ratio(self) -> float:
        """Bytes held over the full cache's."""
        return self.nbytes / self.full


@dataclass(frozen=True)
class Failure:
    """A method that could not answer a task, while the others went on."""

    method: str
    task: str
    length: int
    error: str
