"""What grouping costs on a made layer of 8 heads of 128 channels. SYNTHETIC: no trained model is like it; see HOW."""

import torch
from torch import Tensor

from kvshrink import CSKV
from kvshrink.fit.statistics import MomentStream
from kvshrink.methods._stats import CalibrationStats, LayerShape

HEADS, DIM, HIDDEN = 8, 128, 1024
SHARED = (0.0, 0.5, 0.9)
FITTED, STORED, ASKED = 16_384, 2048, 256  # rows that are fitted, tokens that are stored, queries that read them
SEED = 0
HOW = (
    "Inputs are normal with variance 1/i in channel i of 1024, scaled so that a key channel has variance 1. The weight "
    "of head h is sqrt(c) S + sqrt(1 - c) P_h, S shared by all heads and P_h its own, entries normal: rows of two "
    "heads correlate by c (shared). All heads read the same input, so that keys correlate at c = 0 too. Queries (twice "
    "as loud, so that attention has peaks) and values are made in the same way. No RoPE. Fitted on 16384 rows; 2048 "
    "others are stored, 256 queries read all of them, values exact. Seed 0."
)


def rows(bits_of: tuple[int | None, ...], keeps: tuple[float, ...]) -> list[dict]:
    """|x - x'| / |x| of stored keys, and of attention outputs with exact values, at equal ranks and bytes."""
    out = []
    for shared in SHARED:
        stats, keys, queries, values = made(shared)
        exact = attended(queries, keys, values)
        for keep in keeps:
            for bits in bits_of:
                for size in (1, 2, 4, 8):
                    method = CSKV(keep=keep, bits=bits, group_heads=size)
                    codec = method.codecs(stats.shape, method.fit_layer(stats))[0]
                    ours = codec.decode(codec.encode(keys, None), HEADS)
                    out.append(
                        {
                            "shared": shared,
                            "keep": keep,
                            "bits": bits,
                            "group_heads": size,
                            "key_bytes_per_token": codec.page_bytes() / method.page,
                            "key_error": error(keys, ours),
                            "output_error": error(exact, attended(queries, ours, values)),
                        }
                    )
    return out


def made(shared: float) -> tuple[CalibrationStats, Tensor, Tensor, Tensor]:
    """(statistics, stored keys, queries, stored values [1, h, t, d])."""
    g = torch.Generator().manual_seed(SEED)
    scale = (1 / torch.arange(1, HIDDEN + 1)).sqrt()
    scale *= (HIDDEN / scale.square().sum()).sqrt()
    inputs = torch.randn(FITTED + STORED + ASKED, HIDDEN, generator=g) * scale
    weights = []
    for _ in range(3):
        common, own = (torch.randn(n, DIM, HIDDEN, generator=g) / HIDDEN**0.5 for n in (1, HEADS))
        weights.append((shared**0.5 * common + (1 - shared) ** 0.5 * own).flatten(0, 1))
    key, value, query = weights
    moments = []
    for weight in (key, value):
        stream = MomentStream()
        stream.add(inputs[:FITTED] @ weight.T)
        moments.append(stream.moments())
    shape = LayerShape(HEADS, DIM, torch.float32)
    energy, gram = torch.ones(HEADS, DIM), torch.eye(DIM).repeat(HEADS, 1, 1)
    stats = CalibrationStats(shape, *moments, inputs[:FITTED].abs().mean(0), key, value, energy, gram)
    stored, asked = inputs[FITTED:-ASKED], inputs[-ASKED:]
    heads = [(x @ w.T)[None].unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x, w in ((stored, key), (stored, value))]
    queries = 2 * (asked @ query.T)[None].unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    return stats, heads[0], queries, heads[1]


def attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.transpose(2, 3) / DIM**0.5).softmax(-1) @ values


def error(exact: Tensor, ours: Tensor) -> float:
    return round(float((exact - ours).norm() / exact.norm()), 5)
