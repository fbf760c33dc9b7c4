"""Rows of a table that differ in the layer's number alone, as one row."""

from collections.abc import Iterable, Sequence

Row = tuple[int, Sequence[str]]  # a layer and what is said of it
SHOWN = 3  # runs of layers in a name; a model that alternates has many


def merged(rows: Iterable[Row]) -> list[list[str]]:
    """[layers, *cells] of each kind of row, in the order of their first layers; the cells are those of each layer."""
    found: dict[tuple[str, ...], list[int]] = {}
    for layer, cells in rows:
        found.setdefault(tuple(cells), []).append(layer)
    return [[_named(layers), *cells] for cells, layers in found.items()]


def _named(layers: Sequence[int]) -> str:
    """Such as "7", "0-29, each" or "0-4, 6-10, 12-16, .., 27 layers, each"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:SHOWN]]
    if len(layers) == 1:
        return names[0]
    more = ["..", f"{len(layers)} layers"] if len(runs) > SHOWN else []
    return ", ".join([*names, *more, "each"])
