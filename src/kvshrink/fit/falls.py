"""What each layer's keys and values add to the model's KL where all layers are lossy at once.

KL is followed from the rows as codecs give them towards the exact ones. Near no loss it is a square of the errors e,
sum of e_i H_ij e_j; half its slope along e_i is then the part of operand i, whatever it shares with others in it, and
the parts add up to the whole. One gradient gives those of all operands.

The rows are calibration text at its end: of half a passage is repeated, so that a model must find it in its cache, the
others just go on. A few of them answer at a time, other ones each turn.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from kvshrink.attach.fill import held_by
from kvshrink.errors import DataError
from kvshrink.fit.fisher import only
from kvshrink.fit.reader import Reader
from kvshrink.methods._roles import Codec
from kvshrink.methods._stats import KVS, Parts
from kvshrink.shapes import Float, Int

ROWS, LENGTH, TAIL = 16, 1024, 12  # rows, their tokens, and how many tails are a row
TURN = 4  # rows that answer at a time
TINY = 1e-7  # nats; below it nothing was lost: float32 says no more
Codecs = Mapping[int, tuple[Codec | None, Codec | None]]


@dataclass(frozen=True)
class Turn:
    """Some rows: the exact cache of what comes before their tails, and what the exact model predicts for these."""

    exact: DynamicCache
    tail: Int[Tensor, "b s"]
    wanted: Float[Tensor, "b s v"]


@final
class Falls:
    """`made`: rows whose last `tail` tokens are read through codecs, every other one a repetition."""

    @torch.no_grad()
    def __init__(self, reader: Reader, made: Int[Tensor, "rows length"], tail: int) -> None:
        self.reader = reader
        self.turns = []
        for part in made.split(TURN):
            exact = reader.prefill(part[:, :-tail])
            self.turns.append(Turn(exact, part[:, -tail:], reader.predict(exact, {}, part[:, -tail:])))

    def parts(self, codecs: Codecs, number: int) -> Parts:
        """KL of the `number`th turn's rows, and the part of each operand that is read through a codec, the mean of both
        kinds of rows. Raises DataError if there is no gradient."""
        turn = self.turns[number % len(self.turns)]
        model = self.reader.model
        with torch.no_grad():
            cache: Any = self.reader.lossy(turn.exact, codecs)
        leaves = {}
        for i, pair in codecs.items():
            layer = cache.layers[i]
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            for kv, codec, rows in zip(KVS, pair, (layer.keys, layer.values), strict=True):
                if codec is not None:
                    leaves[i, kv] = rows.requires_grad_(True)
        # on CPUs the fused attention takes most of the time to go backwards
        plain = sdpa_kernel(SDPBackend.MATH) if turn.tail.device.type == "cpu" else nullcontext()
        with only(model, []), torch.enable_grad(), plain:
            kl = _kl(turn, model(input_ids=turn.tail, past_key_values=cache).logits)
            found = _gradient(_loss(kl), list(leaves.values()))
        exact = {(i, kv): rows for i in codecs for kv, rows in zip(KVS, held_by(turn.exact.layers[i]), strict=True)}
        parts = {
            at: float((slope.float() * (rows.detach() - exact[at]).float()).sum()) / 2
            for (at, rows), slope in zip(leaves.items(), found, strict=True)
        }
        if not all(map(math.isfinite, (lost := float(kl.detach().mean()), *parts.values()))):
            raise DataError("the model's predictions are NaN or infinite on the calibration text. Check the weights.")
        return Parts(max(0.0, lost), parts)


def _gradient(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Raises DataError where an operation of the model has none. torch says that as a RuntimeError, which memory that
    runs out is too."""
    try:
        return torch.autograd.grad(loss, leaves)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise DataError(
            f"the model has no gradient ({str(error)[:80]}). Use what needs none, as spectral:allocation=energy."
        ) from error


def _kl(turn: Turn, logits: Float[Tensor, "b s v"]) -> Float[Tensor, " b"]:
    """Of each row, in nats a token."""
    found = logits.float().log_softmax(-1)
    return (turn.wanted.exp() * (turn.wanted - found)).sum(-1).mean(-1)


def _loss(kl: Float[Tensor, " b"]) -> Tensor:
    """Mean of the logarithms of KL over the repetitions and over the other rows: neither counts more."""
    kinds = [k for k in (kl[::2], kl[1::2]) if len(k)]
    return torch.stack([k.mean().clamp_min(TINY).log() for k in kinds]).mean()
