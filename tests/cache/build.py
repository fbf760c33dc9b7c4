"""Caches without a model: method, fitted tensors and shape are enough."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvshrink.attach.judging import judged_of
from kvshrink.cache.attend import keys_of
from kvshrink.cache.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.scoring import ProbeQueries
from kvshrink.cache.snapshot import Snapshot
from kvshrink.methods._evidence import Heard
from kvshrink.methods._roles import Fitted, Method, Tier
from kvshrink.methods._stats import LayerShape
from kvshrink.store.tokens import TokenTable


def make(method: Method, shape: LayerShape, fitted: list[Fitted]) -> KVCache:
    """A cache with one layer for each entry of `fitted`."""
    return assemble(method, shape, [method.tiers(shape, f) for f in fitted])


def assemble(method: Method, shape: LayerShape, tiers: Sequence[tuple[Tier, ...]]) -> KVCache:
    """A cache with one layer for each ladder of tiers."""
    table = TokenTable()
    layers = [CompressedLayer(method, shape, ladder, table) for ladder in tiers]
    return KVCache(layers, method, table, "model", "fitted")


def bases(shape: LayerShape, rank_k: int, rank_v: int, groups: int = 1, mean: float = 0.0, seed: int = 0) -> dict:
    """Fitted tensors of CSKV: random orthonormal bases, `groups` of them for the keys, means of deviation `mean`."""
    g = torch.Generator().manual_seed(seed)
    return {
        "key_up": orthonormal(groups, shape.width // groups, rank_k, g),
        "key_mean": torch.randn(groups, shape.width // groups, generator=g) * mean,
        "value_up": orthonormal(1, shape.width, rank_v, g),
        "value_mean": torch.randn(1, shape.width, generator=g) * mean,
    }


def weights(shape: LayerShape, seed: int = 0) -> dict:
    """Fitted tensors of XQuant's inputs: as many channels as keys have, random projections with biases."""
    g = torch.Generator().manual_seed(seed)
    both = torch.randn(shape.width, 2 * shape.width, generator=g) / shape.width**0.5
    return {
        "down": torch.linalg.pinv(both).contiguous(),
        "key_weight": both[:, : shape.width].contiguous(),
        "value_weight": both[:, shape.width :].contiguous(),
        "mean": torch.randn(2 * shape.width, generator=g),
    }


def body_keys(snapshot: Snapshot) -> Tensor:
    """Keys of the body as attention uses them, [b, h, slots, d]."""
    blocks = [(tier, tier.block(0, len(tier.pages))) for tier in snapshot.tiers]
    return torch.cat([keys_of(block, tier, snapshot) for tier, block in blocks], 2)


def orthonormal(groups: int, width: int, rank: int, generator: torch.Generator) -> Tensor:
    """[G, r, a] with orthonormal rows."""
    noise = torch.randn(groups, width, rank, generator=generator)
    return torch.linalg.qr(noise).Q.transpose(1, 2).contiguous()


def feed(
    cache: KVCache,
    keys: list[Tensor],
    values: list[Tensor],
    rope=None,
    real=None,
    own: bool = True,
    asked: bool = False,
) -> list:
    """Give s new tokens to all layers, positions counted on from the columns; what `update` returned, per layer.

    asked: with random queries, where a layer ranks tokens.
    """
    b, _, s, _ = keys[0].shape
    seen = cache.get_seq_length()
    positions = torch.arange(seen, seen + s, dtype=torch.int32).expand(b, s)
    out = []
    scorer = cache.compressed[0].policy.scorer if cache.compressed else None
    if scorer is not None and scorer.judged and s > 1:
        cache.judged = judged_of(cache, {i: _heard(k, scorer.listens) for i, k in enumerate(keys)}, real)
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        probe, layer = None, cache.layers[i]
        if asked and (rows := layer.probes(s)) is not None:
            probe = ProbeQueries(rows, torch.randn(b, 2 * k.shape[1], len(rows), k.shape[3]).to(k.dtype), None)
        cache.stage(i, positions, real, rope, own, "model", probe)
        out.append(cache.update(k, v, i))
    cache.judged = None
    return out


def _heard(keys: Tensor, listens: bool) -> Heard:
    """What a model may have said of these tokens, and read them again with."""
    b, h, s, d = keys.shape
    if not listens:
        return Heard(torch.rand(b, h, s))
    at = s + torch.arange(50).expand(b, -1)
    return Heard(torch.rand(b, h, s), torch.randn(b, h, 50, d).to(keys.dtype), at, torch.full_like(at, s + 50))
