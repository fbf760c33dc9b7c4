"""One attention layer with random keys and values, and what methods would have learnt from such rows."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from kvshrink.cache.rope import Rope
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import CalibrationStats, LayerShape, Moments

MODELS = {"llama-3.1-8b": (32, 8, 128, 5e5), "llama-2-7b": (32, 32, 128, 1e4)}  # q heads, KV heads, head dim, theta


class Layer:
    """Keys and values of `tokens` tokens and those, with a query, of one more. Seed 0."""

    def __init__(self, model: str, tokens: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.q_heads, self.heads, self.d, theta = MODELS[model]
        self.tokens, self.batch, self.device = tokens, batch, device
        self.shape = LayerShape(self.heads, self.d, dtype)
        self.module = torch.nn.Module()
        self.module.num_key_value_groups = self.q_heads // self.heads
        self.rope = Rope(theta ** (-torch.arange(0, self.d, 2, device=device).float() / self.d), 1.0, False)
        g = torch.Generator(device).manual_seed(0)

        def rows(heads: int, count: int) -> Tensor:
            return torch.randn(batch, heads, count, self.d, generator=g, device=device, dtype=dtype)

        self.keys, self.values = rows(self.heads, tokens), rows(self.heads, tokens)
        self.key, self.value, self.query = rows(self.heads, 1), rows(self.heads, 1), rows(self.q_heads, 1)

    def exact(self, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the query in float32, [b, q, 1, d], one KV head at a time to keep it small."""
        group, outs = self.q_heads // self.heads, []
        for h in range(self.heads):
            query = self.query[:, h * group : (h + 1) * group, 0].float()
            weights = torch.softmax(query @ keys[:, h].float().transpose(1, 2) * self.d**-0.5, -1)
            outs.append(weights @ values[:, h].float())
        return torch.cat(outs, 1)[:, :, None]


def fitted(method: Method, shape: LayerShape) -> dict[str, Tensor]:
    """What the method learns of a layer whose directions have variances 1 / k. Speed and bytes do not depend on them,
    but for spectral, which gives few bits to small directions."""
    found = method.fit_layer(replace(_facts(shape.heads, shape.head_dim), shape=shape))
    return method.finish({0: found}, {0: shape}, None)[0][0]


@cache
def _facts(heads: int, d: int) -> CalibrationStats:
    n, hidden = heads * d, 64
    g = torch.Generator().manual_seed(1)

    def moments() -> Moments:
        directions = torch.linalg.qr(torch.randn(n, n, generator=g)).Q
        variances = 1 / torch.arange(1, n + 1)
        return Moments(1, torch.randn(n, generator=g) * 0.1, directions * variances @ directions.T)

    half = torch.arange(d // 2)
    return CalibrationStats(
        LayerShape(heads, d, torch.float32),
        moments(),
        moments(),
        torch.ones(hidden),
        torch.randn(n, hidden, generator=g),
        torch.randn(n, hidden, generator=g),
        query_energy=torch.ones(heads, d),
        output_gram=torch.eye(d).expand(heads, d, d),
        pairs=(half, half + d // 2),
    )
