"""Importance of tokens, by the attention that some queries pay them: ZipCache's normalised saliency, arXiv 2405.14256.

A step's probes are the last 5 % of its queries and a random 5 %; a single new token is its own probe. A token's
importance is the attention it gets, summed over probes and the query heads of its KV head, divided by the number of
probes that see it: an early token is seen by more queries than a late one and must not win by that. The official code
divides by the number of all queries behind the token, though it sums over probes alone.

Attention is over the exact tokens at hand, which are a prompt's own in its prefill.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.shapes import Bool, Float, Int

SHARE = 0.05  # of a step's queries: the last ones, and as many random ones
SEED = 0
SCORE_ELEMENTS = 2**22  # scores alive at a time: 16 MiB in float32


class ProbeQueries(NamedTuple):
    """Queries of a step's probes, as attention uses them.

    rows:    which of the s new tokens they are, in order.
    queries: after RoPE, times attention's scale.
    """

    rows: Int[Tensor, " x"]
    queries: Float[Tensor, "b q x d"]
    softcap: float | None


def probes(count: int) -> Int[Tensor, " x"]:
    """Which of `count` new tokens ask, in order; always the last one."""
    each = -(-count // int(1 / SHARE))
    rest = torch.randperm(count - each, generator=torch.Generator().manual_seed(SEED))[:each]
    return torch.cat([rest, torch.arange(count - each, count)]).sort().values


def importance(
    probe_queries: ProbeQueries, keys: Float[Tensor, "b h t d"], real: Bool[Tensor, "b t"], new: int
) -> Float[Tensor, "b h t"]:
    """Of the exact tokens, of which the last `new` are those of this step. Pads have none."""
    b, h, t, _ = keys.shape
    queries = probe_queries.queries.float().unflatten(1, (h, -1))  # [b, h, m, x, d]
    own = probe_queries.rows + (t - new)
    size = max(1, SCORE_ELEMENTS // (b * queries.shape[2] * t))
    total, count = keys.new_zeros(b, h, t, dtype=torch.float32), keys.new_zeros(b, t, dtype=torch.float32)
    for at in range(0, len(own), size):
        columns = own[at : at + size]
        seen = (torch.arange(t, device=keys.device) <= columns[:, None]) & real[:, None] & real[:, columns, None]
        count += seen.sum(1)
        for head in range(h):  # so that no float32 copy of all keys is made
            part = queries[:, head, :, at : at + size]
            total[:, head] += _attention(part, keys[:, head].float(), seen, probe_queries.softcap).sum((1, 2))
    return total / count.clamp_min(1)[:, None]


def _attention(
    queries: Float[Tensor, "b m x d"], keys: Float[Tensor, "b t d"], seen: Bool[Tensor, "b x t"], softcap: float | None
) -> Float[Tensor, "b m x t"]:
    """Softmax over the tokens seen; 0 for a probe that sees none."""
    scores = queries @ keys[:, None].transpose(2, 3)
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    hidden = ~seen[:, None]
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
