"""plan.json: the chosen method and settings, the budget that they keep to, and the front they were chosen from."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvshrink.errors import ArtifactError
from kvshrink.identity import Identity
from kvshrink.methods import build
from kvshrink.methods._roles import Method
from kvshrink.plan.bench import Bench, Point
from kvshrink.plan.budget import Budget
from kvshrink.plan.check import Check
from kvshrink.store import files
from kvshrink.store.digest import sealed, unsealed
from kvshrink.store.reason import line

VERSION = 4
KEYS = {
    "version",
    "method",
    "settings",
    "budget",
    "promised",
    "check",
    "kl",
    "pace",
    "model",
    "search",
    "front",
    "sha256",
}


def plan_of(
    name: str,
    bench: Bench,
    budget: Budget,
    chosen: Point,
    front: Sequence[Point],
    checked: Check,
    pace: float | None,
    search: dict,
) -> dict:
    """A plan as plain values, for the model that the user calls `name`. Bytes are those of all sequences together;
    pace: time of a step in the full cache's, or None where it was not asked."""
    nbytes = chosen.nbytes * budget.batch
    plan = {
        "version": VERSION,
        "method": chosen.name,
        "settings": chosen.settings,
        "budget": budget.described,
        "promised": {"nbytes": nbytes, "full": bench.sizes.full * budget.batch, "byte_ratio": chosen.byte_ratio},
        "check": checked.to_dict(),
        "kl": chosen.kl,
        "pace": pace,
        "model": {"name": name, "identity": bench.identity.to_dict()},
        "search": search,
        "front": [{**asdict(p), "nbytes": p.nbytes * budget.batch} for p in front],
    }
    return sealed(plan)


def read(path: Path) -> tuple[Method, dict[str, Any]]:
    """(the method, the model that it was planned for). Raises ArtifactError on a file that is no plan of ours."""
    data = files.read_json(path)
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise ArtifactError(
            f"{path} has plan version {version!s:.20}, this kvshrink reads {VERSION}. Make the plan again."
        )
    if extra := sorted(set(data) ^ KEYS):
        raise ArtifactError(f"{path} has missing or unknown keys {extra!s:.80}. It is edited or of another program.")
    try:
        method, model = build(data["method"], data["settings"]), data["model"]
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            raise ValueError("its model has no name")
        Identity.from_dict(model.get("identity"))
        if unsealed(data) is None:
            raise ValueError("sha256 differs")
    except Exception as error:  # settings of any type meet checks that expect another one
        raise ArtifactError(f"{path} is edited: {line(error)}. Make the plan again.") from error
    return method, model
