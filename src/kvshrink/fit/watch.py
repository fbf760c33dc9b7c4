"""What is seen of one layer while calibration text passes through it."""

from torch import Tensor, nn

from kvshrink.attach.families import LayerInfo, key_value, key_value_weights, output_weight, queries, shape_of
from kvshrink.fit.statistics import EnergyStream, MomentStream, ScaleStream, output_gram
from kvshrink.methods._facts import LayerFacts


class LayerWatch:
    """What is gathered while a layer runs: moments always; inputs and rows only where a setting needs them."""

    def __init__(self, probes: int, rows: bool) -> None:
        self.key, self.value, self.scale, self.query = MomentStream(), MomentStream(), ScaleStream(), EnergyStream()
        self.probes, self.rows = probes, rows
        self.inputs: list[dict] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, module: nn.Module, kwargs: dict) -> None:
        hidden = kwargs["hidden_states"]
        keys, values = key_value(module, hidden)
        self.key.add(keys.transpose(1, 2).flatten(2))
        self.value.add(values.transpose(1, 2).flatten(2))
        self.scale.add(hidden)
        self.query.add(queries(module, hidden), keys.shape[1])
        if len(self.inputs) < self.probes:
            self.inputs.append(kwargs)
        if self.rows:
            self.keys.append(keys)
            self.values.append(values)

    def facts(self, info: LayerInfo) -> LayerFacts:
        module = info.module
        key_weight, value_weight = key_value_weights(module)
        shape = shape_of(module)
        return LayerFacts(
            shape,
            self.key.moments(),
            self.value.moments(),
            self.scale.mean(),
            key_weight.detach(),
            value_weight.detach(),
            self.query.mean(info.rope),
            output_gram(output_weight(module), shape.heads),
            info.rope.pairs() if info.rope else None,
        )
