"""What a cache holds, layer by layer and by purpose, beside what a full cache would."""

from dataclasses import asdict, dataclass
from typing import Any

from kvshrink.cache.drift import Drift
from kvshrink.errors import CacheError
from kvshrink.store.alike import merged
from kvshrink.store.bytes import Held, human


@dataclass(frozen=True)
class Row:
    """One layer: bytes held by purpose, and the bytes of the same tokens in a full cache."""

    layer: int
    kind: str  # the method's name, or "sliding", "state" or "no cache" for one that stays as it is
    tokens: int
    held: Held
    full: int
    drift: Drift | None = None  # of a watched layer
    body: int = 0  # bytes of the body
    numbers: int = 0  # slots of keys and values in the body; a page that was cut keeps all of its own
    fused: str | None = None  # whether one kernel reads the body, or why none does; None: nothing is stored


@dataclass(frozen=True)
class Report:
    """`byte_ratio` is the share of the full cache's bytes that is held: all layers, scales, window, sinks."""

    rows: list[Row]
    table_bytes: int  # positions of the tokens, shared by all layers

    @property
    def held(self) -> Held:
        return sum((r.held for r in self.rows), Held())

    @property
    def nbytes(self) -> int:
        return self.held.total + self.table_bytes

    @property
    def bits(self) -> float | None:
        """Bits of a stored number, metadata included, window and sinks not. None: nothing is stored."""
        numbers = sum(r.numbers for r in self.rows)
        return 8 * sum(r.body for r in self.rows) / numbers if numbers else None

    @property
    def drifted(self) -> bool:
        """Whether a layer's live error is more than twice the calibration text's. Raises CacheError if unwatched."""
        if not self._watched:
            raise CacheError(
                "the cache does not watch its drift. Make it with make_cache(model, artifact, watch=True)."
            )
        return any(r.drift is not None and r.drift.drifted for r in self.rows)

    @property
    def _watched(self) -> bool:
        return any(r.drift is not None for r in self.rows)

    @property
    def full(self) -> int:
        return sum(r.full for r in self.rows)

    @property
    def byte_ratio(self) -> float:
        return self.nbytes / self.full if self.full else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [{**asdict(r), "held": {**asdict(r.held), "total": r.held.total}} for r in self.rows]
        for row in rows:
            drift = row.pop("drift")
            if drift is not None:
                row["drift"] = Drift(*drift)._asdict()
        watched = {"drifted": self.drifted} if self._watched else {}
        return watched | {
            "layers": rows,
            "positions": self.table_bytes,
            "nbytes": self.nbytes,
            "full": self.full,
            "byte_ratio": self.byte_ratio,
            "bits": self.bits,
        }

    def __str__(self) -> str:
        head = [
            "layer",
            "kind",
            "tokens",
            "payload",
            "metadata",
            "window",
            "sinks",
            "index",
            "total",
            "full",
            "of full",
        ]
        rows = [
            (r.layer, [r.kind, str(r.tokens), *_cells(r.held), human(r.full), _share(r.held.total, r.full)])
            for r in self.rows
        ]
        tokens = str(max((r.tokens for r in self.rows), default=0))
        total = (*_cells(self.held)[:-1], human(self.nbytes))
        below = [
            ["positions", "", tokens, *[""] * 5, human(self.table_bytes), "", ""],
            ["all", "", tokens, *total, human(self.full), _share(self.nbytes, self.full)],
        ]
        if self._watched:
            head += ["key drift", "value drift"]
            for (_, cells), r in zip(rows, self.rows, strict=True):
                cells += ["-" if x is None else f"{x:.2f}" for x in r.drift or (None, None)]
            below = [[*line, "", ""] for line in below]
        lines = [*merged(rows), *below]
        lines.insert(0, head)
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
        table = table if self.bits is None else f"{table}\n{self.bits:.2f} bits a stored number"
        fused = {r.fused: None for r in self.rows if r.fused is not None}
        return "\n".join([table, *(f"fused kernel: {answer}" for answer in fused)])


def _cells(held: Held) -> tuple[str, ...]:
    return tuple(human(x) for x in (held.payload, held.metadata, held.window, held.sinks, held.index, held.total))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"
