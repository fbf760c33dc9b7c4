"""Tables of levels fitted to numbers: weighted k-means on a line, and the shift that restores mean and deviation."""

import torch
from torch import Tensor

from kvshrink.kernels.nearest import nearest
from kvshrink.shapes import Float

ROUNDS = 200
SETTLED = 1e-6  # of the numbers' range: levels that move less do not move


def fitted(numbers: Float[Tensor, " n"], weights: Float[Tensor, " n"], count: int) -> Float[Tensor, " count"]:
    """Levels of least weighted squared error, by Lloyd's iterations from the quantiles of the weights.

    Sorted numbers and running sums: a round costs `count` look-ups, not a pass over the numbers.
    """
    order = numbers.argsort()
    x, w = numbers[order].double(), weights[order].double()
    mass = torch.cat([w.new_zeros(1), w.cumsum(0)])
    moment = torch.cat([w.new_zeros(1), (w * x).cumsum(0)])
    shares = (torch.arange(count, device=x.device) + 0.5) / count * mass[-1]
    levels = x[torch.searchsorted(mass, shares).sub(1).clamp(0, len(x) - 1)]
    for _ in range(ROUNDS):
        ends = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        cuts = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(x))])
        within = mass[cuts].diff()
        means = torch.where(within > 0, moment[cuts].diff() / within.clamp_min(1e-300), levels)
        moved, levels = (means - levels).abs().max(), means
        if moved <= SETTLED * (x[-1] - x[0]):
            break
    return levels.float()


def normed(levels: Float[Tensor, " levels"], numbers: Float[Tensor, " n"]) -> Float[Tensor, " levels"]:
    """KVQuant's Q-Norm: levels shifted and scaled so that decoded numbers have the mean and deviation of the numbers.

    Codes are still chosen by the levels as they were.
    """
    decoded = levels[nearest(numbers, levels).int()].double()
    (m1, s1), (m2, s2) = ((x.mean(), x.std()) for x in (numbers.double(), decoded))
    ratio = torch.where(s2 > 0, s1 / s2.clamp_min(1e-300), 1.0)
    return (levels.double() * ratio + (m1 - m2 * ratio)).float()
