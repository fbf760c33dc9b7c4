"""What it costs a model if a head sees no more than a span of recent tokens (MoA, arXiv 2406.14909).

To first order the loss changes by the sum of dL/dA x (change of A): what lies outside the span is gone, and what is
left grows to a sum of 1. The loss is of tokens that repeat a passage from far back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.families import LayerInfo
from kvshrink.fit.attention import attending, near
from kvshrink.fit.fisher import only
from kvshrink.fit.recall import REPEATED
from kvshrink.methods._token_probe import Rule
from kvshrink.shapes import Float, Int


def span_costs(
    model: Any,
    infos: Mapping[int, LayerInfo],
    rows: Int[Tensor, "rows length"],
    rules: Sequence[Rule],
    sinks: int,
    row_done: Callable[[], Any] = lambda: None,
) -> dict[int, Float[Tensor, "r h"]]:
    """Expected rise of the loss, by rule and KV head, the mean over rows."""
    total = {i: torch.zeros(len(rules), info.heads) for i, info in infos.items()}
    length, tail = rows.shape[1], rows.shape[1] // REPEATED
    kept: dict[int, Tensor] = {}
    hidden = ~torch.ones(length, length, dtype=torch.bool, device=rows.device).tril()

    def watched(i: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        m = query.shape[1] // key.shape[1]
        scores = (query @ key.repeat_interleave(m, 1).transpose(2, 3)).float() * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        kept[i] = weights
        return weights.to(value.dtype) @ value.repeat_interleave(m, 1)

    with only(model, []), torch.inference_mode(False), torch.enable_grad(), attending(model, infos, watched):
        for row in rows[:, None]:
            embedded = model.get_input_embeddings()(row).detach().requires_grad_(True)
            logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=tail + 1).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), row[0, -tail:])
            gradients = torch.autograd.grad(loss, [kept[i] for i in infos])
            for i, gradient in zip(infos, gradients, strict=True):
                total[i] += _rise(kept[i].detach()[0], gradient[0], rules, sinks, infos[i].heads) / len(rows)
            kept.clear()
            row_done()
    return total


def _rise(
    weights: Float[Tensor, "q s s"], gradient: Float[Tensor, "q s s"], rules: Sequence[Rule], sinks: int, heads: int
) -> Float[Tensor, "r h"]:
    """Of one layer, the rules one after the other."""
    found = []
    for rule in rules:
        shown = near(weights.shape[1], sinks, rule.span(weights.shape[1]), weights.device)
        left = weights * shown
        renewed = left / left.sum(-1, keepdim=True).clamp_min(1e-30)
        rise = (gradient * (renewed - weights)).sum((1, 2))
        found.append(rise.unflatten(0, (heads, -1)).sum(1).cpu())
    return torch.stack(found)
