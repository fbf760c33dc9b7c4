"""What a dropped token did is not lost: keys and values that stay are changed until they attend as all did (Attention
Matching, arXiv 2602.16284), as far as some queries can tell.

Of each head three steps, none of which needs a gradient of the model. How much more each kept key must weigh, so that
all of them together get the share of attention that the whole block has: least squares within bounds. A direction of
the head in which every query has about the same length: a key moved along it weighs more with all of them. The values
with which the outputs are those of the whole block: ridge regression around the values that were there.

Departures: the paper stores the weight as a bias of each token's score, which no codec and no kernel has; moved keys
cost no byte and may be stored by any method. Squares are of a head's whole output, sinks and window beside the block,
so that a query which hardly reads the block counts as little.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvshrink.cache.rope import Rope
from kvshrink.shapes import Bool, Float, Int

BOUND = 1.0  # how much a key's logit may change, natural logarithm
STEPS = 200  # of the least squares within bounds
AHEAD = 128  # positions behind a prompt from which it is looked at
RIDGE = 1e-2  # of a mean square, towards what was there
SCORES = 2**24  # alive at a time


class Rest(NamedTuple):
    """What queries see beside the block: sinks and window. real: which of them are tokens."""

    keys: Float[Tensor, "b h r d"]
    values: Float[Tensor, "b h r e"]
    real: Bool[Tensor, "b r"]


def behind(
    queries: Float[Tensor, "b h m d"], read: Int[Tensor, "b m"], last: Int[Tensor, " b"], rope: Rope
) -> Float[Tensor, "b h m d"]:
    """Queries that read a prompt again at these positions, as if they came next behind its last one: what comes next
    looks at the prompt's end from near."""
    order = torch.arange(queries.shape[2], device=queries.device) % AHEAD
    return rope.apply(rope.undo(queries, read), last[:, None] + 1 + order)


