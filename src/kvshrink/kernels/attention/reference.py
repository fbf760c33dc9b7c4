"""Softmax attention that never needs all keys at once: fold blocks into a running sum, merge segments by log-sum-exp.

All query heads of a KV head are rows of one matmul ("x" below is query heads per KV head times new tokens). The keys
and the values of a block may be latents shared by several KV heads (G groups, G divides h; keys and values may differ
in it): all their rows then meet in one matmul. The caller gives queries that fit the latent keys, and expands latent
values once, after the weighted sum. Everything accumulates in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.shapes import Bool, Float


class Running(NamedTuple):
    """Online softmax state: highest score, sum of weights and weighted values so far."""

    top: Float[Tensor, "b h x 1"]
    mass: Float[Tensor, "b h x 1"]
    values: Float[Tensor, "b h x r"]


def start(query: Float[Tensor, "b h x d"], width: int) -> Running:
    """The state before any key: nothing seen, values of `width` channels."""
    b, h, x, _ = query.shape
    top = query.new_full((b, h, x, 1), -torch.inf)
    return Running(top, torch.zeros_like(top), query.new_zeros(b, h, x, width))


def fold(
    state: Running,
    query: Float[Tensor, "b h x d"],
    keys: Float[Tensor, "b Gk t d"],
    values: Float[Tensor, "b Gv t r"],
    visible: Bool[Tensor, "#b #h #x t"] | None,
    softcap: float | None,
    bias: Float[Tensor, "#b #h #x t"] | None = None,
) -> Running:
    """The state after one more block of t keys. The query comes scaled; a row may see nothing of a block. The bias is
    added to the scores, after the softcap."""
    scores = _by_group(query, keys.transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    top = torch.maximum(state.top, scores.amax(-1, keepdim=True))
    # a row that has seen nothing yet has top = -inf; subtracting 0 instead keeps its weights 0 rather than NaN
    base = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - base).exp() if scores.requires_grad else scores.sub_(base).exp_()
    shrink = (state.top - base).exp()
    read = _by_group(weights, values)
    return Running(top, state.mass * shrink + weights.sum(-1, keepdim=True), state.values * shrink + read)


def _by_group(rows: Float[Tensor, "b h x i"], shared: Float[Tensor, "b G i j"]) -> Float[Tensor, "b h x j"]:
    """rows @ shared, where a group's heads share one matrix."""
    groups, (h, x) = shared.shape[1], rows.shape[1:3]
    out = rows.unflatten(1, (groups, -1)).flatten(2, 3) @ shared
    found: Tensor = out.unflatten(2, (h // groups, x)).flatten(1, 2)
    return found


def finish(state: Running) -> tuple[Float[Tensor, "b h x r"], Float[Tensor, "b h x 1"]]:
    """Normalised output and its log-sum-exp; a row that saw nothing gives 0 and -inf."""
    mass = state.mass.clamp_min(1e-30)
    return state.values / mass, state.top + mass.log()


def join(
    parts: list[tuple[Float[Tensor, "b h x d"], Float[Tensor, "b h x 1"]]],
) -> tuple[Float[Tensor, "b h x d"], Float[Tensor, "b h x 1"]]:
    """(output, log-sum-exp) over the union of segments, to be merged with others."""
    return merge(parts), torch.stack([lse for _, lse in parts]).logsumexp(0) if len(parts) > 1 else parts[0][1]


def merge(
    parts: list[tuple[Float[Tensor, "b h x d"], Float[Tensor, "b h x 1"]]],
) -> Float[Tensor, "b h x d"]:
    """Attention over the union of segments, from each segment's own output and log-sum-exp."""
    if len(parts) == 1:
        return parts[0][0]
    # a row no segment shows anything to has weight 0 / 0; it is a left pad, whose output nobody reads
    if len(parts) == 2:  # nearly all steps: half as many operations
        (one, of_one), (two, of_two) = parts
        share = (of_one - of_two).sigmoid().nan_to_num(0.0)
        return torch.lerp(two.to(share.dtype), one.to(share.dtype), share)
    lse = torch.stack([p[1] for p in parts])
    shares = torch.softmax(lse, 0).nan_to_num(0.0)
    found: Tensor = sum(out * w for (out, _), w in zip(parts, shares, strict=True))
    return found
