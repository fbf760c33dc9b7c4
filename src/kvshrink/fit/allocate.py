"""Choose a layer's split between keys and values by what it does to the layer's attention output."""

import torch
from torch import Tensor, nn

from kvshrink.cache.lossy import round_trip
from kvshrink.cache.rope import Rope
from kvshrink.errors import SettingError
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import CalibrationStats


def choose_split(
    method: Method, stats: CalibrationStats, module: nn.Module, rope: Rope | None, inputs: list[dict]
) -> tuple[float, dict[float, float]]:
    """(best of `Method.splits`, relative squared error of the attention output per split).

    inputs: keyword arguments of the attention module for some calibration batches. The first half of a row is seen
    through the codecs, the second half exactly, and the output of the second half is compared. Raises SettingError
    where no split gives both keys and values a channel.
    """
    errors = {}
    for share, candidate in method.splits().items():
        try:
            fitted = candidate.fit_layer(stats)
        except SettingError:
            continue  # too few channels for keys or values at this share
        codecs = candidate.codecs(stats.shape, fitted)
        errors[share] = sum(_output_error(module, rope, codecs, method.page, kwargs) for kwargs in inputs) / len(inputs)
    if not errors:
        method.fit_layer(stats)  # says what is wrong
    return min(errors, key=lambda s: errors[s]), errors


class Lossy:
    """Stands in for a cache: the first half of what passes through it comes back as the codecs would give it."""

    def __init__(self, codecs, rope: Rope | None, page: int) -> None:
        self.codecs, self.rope, self.page = codecs, rope, page

    def update(self, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        half = key.shape[2] // 2 // self.page * self.page
        k = round_trip(self.codecs[0], key[:, :, :half], self.rope, self.page, reach=key.shape[2])
        v = round_trip(self.codecs[1], value[:, :, :half], None, self.page)
        return torch.cat([k, key[:, :, half:]], 2), torch.cat([v, value[:, :, half:]], 2)


@torch.no_grad()
def _output_error(module: nn.Module, rope: Rope | None, codecs, page: int, kwargs: dict) -> float:
    plain = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
    exact = module(**plain, past_key_values=None)[0]
    lossy = module(**plain, past_key_values=Lossy(codecs, rope, page))[0]
    tail = slice(exact.shape[1] // 2, None)
    return float((exact[:, tail] - lossy[:, tail]).float().square().sum() / exact[:, tail].float().square().sum())
