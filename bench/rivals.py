"""Rivals at equal memory: every quantiser at the bits that it offers, and transformers' own quantised caches.

A contender is filled from an exact prefill of all, so that one prefill serves every one of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, cache_utils

from kvshrink import make_cache, methods
from kvshrink.attach import attach
from kvshrink.attach.factory import digest_of
from kvshrink.attach.fill import fill
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.teacher import compared
from kvshrink.methods._quantiser import Quantiser
from kvshrink.store.bytes import nbytes

FULL = "full"
WINDOW = {"window": 32, "sinks": 4}  # of every quantiser, beside the paper's own where that differs
# settings that stand for about 1.5 bits, where a method has no `bits`
OTHERS = {"kivi": [{"group": 64}, {"group": 128}, {"bits": 4, "group": 64}]}


@dataclass
class Contender:
    """A way to hold the cache. fill: a cache from an exact prefill; bits: of a stored number, of such a cache."""

    label: str
    group: str
    identity: str
    fill: Callable[[DynamicCache], Any]
    held: Callable[[Any], tuple[float, int]]
    method: Any = None  # where it is one of ours


def ours(model: Any, label: str, group: str, method: Any) -> Contender:
    attachment = attach(model)

    def filled(dense: DynamicCache) -> Any:
        cache = make_cache(model, method)
        fill(cache, dense, attachment)
        return cache

    def held(cache: Any) -> tuple[float, int]:
        return cache.report().bits or 0.0, cache.nbytes

    return Contender(label, group, digest_of(method), filled, held, method)


def peer(model: Any, backend: str, bits: int, axis: int, size: int) -> Contender:
    """transformers' own, with its default residual of 128 tokens, which a prefill leaves empty."""
    kind = {"quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer"}[backend]
    label = f"QuantizedCache {backend} int{bits} axis {axis} group {size}"

    def filled(dense: DynamicCache) -> Any:
        cache = DynamicCache(config=model.config)
        make = getattr(cache_utils, kind)
        cache.layers = [make(bits, axis, axis, size) for _ in dense.layers]
        for i, layer in enumerate(dense.layers):
            cache.update(layer.keys, layer.values, i)
        return cache

    def held(cache: Any) -> tuple[float, int]:
        quantised, rest, numbers = 0, 0, 0
        for layer in cache.layers:
            parts = (layer._quantized_keys, layer._quantized_values)
            if backend == "quanto":
                tensors = [t for q in parts for t in (q._data._data, q._scale, q._shift)]
                numbers += sum(q.numel() for q in parts)
            else:
                tensors = [t for codes, meta in parts for t in (codes, meta["scale"], meta["zero"])]
                numbers += sum(int(np.prod(meta["shape"])) for _, meta in parts)
            quantised += nbytes(tensors)
            rest += nbytes([layer.keys, layer.values])
        return 8 * quantised / numbers, quantised + rest

    return Contender(label, "peer", label, filled, held)


def full_contender() -> Contender:
    return Contender(FULL, FULL, FULL, copy.deepcopy, lambda cache: (16.0, plain(cache)))


def plain(cache: Any) -> int:
    return nbytes(t for layer in cache.layers for t in (layer.keys, layer.values))


def plan() -> list[Entry]:
    """Every quantiser at every number of bits that it offers between 1 and 4 (and those that have none)."""
    out = []
    for name in methods.names():
        cls = methods.get(name)
        if not issubclass(cls, Quantiser):
            continue
        variants: list[dict] = []
        for bits in (4, 3, 2, 1.5, 1):
            try:
                cls(bits=bits)
                variants.append({"bits": bits})
            except (methods.SettingError, TypeError):
                continue
        for given in [*(variants or [{}]), *OTHERS.get(name, [])]:
            shown = ",".join(f"{k}={v}" for k, v in given.items())
            label = f"{name}:{shown}" if shown else name
            own = cls(**given)
            out.append(Entry(label, own, series="paper's window"))
            near = methods.build(name, given | WINDOW)
            if near != own:
                out.append(Entry(f"{label} w32", near, series="window 32"))
    return out


def peers(model: Any) -> list[Contender]:
    found = [("quanto", b, a, g) for b in (4, 2) for a in (0, -1) for g in (64, 32)]
    # hqq packs 3 bits along axis 1 so that it cannot read them again
    found += [("hqq", b, a, g) for b in (4, 3, 2, 1) for a in (0, 1) for g in (64, 32) if (b, a) != (3, 1)]
    return [peer(model, *settings) for settings in found]


def peers_as_given(model: Any) -> list[Contender]:
    """With the axes and the groups that transformers takes where none is named."""
    found = [(backend, bits) for backend in ("quanto", "hqq") for bits in (4, 2)]
    return [peer(model, backend, bits, 0, 64) for backend, bits in found]


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, ids: list[int], cache: Any, limit: int) -> str:
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), past_key_values=cache, max_new_tokens=limit, do_sample=False
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


@torch.inference_mode()
def divergence(model: Any, ids: list[int], first: int, cache: Any, dense: DynamicCache, chunk: int) -> np.ndarray:
    """The predictions of ids[first:], a chunk a forward, beside the full cache's, as `compared` gives them."""
    found: list[np.ndarray] = []
    for at in range(first - 1, len(ids) - 1, chunk):
        end = min(at + chunk, len(ids) - 1)
        part, targets = torch.tensor([ids[at:end]]), torch.tensor(ids[at + 1 : end + 1])
        full, mine = (model(input_ids=part, past_key_values=c).logits[0] for c in (dense, cache))
        found.append(compared(full, mine, targets))
    return np.concatenate(found, 1)
