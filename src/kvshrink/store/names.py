"""Tensors by name: dots part what a name is made of, "layers.0.pages.3.k.codes"."""

from collections.abc import Mapping

from torch import Tensor


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
