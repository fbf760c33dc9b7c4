"""Pages as a saved cache has them: the records that are named, each once, and tables that name them by number."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvshrink.kernels.records import Layout
from kvshrink.store.lanes import Pages, Stored
from kvshrink.store.pool import Places, Run, addressed


def state(pages: Pages) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """(plain values, tensors) from which `restored` makes the same pages."""
    if not len(pages):
        return {"pages": 0, "records": 0, "columns": False}, {}
    named = np.unique(pages.table[pages.table > 0])
    number = np.searchsorted(named, pages.table).astype(np.int32)
    records = Places(pages.runs).gather(named[None, None])[0, 0]
    tensors = {
        "records": records,
        "table": torch.from_numpy(np.where(pages.table > 0, number, -1)),
        "used": torch.from_numpy(pages.used.copy()),
        "first": torch.from_numpy(pages.first.copy()),
    }
    if pages.columns is not None and pages.importance is not None:
        tensors |= {"columns": pages.columns, "importance": pages.importance}
    return {"pages": len(pages), "records": len(named), "columns": pages.columns is not None}, tensors


def restored(pages: Pages, values: Mapping[str, Any], tensors: Mapping[str, Tensor], page: Stored) -> Pages:
    """Pages from what `state` gave. pages: empty ones of the same kind; page: one as it is laid out."""
    if not values["pages"]:
        return pages
    run = Run(tensors["records"])
    number = tensors["table"].cpu().numpy()
    return replace(
        pages,
        table=addressed([run], np.zeros_like(number), number.astype(np.int64), number >= 0),
        used=tensors["used"].cpu().numpy(),
        first=tensors["first"].cpu().numpy(),
        layout=Layout.of(page, pages.lanes),
        runs=(run,),
        columns=tensors.get("columns"),
        importance=tensors.get("importance"),
    )
