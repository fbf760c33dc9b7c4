"""Attention that tokens get from some queries of a step, reduced: what most Scorers make importance of.

Softmax is over the exact tokens at hand and, where the scorer wants all, over what is stored, a block at a time. No
matrix of all probabilities is made: some queries at a time, each over all that it sees.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.methods._evidence import Reduce
from kvshrink.shapes import Bool, Float, Int

SCORE_ELEMENTS = 2**20  # scores alive at a time: 4 MiB in float32, about what a core's cache holds

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


class Received(NamedTuple):
    """mass: what tokens got, reduced over queries and the query heads of a KV head; seen: how many of the queries see a
    token; stored: mass of the stored tokens, None where none was read."""

    mass: Float[Tensor, "b h t"]
    seen: Float[Tensor, "b t"]
    stored: Float[Tensor, "b h slots"] | None


def received(
    probe: ProbeQueries,
    keys: Float[Tensor, "b h t d"],
    real: Bool[Tensor, "b t"],
    new: int,
    blocks: Blocks = lambda: (),
    reduce: Reduce = "sum",
    weights: Float[Tensor, " x"] | None = None,
) -> Received:
    """What the exact tokens got, of which the last `new` are those of this step, and what the stored ones did.

    Pads get nothing, and ask nothing. All stored tokens are before this step's. weights: of each query's attention.
    """
    b, h, t, _ = keys.shape
    queries = probe.queries.unflatten(1, (h, -1))  # [b, h, m, x, d]
    own, stored_keys = (probe.rows + (t - new)).to(keys.device), [(k.float(), there) for k, there in blocks()]
    mass, seen = keys.new_zeros(b, h, t, dtype=torch.float32), keys.new_zeros(b, t, dtype=torch.float32)
    stored = [there.new_zeros(there.shape, dtype=torch.float32) for _, there in stored_keys]
    wide = t + sum(there.shape[2] for _, there in stored_keys)
    size = max(1, SCORE_ELEMENTS // (b * queries.shape[2] * wide))
    padded = not bool(real.all())
    for at in range(0, len(own), size):
        columns, part = own[at : at + size], queries[:, :, :, at : at + size]
        end = int(columns[-1]) + 1
        shown = (torch.arange(end, device=keys.device) <= columns[:, None])[None]
        if padded:
            shown = shown & real[:, None, :end] & real[:, columns, None]
        seen[:, :end] += shown.sum(1)
        counts = None if weights is None else weights[at : at + size].to(keys.device)
        asks = real[:, columns, None] if padded else None
        for head in range(h):  # so that no float32 copy of all keys is made
            row = _scores(part[:, head], keys[:, head, :end], shown[:, None], probe.softcap)
            others = [
                _stored_scores(part[:, head], k[:, head], there[:, head], asks, probe) for k, there in stored_keys
            ]
            sink = None if probe.sinks is None else probe.sinks.float().view(h, -1)[head]
            _softmax([row, *others], sink, padded or sink is not None)
            if reduce == "below":
                held = [n[:, head].sum(-1)[:, None, None] for _, n in stored_keys]
                even = 1 / torch.stack(torch.broadcast_tensors(shown[:, None].sum(-1), *held)).sum(0).clamp_min(1)
                small = [(row < even[..., None]) & shown[:, None], *(x < even[..., None] for x in others)]
                row, others = small[0].float(), [x.float() for x in small[1:]]
            for weighed, into in zip([row, *others], [mass[:, head, :end], *(x[:, head] for x in stored)], strict=True):
                _add(into, weighed, counts, reduce)
    return Received(mass, seen, torch.cat(stored, 2) if stored else None)


def _softmax(parts: list[Tensor], sink: Float[Tensor, " m"] | None, some_see_nothing: bool) -> None:
    """Scores [b, m, x, t] become weights, in place; 0 where a query sees nothing. sink: logits that take a share."""
    top = torch.stack([x.amax(-1) for x in parts]).amax(0)
    if sink is not None:
        top = top.maximum(sink[:, None])
    if some_see_nothing:
        top = top.masked_fill(top == -torch.inf, 0.0)
    for x in parts:
        x.sub_(top[..., None]).exp_()
    total = torch.stack([x.sum(-1) for x in parts]).sum(0)
    if sink is not None:
        total = total + (sink[:, None] - top).exp()
    if some_see_nothing:
        total = total.clamp_min(torch.finfo(torch.float32).tiny)
    for x in parts:
        x.div_(total[..., None])


def _add(
    into: Float[Tensor, "b t"],
    weights: Float[Tensor, "b m x t"],
    counts: Float[Tensor, " x"] | None,
    reduce: Reduce,
) -> None:
    """Reduce these weights into what tokens have so far."""
    if reduce == "max":
        into.copy_(torch.maximum(into, weights.amax((1, 2))))
    elif counts is None:
        into += weights.sum((1, 2))
    else:
        into += torch.einsum("bmxt,x->bt", weights, counts)


def _stored_scores(
    queries: Float[Tensor, "b m x d"],
    keys: Float[Tensor, "b t d"],
    there: Bool[Tensor, "b t"],
    asks: Bool[Tensor, "b x 1"] | None,
    probe: ProbeQueries,
) -> Float[Tensor, "b m x t"]:
    shown = there[:, None, None] if asks is None else there[:, None, None] & asks[:, None]
    return _scores(queries.float(), keys, shown, probe.softcap)


def _scores(queries: Tensor, keys: Tensor, seen: Tensor, softcap: float | None) -> Float[Tensor, "b m x t"]:
    """Of queries [b, m, x, d] and keys [b, t, d]; -inf where a query does not see a key."""
    flat = queries.flatten(1, 2).to(keys.dtype)
    scores: Tensor = (flat @ keys.transpose(1, 2)).float().unflatten(1, queries.shape[1:3])
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    return scores.masked_fill_(~seen, -torch.inf)
