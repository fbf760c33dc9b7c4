"""Stages of growing length, the learning rate, and the budget that turns tokens or minutes into progress.

Everything that changes during training is a function of progress, from 0 to 1, so the same recipe runs in a minute or
in a day. The first stage is a bootstrap: short rows and small batches, so that induction heads form early.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

WARMUP_STEPS = 60
COOLDOWN = 0.6  # progress from which the learning rate falls to zero
LEAST_RATE = 0.02


class Stage(NamedTuple):
    end: float  # progress at which the stage ends
    length: int  # tokens in a row
    share: float  # factor on the tokens in a batch


STAGES = (
    Stage(0.08, 128, 0.25),
    Stage(0.28, 256, 0.25),
    Stage(0.57, 512, 0.5),
    Stage(0.75, 1024, 0.5),
    Stage(0.86, 2048, 0.5),
    Stage(1.0, 4096, 0.5),
)


def stages(context: int) -> list[Stage]:
    """STAGES cut off at the context. For a longer context, the last stage is shared out among the doublings."""
    *first, last = (s._replace(length=min(s.length, context)) for s in STAGES)
    lengths = [last.length]
    while lengths[-1] < context:
        lengths.append(min(2 * lengths[-1], context))
    begin = first[-1].end
    ends = [begin + (last.end - begin) * (i + 1) / len(lengths) for i in range(len(lengths) - 1)] + [last.end]
    return [*first, *(last._replace(end=e, length=n) for e, n in zip(ends, lengths, strict=True))]


def stage_at(progress: float, context: int) -> Stage:
    return next(s for s in stages(context) if progress < s.end)


def rate(step: int, progress: float) -> float:
    """Factor on the learning rates: up over the first steps, down to LEAST_RATE from COOLDOWN on."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cool = 1.0 if progress < COOLDOWN else max(0.0, (1 - progress) / (1 - COOLDOWN))
    return warm * max(cool, LEAST_RATE)


@dataclass(frozen=True)
class Budget:
    """Tokens to train on, or minutes of training (measuring and saving are not charged)."""

    tokens: float = math.inf
    minutes: float = math.inf

    def progress(self, tokens: int, seconds: float) -> float:
        return min(1.0, max(tokens / self.tokens, seconds / (60 * self.minutes)))
