"""What a fit learns a layer from: its statistics, gathered while the calibration text runs through the model once."""

from typing import Any

from torch import Tensor
from tqdm import tqdm

from kvshrink.attach.families import decoder_layers
from kvshrink.attach.look import layers_of
from kvshrink.fit.collector import StatsCollector
from kvshrink.fit.layerwise import LayerRunner
from kvshrink.fit.source import InMemory
from kvshrink.methods._stats import CalibrationStats
from kvshrink.shapes import Int
from kvshrink.store.modes import without_dropout


@without_dropout
def gather(
    model: Any, rows: Int[Tensor, "rows length"], batch: int, progress: bool, sample: bool = False
) -> dict[int, CalibrationStats]:
    """Statistics of every compressed layer, in n x n numbers each: any number of methods can be fitted to them.

    sample: some thousand rows of each layer too, as they are, for methods that ask for them.
    The stats hold the model's own key and value weights, not copies.
    """
    infos, found = layers_of(model), {}
    runner = LayerRunner(InMemory(model), rows, batch)
    for i in tqdm(range(runner.layers), desc="statistics", unit="layer", disable=not progress):
        seen = StatsCollector(0, False, sample, infos[i].moves) if infos[i].compressed else None
        runner.run(i, decoder_layers(model)[i], seen, infos[i].module)
        if seen is not None:
            found[i] = seen.stats(infos[i])
    return found
