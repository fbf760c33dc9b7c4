"""Muon for the matrices of the layers, AdamW for the embedding and the norms.

Muon (arXiv 2502.16982 scales its update like AdamW's) learns the matrices in fewer steps than AdamW at this size; the
embedding is a table, not a map between activations, so orthogonal updates have no meaning for it.
"""

import torch
from transformers import LlamaForCausalLM

EMBEDDING_RATE = 3e-3
DECAY = 0.02


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in named if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=lr, momentum=0.95, nesterov=True, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=EMBEDDING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for group in muon.param_groups + adam.param_groups:
        group["base_lr"] = group["lr"]
    return [muon, adam]


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> float:
    """Scale every learning rate from its base; return Muon's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
    return optimizers[0].param_groups[0]["lr"]
