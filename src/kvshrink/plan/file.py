"""plan.json: the chosen method and settings, the budget that they keep to, and the front they were chosen from."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvshrink.errors import ArtifactError, KVShrinkError
from kvshrink.methods import build
from kvshrink.methods._roles import Method
from kvshrink.plan.bench import Bench, Point
from kvshrink.plan.budget import Budget
from kvshrink.plan.check import Check
from kvshrink.store import files

VERSION = 1
KEYS = {"version", "method", "settings", "budget", "promised", "check", "kl", "model", "search", "front"}


def plan_of(
    name: str, bench: Bench, budget: Budget, chosen: Point, front: Sequence[Point], checked: Check, search: dict
) -> dict:
    """A plan as plain values, for the model that the user calls `name`. Bytes are those of all sequences together."""
    nbytes = chosen.nbytes * budget.batch
    return {
        "version": VERSION,
        "method": chosen.name,
        "settings": chosen.settings,
        "budget": budget.described,
        "promised": {"nbytes": nbytes, "full": bench.room.full * budget.batch, "kept": chosen.kept},
        "check": checked.to_dict(),
        "kl": chosen.kl,
        "model": {"name": name, "fingerprint": bench.fingerprint},
        "search": search,
        "front": [{**asdict(p), "nbytes": p.nbytes * budget.batch} for p in front],
    }


def read(path: Path) -> tuple[Method, dict[str, Any]]:
    """(the method, the model that it was planned for). Raises ArtifactError on a file that is no plan of ours."""
    data = files.read_json(path)
    if data.get("version") != VERSION:
        raise ArtifactError(
            f"{path} has plan version {data.get('version')}, this kvshrink reads {VERSION}. Make the plan again."
        )
    if extra := sorted(set(data) ^ KEYS):
        raise ArtifactError(f"{path} has missing or unknown keys {extra}. It is edited or of another program.")
    try:
        return build(data["method"], data["settings"]), dict(data["model"])
    except (KVShrinkError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is edited: {error} Make the plan again.") from error
