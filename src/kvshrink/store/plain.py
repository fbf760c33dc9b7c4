"""Whether a tensor is one of numbers, and not of a library's own: quantised, sharded, or a wrapper of either."""

from torch import Tensor, nn


def is_plain(tensor: object) -> bool:
    return type(tensor) in (nn.Parameter, Tensor)
