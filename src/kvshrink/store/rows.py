"""Rows of several caches' pages as one."""

from dataclasses import replace

import numpy as np
import torch

from kvshrink.store.lanes import Pages
from kvshrink.store.pool import Run


def joined(parts: list[Pages]) -> Pages:
    """The rows of several, one below the other; no record is copied."""
    width = max(len(p) for p in parts)
    wide = [p.widened(width) for p in parts]
    runs: dict[int, Run] = {id(run): run for p in parts for run in p.runs}
    ragged = next((p for p in wide if p.columns is not None and p.importance is not None), None)
    if ragged is not None and ragged.columns is not None and ragged.importance is not None:
        like = ragged.columns, ragged.importance
        none = [[t.new_full((len(p.table), *t.shape[1:]), -1) for t in like] for p in wide]
        wide = [
            p if p.columns is not None else replace(p, columns=n[0], importance=n[1])
            for p, n in zip(wide, none, strict=True)
        ]
    columns, importance = ([t for p in wide if (t := getattr(p, k)) is not None] for k in ("columns", "importance"))
    return replace(
        wide[0],
        table=np.concatenate([p.table for p in wide]),
        used=np.concatenate([p.used for p in wide]),
        first=np.concatenate([p.first for p in wide]),
        layout=next((p.layout for p in parts if p.layout is not None), None),
        runs=tuple(runs.values()),
        columns=torch.cat(columns) if columns else None,
        importance=torch.cat(importance) if importance else None,
    )