@dataclass(frozen=True, eq=False)
class Matching:
    """By these queries, as attention uses them, times its scale. nothing: of each, the logit of no token."""

    queries: Float[Tensor, "b h m d"]
    rest: Rest
    softcap: float | None = None
    nothing: Float[Tensor, "b h m"] | None = None

    def run(
        self,
        keys: Float[Tensor, "b h t d"],
        values: Float[Tensor, "b h t e"],
        stays: Bool[Tensor, "b L t"],
        there: Bool[Tensor, "b L t"],
    ) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t e"]]:
        """Keys and values, those that stay as they must be where the others are gone. there: which are tokens at
        all."""
        each = keys.shape[1] // stays.shape[1]  # heads of a lane
        keys, values = keys.clone(), values.clone()
        for row, head in ((r, n) for r in range(len(keys)) for n in range(keys.shape[1])):
            own, real = stays[row, head // each], there[row, head // each]
            kept, block = own.nonzero()[:, 0], real.nonzero()[:, 0]
            if not len(kept) or len(kept) == len(block):
                continue
            beside = self.rest.real[row]
            found = matched(
                self.queries[row, head].float(),
                keys[row, head, block].float(),
                values[row, head, block].float(),
                torch.searchsorted(block, kept),
                self.rest.keys[row, head, beside].float(),
                self.rest.values[row, head, beside].float(),
                self.softcap,
                None if self.nothing is None else self.nothing[row, head, :, None],
            )
            keys[row, head, kept], values[row, head, kept] = (x.to(keys.dtype) for x in found)
        return keys, values


def matched(
    queries: Float[Tensor, "m d"],
    keys: Float[Tensor, "t d"],
    values: Float[Tensor, "t e"],
    kept: Int[Tensor, " k"],
    rest_keys: Float[Tensor, "r d"],
    rest_values: Float[Tensor, "r e"],
    softcap: float | None = None,
    nothing: Float[Tensor, "m 1"] | None = None,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k e"]]:
    """Keys and values of the kept tokens with which these queries see what they saw of all."""
    every, rows = torch.cat([keys, rest_keys]), torch.cat([values, rest_values])
    whole, share, out = _seen(queries, every, rows, len(keys), softcap, nothing)
    old = keys[kept]
    gain = bounded_gains((_scores(queries, old, softcap) - whole).exp(), share)
    moved = old + gain[:, None] * _direction(queries, share)
    scores = _scores(queries, torch.cat([moved, rest_keys]), softcap)
    own, others = (scores - _sum(scores, nothing)).exp().tensor_split([len(kept)], 1)
    return moved, values[kept] + _ridge(own, out - others @ rest_values - own @ values[kept], share)


def _seen(
    queries: Tensor, keys: Tensor, values: Tensor, block: int, softcap: float | None, nothing: Tensor | None
) -> tuple[Float[Tensor, "m 1"], Float[Tensor, " m"], Float[Tensor, "m e"]]:
    """Of each query: the logarithm of its sum, the share that the first `block` keys have of that, its output."""
    parts, size = [], max(1, SCORES // len(keys))
    for at in range(0, len(queries), size):
        own = slice(at, at + size)
        scores = _scores(queries[own], keys, softcap)
        whole = _sum(scores, None if nothing is None else nothing[own])
        weights = (scores - whole).exp()
        parts.append((whole, weights[:, :block].sum(1), weights @ values))
    whole, share, out = (torch.cat(x) for x in zip(*parts, strict=True))
    return whole, share, out


def _sum(scores: Float[Tensor, "m t"], nothing: Float[Tensor, "m 1"] | None) -> Float[Tensor, "m 1"]:
    """Its logarithm."""
    whole: Tensor = scores.logsumexp(1, keepdim=True)
    return whole if nothing is None else torch.logaddexp(whole, nothing)


def _scores(queries: Float[Tensor, "m d"], keys: Float[Tensor, "t d"], softcap: float | None) -> Float[Tensor, "m t"]:
    scores: Tensor = queries @ keys.T
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def bounded_gains(weights: Float[Tensor, "m k"], share: Float[Tensor, " m"]) -> Float[Tensor, " k"]:
    """Logarithms g, at most BOUND either way, with which weights @ exp(g) is nearest to the share; a little towards 0
    where they do not matter. By accelerated projected gradients, each key in its own unit."""
    unit = weights.norm(dim=0).clamp_min(1e-12)
    a, low, high = weights / unit, unit * torch.e**-BOUND, unit * torch.e**BOUND
    small = 1e-3

    def product(x: Tensor) -> Tensor:
        found: Tensor = a.T @ (a @ x) + small * x
        return found

    most = torch.ones_like(unit)
    for _ in range(10):
        most = product(most) / product(most).norm()
    rate = 1 / (1.05 * float(most @ product(most)))
    aim = a.T @ share + small * unit
    now = ahead = unit
    pace = 1.0
    for _ in range(STEPS):
        after = (ahead - rate * (product(ahead) - aim)).clamp(low, high)
        faster = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        now, ahead, pace = after, after + (pace - 1) / faster * (after - now), faster
    gains: Tensor = (now / unit).log()
    return gains


def _direction(queries: Float[Tensor, "m d"], share: Float[Tensor, " m"]) -> Float[Tensor, " d"]:
    """Along which queries that read the block have length 1, as nearly as one can have it."""
    own = queries * share[:, None]
    square = queries.T @ own
    square.diagonal().add_(RIDGE * square.diagonal().mean() + 1e-9)
    found: Tensor = torch.linalg.solve(square, own.sum(0))
    return found


def _ridge(
    weights: Float[Tensor, "m k"], wanted: Float[Tensor, "m e"], share: Float[Tensor, " m"]
) -> Float[Tensor, "k e"]:
    """x, no larger than it needs to be, with which weights @ x is nearest to what is wanted. What these queries hardly
    read is held as if all had their share alike: else what is small would be made up for by values without bound."""
    m, k = weights.shape
    square = weights.T @ weights if k <= m else weights @ weights.T
    square.diagonal().add_(RIDGE * max(float(weights.square().sum()) / k, float(share.square().sum()) / k**2) + 1e-9)
    found: Tensor = torch.linalg.solve(square, weights.T @ wanted if k <= m else wanted)
    return found if k <= m else weights.T @ found
