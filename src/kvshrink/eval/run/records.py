"""What records of measurements must be like before they are taken from a log: what was damaged is measured again."""

from dataclasses import fields
from typing import Any

from kvshrink.eval.run.layers import LayerError
from kvshrink.eval.run.teacher import Track
from kvshrink.store.log import is_number

LAYER = {f.name for f in fields(LayerError)}
TRACK = {f.name for f in fields(Track)}
SINGLE = ("held", "full", "seconds")  # of a track; the rest has an element per scored token


def has_track(row: dict) -> bool:
    track = row.get("track")
    if not isinstance(track, dict) or set(track) != TRACK or not is_number(track["full"]) or track["full"] <= 0:
        return False
    lists = [track[k] for k in TRACK.difference(SINGLE)]
    alike = all(map(_are_numbers, lists)) and len({len(x) for x in lists}) == 1 and len(lists[0]) > 0
    return alike and is_number(track["seconds"]) and (track["held"] is None or is_number(track["held"]))


def has_path(row: dict) -> bool:
    """A track, and the agreement of trajectories beside it."""
    path = row.get("path")
    return has_track(row) and isinstance(path, list) and all(isinstance(x, bool) for x in path)


def has_memory(row: dict) -> bool:
    right = set(row) == {"key", "held", "full", "bits", "peak"} and is_number(row["full"]) and row["full"] > 0
    return right and is_number(row["held"]) and all(row[k] is None or is_number(row[k]) for k in ("bits", "peak"))


def has_layers(row: dict) -> bool:
    rows = row.get("rows")
    return isinstance(rows, list) and all(
        isinstance(x, dict) and set(x) == LAYER and all(v is None or is_number(v) for v in x.values()) for x in rows
    )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, bool) or is_number(x) for x in values)
