"""Fuzzers: seeded, small in the suite, large by `pytest tests/fuzz -k NAME --fuzz 20000`, which prints what it found.

A case depends on the seed and its number alone, so that one of a large run can be tried again by itself.
"""

import json
import random
from collections import Counter
from pathlib import Path


def source(name: str, seed: int, case: int) -> random.Random:
    """The random numbers of one case."""
    return random.Random(f"{name}/{seed}/{case}")


class Tally:
    """What became of the cases, and which were findings."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self.outcomes: Counter[str] = Counter()
        self.findings: list[dict] = []
        self.within: Counter[str] = Counter()  # what was done in the cases, where one is of several things

    def add(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def find(self, case: int, what: str, **more: object) -> None:
        self.outcomes["finding"] += 1
        self.findings.append({"case": case, "what": what, **more})

    def summary(self) -> dict:
        return {
            "fuzzer": self.name,
            "seed": self.seed,
            "cases": sum(self.outcomes.values()),
            "outcomes": dict(sorted(self.outcomes.items())),
            **({"within": dict(sorted(self.within.items()))} if self.within else {}),
            "findings": self.findings,
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.summary(), indent=1) + "\n")
