"""The bases that CSKV begins with: the optimum in closed form, or the paper's own (arXiv 2409.10593)."""

import torch
from torch import Tensor

from kvshrink.methods._codecs.basis import orthonormal, principal, weighted_svd
from kvshrink.methods._stats import KV, KVS, CalibrationStats

ALPHA = 0.5  # ASVD's exponent on mean |x|


def initial(
    init: str, kv: KV, stats: CalibrationStats, groups: int, rank: int, metric: Tensor | None
) -> dict[str, Tensor]:
    """ "up" [G, r, a], "mean" [G, a] and, where it is not up^T, "down" [G, a, r] of one layer's keys or values.

    init: "pca", "asvd", "svd" or "random"; metric: of "pca".
    """
    moments, input_scale = getattr(stats, kv), stats.input_scale
    mean = moments.mean.double().unflatten(0, (groups, -1))
    down = None
    if init == "pca":
        down, up = principal(moments.covariance, groups, rank, metric)
        down = None if metric is None else down  # an orthonormal basis is stored once
    elif init == "random":
        up = orthonormal(groups, mean.shape[1], rank, KVS.index(kv)).to(mean.device)
    else:
        scale = input_scale.double().add(1e-6).pow(ALPHA) if init == "asvd" else torch.ones_like(input_scale)
        down, up = weighted_svd(stats.known(f"{kv}_weight"), scale, groups, rank)
        mean = torch.zeros_like(mean)  # the paper's factors have no bias
    tensors = {"up": up, "mean": mean} | ({} if down is None else {"down": down})
    return {k: t.float().contiguous() for k, t in tensors.items()}
