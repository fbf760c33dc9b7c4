"""What a method may learn a layer from, made of random rows."""

import pytest
import torch

from kvshrink.cache.rope import Rope
from kvshrink.fit.statistics import MomentStream
from kvshrink.methods._stats import CalibrationStats, LayerShape, Sample


@pytest.fixture
def stats_of():
    """A function from a layer's shape (and perhaps key and value rows [tokens, n], and the channels that RoPE rotates
    together, all of a head's halves by default) to its CalibrationStats."""

    def make(shape: LayerShape, keys=None, values=None, hidden: int = 12, pairs="half") -> CalibrationStats:
        g = torch.Generator().manual_seed(7)
        n = shape.width
        mixing = torch.randn(n, n, generator=g)  # channels that vary together, as a model's do
        keys = torch.randn(300, n, generator=g) @ mixing + 1 if keys is None else keys
        values = torch.randn(300, n, generator=g) @ mixing - 1 if values is None else values
        moments = []
        for rows in (keys, values):
            stream = MomentStream()
            for part in rows.split(100):
                stream.add(part)
            moments.append(stream.moments())
        weights = torch.randn(2, n, hidden, generator=g)
        energy = torch.rand(shape.heads, shape.head_dim, generator=g).double() + 0.1
        output = torch.randn(shape.heads, 2 * hidden, shape.head_dim, generator=g).double()
        gram = output.transpose(1, 2) @ output
        half = torch.arange(shape.head_dim // 2)
        return CalibrationStats(
            shape,
            *moments,
            torch.rand(hidden, generator=g),
            weights[0],
            weights[1],
            query_energy=energy,
            output_gram=gram,
            pairs=(half, half + len(half)) if pairs == "half" else pairs,
            sample=sample(shape, keys, values, g),
        )

    return make


def sample(shape: LayerShape, keys: torch.Tensor, values: torch.Tensor, g: torch.Generator) -> Sample:
    """The rows, keys with a RoPE of halves, and two query heads for each KV head."""
    d = shape.head_dim
    count = min(len(keys), len(values))
    heads = [x[:count].unflatten(1, (shape.heads, d)).float() for x in (keys, values)]
    rope = Rope(1e4 ** (-torch.arange(0, d - 1, 2).float() / d), 1.0, False)
    rotated = rope.apply(heads[0].transpose(0, 1)[None], torch.arange(count)[None])[0].transpose(0, 1)
    queries = torch.randn(count, 2 * shape.heads, d, generator=g)
    back = rope.undo(queries.transpose(0, 1)[None], torch.arange(count)[None])[0].transpose(0, 1)
    return Sample(heads[0], rotated, heads[1], queries, back)
