"""CSKV's own training (arXiv 2409.10593, 3.3): fit the factors of one layer to rebuild its keys and values.

Teacher-forced and layer by layer: the targets are the original keys and values, so layers are independent. The loss is
the mean squared error of both (before RoPE, which is orthogonal). AdamW, linear decay, gradient norm 1. With `qat` the
latents pass through the quantiser with a straight-through gradient. Departure: the encoder acts on the key (n x r), not
on the layer input (hidden x r); the optimum is the same, as a key that is rebuilt from x is rebuilt from the key alone.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from kvshrink.methods._roles import LayerShape
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.shapes import Float


def train_layer(
    method: CSKV,
    shape: LayerShape,
    fitted: dict[str, Tensor],
    keys: Float[Tensor, "rows h t d"],
    values: Float[Tensor, "rows h t d"],
    label: str,
    progress: bool,
    log_with: str | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """(trained tensors, loss per step). One row of the calibration is one batch, as in the paper."""
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=log_with, project_dir="." if log_with else None)
    if log_with:
        accelerator.init_trackers("kvshrink")
    params = {k: torch.nn.Parameter(t.clone()) for k, t in fitted.items() if k.endswith(("_up", "_mean"))}
    for side in ("key", "value"):
        down = fitted.get(f"{side}_down", fitted[f"{side}_up"].transpose(1, 2))
        params[f"{side}_down"] = torch.nn.Parameter(down.clone().contiguous())
    optimizer = torch.optim.AdamW(params.values(), lr=method.lr, betas=(0.9, 0.999), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / method.steps))
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    usable = keys.shape[2] // method.page * method.page
    losses = []
    with tqdm(total=method.steps, desc=label, leave=False, disable=not progress) as bar, torch.enable_grad():
        for step in range(method.steps):
            row = slice(step % len(keys), step % len(keys) + 1)
            codecs = method.codecs(shape, params)
            losses_kv = [_error(c, x[row, :, :usable], method.qat) for c, x in zip(codecs, (keys, values), strict=True)]
            loss = torch.stack(losses_kv).sum()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if log_with:
                accelerator.log({label: losses[-1]}, step=step)
            bar.update()
    if log_with:
        accelerator.end_training()
    return fitted | {k: p.detach() for k, p in params.items()}, losses


def _error(codec, rows: Tensor, qat: bool) -> Tensor:
    rows = rows.float()
    latent = codec.project(rows)
    latent = codec.packing.fake(latent) if qat else latent
    return (codec.expand(latent, rows.shape[1]) - rows).square().mean()
