"""Keys and values of each KV head quantised as they are: no change of basis, keys after RoPE."""

from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from kvshrink.methods._codecs.packed import PackedCodec
from kvshrink.methods._packing import Packing
from kvshrink.shapes import Float


@final
@dataclass(frozen=True)
class HeadwiseCodec(PackedCodec):
    """Rows of each KV head quantised as they are: one group per head, no change of basis."""

    site: Literal["k_pre", "k_post", "v"]
    packing: Packing
    constant: Float[Tensor, "h d"] | None = None

    def to(self, device: torch.device) -> "HeadwiseCodec":
        return self if self.constant is None else replace(self, constant=self.constant.to(device))

    def expand(self, latent: Float[Tensor, "b H x r"], heads: int) -> Float[Tensor, "b h x d"]:
        return latent
