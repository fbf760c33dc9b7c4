"""What a fit learns a layer from: its statistics, gathered while the calibration text runs through the model once."""

from torch import Tensor, nn
from tqdm import tqdm

from kvshrink.attach.families import (
    LayerInfo,
    key_value,
    key_value_weights,
    layers_of,
    output_weight,
    queries,
    shape_of,
)
from kvshrink.fit.layerwise import LayerRunner
from kvshrink.fit.source import InMemory
from kvshrink.fit.statistics import EnergyStream, MomentStream, ScaleStream, output_gram
from kvshrink.methods._roles import LayerFacts
from kvshrink.shapes import Int


def gather(model: nn.Module, rows: Int[Tensor, "rows length"], batch: int, progress: bool) -> dict[int, LayerFacts]:
    """Facts of every layer that is compressed, in n x n numbers a layer: any number of methods can be fitted to them.

    The facts hold the model's own key and value weights, not copies.
    """
    infos, found = layers_of(model), {}
    runner = LayerRunner(InMemory(model), rows, batch)
    for i in tqdm(range(runner.layers), desc="statistics", unit="layer", disable=not progress):
        seen = Watch() if infos[i].compressed else None
        runner.run(i, model.get_decoder().layers[i], seen)  # type: ignore[operator]
        if seen is not None:
            found[i] = seen.facts(infos[i])
    return found


class Watch:
    """What is gathered while a layer runs: moments always; inputs and rows only where a setting needs them."""

    def __init__(self, probes: int = 0, rows: bool = False) -> None:
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
        )
