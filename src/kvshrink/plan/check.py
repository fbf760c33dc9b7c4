"""The plan held against a real cache: keys and values are stored as the plan says, and the live bytes are counted."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvshrink.attach import attach, make_cache
from kvshrink.attach.budget import CacheBudget
from kvshrink.attach.families import shape_of
from kvshrink.attach.fill import fill
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact

MOST = 2**30  # bytes of keys and values that are made for a check, of all layers together


@dataclass(frozen=True)
class Check:
    """Bytes of a cache of `batch` sequences of `tokens` tokens: what it holds, what was promised, what a full one has.

    whole: whether these are all tokens and sequences of the plan; else a part that fits in memory was filled.
    """

    tokens: int
    batch: int
    nbytes: int
    promised: int
    full: int
    whole: bool

    def to_dict(self) -> dict:
        return asdict(self)


def noise(model: Any, tokens: int, batch: int) -> tuple[DynamicCache, int, int]:
    """(a full cache of normal noise, its sequences, its tokens): as many as take no more than MOST bytes."""
    token = CacheBudget.of(model, tokens).full // tokens
    rows = min(batch, max(1, MOST // (token * tokens)))
    length = min(tokens, MOST // (token * rows))
    dense, draw = DynamicCache(config=model.config), torch.Generator().manual_seed(0)
    for i, info in enumerate(attach(model).layers):
        shape = shape_of(info)
        sizes = [(rows, shape.heads, length, d) for d in (shape.head_dim, shape.value_dim)]
        device = next(info.module.parameters()).device
        keys, values = (torch.randn(size, generator=draw).to(device, shape.dtype) for size in sizes)
        dense.update(keys, values, i)
    return dense, rows, length


def check(model: Any, method: Method | Artifact, tokens: int, batch: int) -> Check:
    """Fill a cache with normal noise, which takes the bytes that any text takes, and count what is alive."""
    dense, rows, length = noise(model, tokens, batch)
    cache = make_cache(model, method)
    fill(cache, dense, attach(model))
    sizes, own = CacheBudget.of(model, length), method.method if isinstance(method, Artifact) else method
    held = cache.report()
    whole = (length, rows) == (tokens, batch)
    return Check(length, rows, held.nbytes, rows * sizes.held(own), rows * sizes.full, whole)
