"""Attention that tokens get from some queries of a step, reduced: what most Scorers make importance of.

Softmax is over the exact tokens at hand and, where the scorer wants all, over what is stored, a block at a time. No
matrix of all probabilities is made: some queries at a time, each over all that it sees.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.kernels.mass import mass as mass_of
from kvshrink.methods._evidence import Reduce
from kvshrink.shapes import Bool, Float, Int

FEW = 128  # exact tokens whose keys may be copied for all heads at once
SCORE_ELEMENTS = 2**22  # scores alive at a time: 16 MiB in float32

# of stored tokens: scores of queries [b, h, m, x, d], [b, h, m, x, t], and which are tokens, [b, h, t]
Stored = Callable[[Tensor], Sequence[tuple[Tensor, Tensor]]]


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
    stored: Stored = lambda _: (),
    tokens: int = 0,
    reduce: Reduce = "sum",
    weights: Float[Tensor, " x"] | None = None,
) -> Received:
    """What the exact tokens got, of which the last `new` are those of this step, and what the stored ones did.

    Pads get nothing, and ask nothing. All stored tokens are before this step's: `stored` gives scores of `tokens` of
    them. weights: of each query's attention.
    """
    b, h, t, _ = keys.shape
    queries = probe.queries.unflatten(1, (h, -1))  # [b, h, m, x, d]
    own = (probe.rows + (t - new)).to(keys.device)
    padded = not bool(real.all())
    if not tokens and probe.sinks is None and probe.softcap is None and reduce != "below":
        counts = None if weights is None else weights.to(keys.device)
        there, asks = (real, real[:, own]) if padded else (None, None)
        got_now = mass_of(queries, keys, own + 1, counts, there, asks, reduce == "max")
        return Received(got_now, _seen(own, real), None)
    mass, seen = keys.new_zeros(b, h, t, dtype=torch.float32), keys.new_zeros(b, t, dtype=torch.float32)
    got: list[Tensor] = []  # by stored tokens
    size = max(1, SCORE_ELEMENTS // (b * queries.shape[2] * (t + tokens)))
    for at in range(0, len(own), size):
        columns, part = own[at : at + size], queries[:, :, :, at : at + size]
        end = int(columns[-1]) + 1
        shown = (torch.arange(end, device=keys.device) <= columns[:, None])[None]
        if padded:
            shown = shown & real[:, None, :end] & real[:, columns, None]
        seen[:, :end] += shown.sum(1)
        counts = None if weights is None else weights[at : at + size].to(keys.device)
        others_of, asks = stored(part), real[:, None, None, columns, None]
        got = got or [there.new_zeros(there.shape, dtype=torch.float32) for _, there in others_of]
        few = part[..., 0].numel() * end <= SCORE_ELEMENTS and end <= FEW
        for heads in [slice(None)] if few else [slice(n, n + 1) for n in range(h)]:  # no float32 copy of all keys
            row = _scores(part[:, heads], keys[:, heads, :end], shown[:, None, None], probe.softcap)
            others = [x[:, heads].masked_fill(~asks, -torch.inf) if padded else x[:, heads] for x, _ in others_of]
            sink = None if probe.sinks is None else probe.sinks.float().view(h, -1, 1)[heads]
            _softmax([row, *others], sink, padded or sink is not None)
            if reduce == "below":
                held = [n[:, heads].sum(-1)[:, :, None, None] for _, n in others_of]
                even = 1 / torch.stack(torch.broadcast_tensors(shown.sum(-1)[:, None, None], *held)).sum(0).clamp_min(1)
                small = [
                    (row < even[..., None]) & shown[:, None, None],
                    *((x < even[..., None]) & asks for x in others),
                ]
                row, others = small[0].float(), [x.float() for x in small[1:]]
            for weighed, into in zip([row, *others], [mass[:, heads, :end], *(x[:, heads] for x in got)], strict=True):
                _add(into, weighed, counts, reduce)
    return Received(mass, seen, torch.cat(got, 2) if got else None)


def _softmax(parts: list[Tensor], sink: Float[Tensor, "h m 1"] | None, some_see_nothing: bool) -> None:
    """Scores [b, h, m, x, t] become weights, in place; 0 where a query sees nothing. sink: logits that take a share."""
    top = torch.stack([x.amax(-1) for x in parts]).amax(0)
    if sink is not None:
        top = top.maximum(sink)
    if some_see_nothing:
        top = top.masked_fill(top == -torch.inf, 0.0)
    for x in parts:
        x.sub_(top[..., None]).exp_()
    total = torch.stack([x.sum(-1) for x in parts]).sum(0)
    if sink is not None:
        total = total + (sink - top).exp()
    if some_see_nothing:
        total = total.clamp_min(torch.finfo(torch.float32).tiny)
    for x in parts:
        x.div_(total[..., None])


def _add(
    into: Float[Tensor, "b h t"],
    weights: Float[Tensor, "b h m x t"],
    counts: Float[Tensor, " x"] | None,
    reduce: Reduce,
) -> None:
    """Reduce these weights into what tokens have so far."""
    if reduce == "max":
        into.copy_(torch.maximum(into, weights.amax((2, 3))))
    elif counts is None:
        into += weights.sum((2, 3))
    else:
        into += torch.einsum("bhmxt,x->bht", weights, counts)


def _seen(columns: Int[Tensor, " x"], real: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """How many queries that are tokens, at these columns, see each token."""
    at = torch.zeros(real.shape, dtype=torch.float32, device=real.device)
    at[:, columns] = real[:, columns].float()
    return at.flip(1).cumsum(1).flip(1).masked_fill_(~real, 0.0)


def _scores(queries: Tensor, keys: Tensor, seen: Tensor, softcap: float | None) -> Float[Tensor, "b h m x t"]:
    """Of queries [b, h, m, x, d] and keys [b, h, t, d]; -inf where a query does not see a key."""
    flat = queries.flatten(2, 3).to(keys.dtype)
    scores: Tensor = (flat @ keys.transpose(2, 3)).float().unflatten(2, queries.shape[2:4])
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    return scores.masked_fill_(~seen, -torch.inf)
