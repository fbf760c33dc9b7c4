"""Train fitted bases on a loss, and keep the result only where it beats its start on rows it was not trained on.

Optimiser as in CSKV (arXiv 2409.10593, 3.3): AdamW, linear decay, gradient norm 1, one row a step, in float32. Every
step draws one of `Training.ranks` for keys and one for values (arXiv 2410.14731), so that leading components are good
by themselves. The start's moments include the held-out rows, which favours the start: a doubtful training is not kept.
Held-out losses are read through the quantiser also where training is not, since that is what a cache holds.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf, isfinite

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kvshrink.errors import DataError
from kvshrink.fit.curve import curve
from kvshrink.fit.soft import Soft
from kvshrink.methods._codecs.basis import leading
from kvshrink.methods._codecs.packed import PackedCodec
from kvshrink.methods._roles import Fitted, Method
from kvshrink.methods._stats import KVS, LayerShape
from kvshrink.methods._training import Training

HELD = 0.1  # share of the rows that is never trained on
SEED = 0

Codecs = Mapping[int, tuple[Soft, Soft]]  # key codec and value codec per layer
Basis = dict[int, dict[str, Tensor]]  # tensors per layer


class Loss(ABC):
    """What is trained on. Rows 0 .. trained - 1 are for training, the next `held` ones for the guard alone."""

    trained: int
    held: int

    @abstractmethod
    def __call__(self, codecs: Codecs, row: int) -> Tensor:
        """Loss of one row, where the layers' keys and values are read through these codecs."""


def split(rows: int) -> tuple[int, int]:
    """(rows to train on, rows to hold out: the last ones)."""
    held = max(1, round(HELD * rows))
    return rows - held, held


def train(
    method: Method,
    training: Training,
    layers: Mapping[int, Fitted],
    shapes: Mapping[int, LayerShape],
    loss: Loss,
    label: str,
    progress: bool,
    log_with: str | None = None,
) -> tuple[Basis, dict]:
    """(tensors per layer, record): trained ones, or those given if they are better on the held-out rows.

    layers: as `Training` names them. training: the method's own.
    """
    params = {i: _parameters(fitted) for i, fitted in layers.items()}
    losses = _optimise(method, training, params, shapes, loss, label, progress, log_with)
    trained = {i: {**layers[i], **{k: p.detach() for k, p in params[i].items()}} for i in layers}
    before, after = (_held_out(method, training, tensors, shapes, loss) for tensors in (layers, trained))
    better = after < before  # False for NaN
    record = {
        "loss": [losses[0], losses[-1]],
        "curve": curve(losses),
        "held_out": {"closed form": _plain(before), "trained": _plain(after)},
        "kept": "trained" if better else "closed form",
    }
    return trained if better else {i: dict(fitted) for i, fitted in layers.items()}, record


def _parameters(fitted: Fitted) -> dict[str, nn.Parameter]:
    """What is trained: every basis with its own decoder, also where they start as one orthonormal matrix."""
    start = {k: fitted[k] for kv in KVS for k in (f"{kv}_up", f"{kv}_mean")}
    for kv in KVS:
        start[f"{kv}_down"] = fitted.get(f"{kv}_down", fitted[f"{kv}_up"].transpose(1, 2))
    return {k: nn.Parameter(t.detach().float().clone(memory_format=torch.contiguous_format)) for k, t in start.items()}


def _optimise(
    method: Method,
    training: Training,
    params: Mapping[int, dict[str, nn.Parameter]],
    shapes: Mapping[int, LayerShape],
    loss: Loss,
    label: str,
    progress: bool,
    log_with: str | None,
) -> list[float | None]:
    """Loss per step; ends early where it is no number any more."""
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=log_with, project_dir="." if log_with else None)
    if log_with:
        accelerator.init_trackers("kvshrink")
    every = [p for layer in params.values() for p in layer.values()]
    optimizer = torch.optim.AdamW(every, lr=training.lr, betas=(0.9, 0.999), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / training.steps))
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    draw, losses = random.Random(SEED), []
    with tqdm(total=training.steps, desc=label, leave=False, disable=not progress) as bar, torch.enable_grad():
        for step in range(training.steps):
            shares = [draw.choice(training.ranks) for _ in KVS]
            value = _value(method, params, shapes, loss, step % loss.trained, shares, training.qat)
            losses.append(_plain(float(value.detach())))
            if losses[-1] is None:
                break
            accelerator.backward(value)
            accelerator.clip_grad_norm_(every, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if log_with:
                accelerator.log({label: losses[-1]}, step=step)
            bar.update()
    if log_with:
        accelerator.end_training()
    return losses


@torch.no_grad()
def _held_out(
    method: Method, training: Training, layers: Mapping[int, Fitted], shapes: Mapping[int, LayerShape], loss: Loss
) -> float:
    """Mean loss of the held-out rows, as a cache would read them; over all ranks that are trained."""
    rows = range(loss.trained, loss.trained + loss.held)
    found = [
        float(_value(method, layers, shapes, loss, row, (s, s), training.rounds))
        for row in rows
        for s in training.ranks
    ]
    return sum(found) / len(found)


def _value(method: Method, layers: Mapping, shapes: Mapping, loss: Loss, row: int, shares, rounds: bool) -> Tensor:
    """The loss with shares of the components of keys and values; infinity where a quantiser cannot take them."""
    codecs = {}
    for i, fitted in layers.items():
        tensors = dict(fitted)
        for kv, share in zip(KVS, shares, strict=True):
            if share < 1:
                tensors |= leading(tensors, kv, max(1, int(share * tensors[f"{kv}_up"].shape[1])))
        key, value = method.codecs(shapes[i], tensors) or (None, None)
        assert isinstance(key, PackedCodec)
        assert isinstance(value, PackedCodec)
        codecs[i] = (Soft(key, rounds), Soft(value, rounds))
    try:
        return loss(codecs, row)
    except DataError:
        return torch.tensor(inf)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient to the model's own weights, so that nothing is kept for it."""
    was = [(p, p.requires_grad) for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in was:
            parameter.requires_grad_(required)


def _plain(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if isfinite(value) else None
