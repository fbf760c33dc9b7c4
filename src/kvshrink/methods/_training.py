"""How a method's bases are trained after their closed form: what fit/train.py asks of a method."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["rows", "output", "kl"]


@dataclass(frozen=True)
class Training:
    """Training of the bases that `fit_layer` gives: "key_up" [G, r, a], "key_mean" [G, a] and "key_down" [G, a, r]
    (where there is none, key_up^T), and the same of values. `codecs` makes a PackedCodec of them.

    loss:   "rows" (reconstruction of the layer's keys and values), "output" (of its attention output), "kl" (all
            layers jointly, on the model's predictions, which needs the whole model in memory).
    steps, lr: of the optimiser; lr decays linearly to 0.
    qat:    whether a step's latents are rounded as pages round them (quantisation-aware training).
    rounds: whether pages round latents: held-out rows are always read as a cache holds them.
    ranks:  shares of the rank, of which every step draws one for keys and one for values (matryoshka).
    """

    loss: Objective
    steps: int
    lr: float
    qat: bool
    rounds: bool
    ranks: tuple[float, ...] = (1.0,)
