"""How much each KV head needs what is neither among the first tokens nor among the recent ones (DuoAttention, arXiv
2410.10819): a gate per head between full and streaming attention, trained while the model stays as it is.

The loss is what the model's last hidden states lose where it repeats a passage from far back, over their size, and
REGULAR times the mean gate.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvshrink.attach.families import LayerInfo, text_tower
from kvshrink.errors import DataError
from kvshrink.fit.attention import attending, by_head, near
from kvshrink.fit.fisher import only
from kvshrink.fit.recall import REPEATED
from kvshrink.shapes import Float, Int

REGULAR, RATE = 0.05, 0.02


def head_gates(
    model: Any,
    infos: Mapping[int, LayerInfo],
    rows: Int[Tensor, "rows length"],
    sinks: int,
    recent: int,
    steps: int,
    step_done: Callable[[], Any] = lambda: None,
) -> dict[int, Float[Tensor, " h"]]:
    """Gates from 0 (streams) to 1 (needs all) by layer, after so many steps of a row each."""
    gates = {i: torch.ones(info.heads, device=rows.device, requires_grad=True) for i, info in infos.items()}
    shown = near(rows.shape[1], sinks, recent, rows.device)

    def gated(i: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        full = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        stream = scaled_dot_product_attention(query, key, value, shown, scale=scale, enable_gqa=True)
        share = by_head(gates[i], query).to(full.dtype)
        return share * full + (1 - share) * stream

    tower, tail = text_tower(model), rows.shape[1] // REPEATED
    optimizer = torch.optim.Adam(list(gates.values()), lr=RATE)
    with only(model, []), torch.inference_mode(False), torch.enable_grad():
        for step in range(steps):
            row = rows[step % len(rows)][None]
            with torch.no_grad():
                wanted = tower(input_ids=row, use_cache=False).last_hidden_state[:, -tail:].float()
            with attending(model, infos, gated):
                found = tower(input_ids=row, use_cache=False).last_hidden_state[:, -tail:].float()
            lost = (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)
            loss = lost + REGULAR * torch.stack([g.mean() for g in gates.values()]).mean()
            if not bool(loss.isfinite()):
                raise DataError("hidden states are NaN or infinite on the calibration text. Check the weights.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for gate in gates.values():
                    gate.clamp_(0, 1)
            step_done()
    return {i: g.detach().cpu() for i, g in gates.items()}
