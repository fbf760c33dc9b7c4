"""What is seen of one layer while calibration text passes through it."""

import torch
from torch import Tensor, nn

from kvshrink.attach.asking import ask
from kvshrink.attach.families import LayerInfo, shape_of
from kvshrink.attach.projections import key_value_biases, key_value_weights, output_weight
from kvshrink.cache.rope import Rope
from kvshrink.fit.statistics import EnergyStream, MomentStream, ScaleStream, output_gram
from kvshrink.methods._stats import CalibrationStats, Sample
from kvshrink.shapes import Float

SAMPLED = 2048  # tokens of a sample at most, half of it at least where there are so many


class StatsCollector:
    """What is gathered while a layer runs: moments always; inputs, rows and a sample where a setting needs them."""

    def __init__(self, probes: int, rows: bool, sample: bool = False, moves: bool = False) -> None:
        self.key, self.value, self.scale, self.query = MomentStream(), MomentStream(), ScaleStream(), EnergyStream()
        self.probes, self.rows, self.moves = probes, rows, moves  # moves: keys cannot be had before RoPE
        self.inputs: list[dict] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.sample = Sampler() if sample else None

    def __call__(self, module: nn.Module, kwargs: dict) -> None:
        hidden = kwargs["hidden_states"]
        asked = ask(module, kwargs, turned=self.moves)
        keys, values, query = asked.key, asked.value, asked.query
        self.key.add(keys.transpose(1, 2).flatten(2))
        self.value.add(values.transpose(1, 2).flatten(2))
        self.scale.add(hidden)
        if query is not None:
            self.query.add(query, keys.shape[1])
            if self.sample is not None:
                self.sample.add(keys, values, query)
        if len(self.inputs) < self.probes:
            # without an input norm (Olmo2) it is a view of what the layer's output is about to overwrite
            self.inputs.append(kwargs | {"hidden_states": hidden.clone()})
        if self.rows:
            self.keys.append(keys)
            self.values.append(values)

    def stats(self, info: LayerInfo) -> CalibrationStats:
        module = info.module
        key_weight, value_weight = key_value_weights(module) or (None, None)
        key_bias, value_bias = key_value_biases(module)
        shape = shape_of(info)
        output = None if info.latent else output_weight(module, info.value_dim)
        return CalibrationStats(
            shape,
            self.key.moments(),
            self.value.moments(),
            self.scale.mean(),
            None if key_weight is None else key_weight.detach(),
            None if value_weight is None else value_weight.detach(),
            self.query.mean(info.rope),
            None if output is None else output_gram(output, shape.heads),
            info.rope.pairs() if info.rope else None,
            self.sample.done(info.rope) if self.sample is not None else None,
            key_bias,
            value_bias,
        )


class Sampler:
    """Every n-th token of all rows; n doubles whenever there are too many."""

    def __init__(self) -> None:
        self.step, self.seen, self.length = 1, 0, 0  # length: of a row
        self.at: list[int] = []  # which token of all
        self.position: list[int] = []  # which of its row
        self.parts: list[tuple[Tensor, ...]] = []  # keys, values, queries of each, [heads, d]

    def add(self, *rows: Float[Tensor, "b _ s d"]) -> None:
        b, _, s, _ = rows[0].shape
        self.length = max(self.length, s)
        first = -self.seen % self.step
        taken = torch.arange(first, b * s, self.step)
        flat = [x.transpose(1, 2).flatten(0, 1)[taken.to(x.device)].float() for x in rows]
        self.at += (taken + self.seen).tolist()
        self.position += (taken % s).tolist()
        # a row by itself, since a view would keep all of this call's
        self.parts += [tuple(x.clone() for x in rows_of) for rows_of in zip(*flat, strict=True)]
        self.seen += b * s
        while len(self.at) > SAMPLED:
            self.step *= 2
            kept = [i for i, at in enumerate(self.at) if at % self.step == 0]
            self.at, self.position = [self.at[i] for i in kept], [self.position[i] for i in kept]
            self.parts = [self.parts[i] for i in kept]

    def done(self, rope: Rope | None) -> Sample:
        """The sample; rows run from position 0 on."""
        keys, values, queries = (torch.stack(part) for part in zip(*self.parts, strict=True))
        if rope is None:
            return Sample(keys, keys, values, queries, queries)
        rope = rope.to(keys.device)
        positions = rope.of_prompt(torch.tensor(self.position, device=keys.device)[None], self.length)
        rotated = [rope.apply(x.transpose(0, 1)[None], positions)[0].transpose(0, 1) for x in (keys, queries)]
        return Sample(keys, rotated[0].contiguous(), values, rotated[1].contiguous(), queries)
