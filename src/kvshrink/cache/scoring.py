"""Attention that tokens get from some queries of a step, summed: what a Scorer makes importance of.

Softmax is over the exact tokens at hand and, where the scorer wants all, over what is stored, a block at a time.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.methods._policy import Received
from kvshrink.shapes import Bool, Float, Int

SCORE_ELEMENTS = 2**22  # scores alive at a time: 16 MiB in float32

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # keys [b, h, t, d] and which of them are tokens, [b, h, t]


class ProbeQueries(NamedTuple):
    """Queries of a step's probes, as attention uses them.

    rows:    which of the s new tokens they are, in order.
    queries: after RoPE, times attention's scale.
    """

    rows: Int[Tensor, " x"]
    queries: Float[Tensor, "b q x d"]
    softcap: float | None
    sinks: Float[Tensor, " q"] | None = None  # logits that take a share and are no token


def received(
    probe: ProbeQueries,
    keys: Float[Tensor, "b h t d"],
    real: Bool[Tensor, "b t"],
    new: int,
    blocks: Blocks = lambda: (),
) -> tuple[Received, Float[Tensor, "b h slots"] | None]:
    """What the exact tokens got, of which the last `new` are those of this step, and what the stored ones did.

    Pads get nothing, and ask nothing. All stored tokens are before this step's.
    """
    b, h, t, _ = keys.shape
    queries = probe.queries.float().unflatten(1, (h, -1))  # [b, h, m, x, d]
    own = probe.rows + (t - new)
    wide = max([t, *(h * there.shape[2] for _, there in blocks())])
    size = max(1, SCORE_ELEMENTS // (b * queries.shape[2] * wide))
    mass, seen = keys.new_zeros(b, h, t, dtype=torch.float32), keys.new_zeros(b, t, dtype=torch.float32)
    stored: Tensor | None = None
    for at in range(0, len(own), size):
        part, columns = queries[:, :, :, at : at + size], own[at : at + size]
        shown = (torch.arange(t, device=keys.device) <= columns[:, None]) & real[:, None] & real[:, columns, None]
        seen += shown.sum(1)
        lse = _norm(part, keys, shown, probe.softcap, blocks)
        if probe.sinks is not None:
            lse = torch.logaddexp(lse, probe.sinks.float().view(1, h, -1, 1))
        for head in range(h):  # so that no float32 copy of all keys is made
            scores = _scores(part[:, head], keys[:, head].float(), shown[:, None], probe.softcap)
            mass[:, head] += (scores - lse[:, head, ..., None]).exp_().sum((1, 2))
        asks = real[:, None, None, columns, None]
        more = [
            (_scores(part, k.float()[:, :, None], there[:, :, None, None] & asks, probe.softcap) - lse[..., None])
            .exp_()
            .sum((2, 3))
            for k, there in blocks()
        ]
        if more:
            stored = torch.cat(more, 2) if stored is None else stored + torch.cat(more, 2)
    return Received(mass, seen), stored


def _norm(part: Tensor, keys: Tensor, shown: Tensor, softcap: float | None, blocks: Blocks) -> Float[Tensor, "b h m x"]:
    """Log-sum-exp of each query over all that it sees; 0 where it sees nothing, so that its weights are 0."""
    lse = torch.stack(
        [
            _scores(part[:, head], keys[:, head].float(), shown[:, None], softcap).logsumexp(-1)
            for head in range(keys.shape[1])
        ],
        1,
    )
    for k, there in blocks():
        scores = _scores(part, k.float()[:, :, None], there[:, :, None, None], softcap)
        lse = torch.logaddexp(lse, scores.logsumexp(-1))
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _scores(queries: Tensor, keys: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """Of queries [.., m, x, d] and keys [.., t, d] or [.., 1, t, d]; -inf where a query does not see a key."""
    keys = keys[:, None] if keys.dim() < queries.dim() else keys
    scores = queries @ keys.transpose(-1, -2)
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    return scores.masked_fill_(~seen, -torch.inf)
