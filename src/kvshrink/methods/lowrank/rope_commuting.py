"""Low-rank keys that are never rebuilt: a basis that commutes with RoPE (the RoRoPE of TransMLA). arXiv 2502.07864

RoPE rotates the pair of frequency f of every head by the same angle. With the pair as one complex number, a map across
the h heads that is complex-linear within one frequency commutes with that rotation. So each frequency gets its own
complex PCA over the heads, keys are projected after RoPE, and a query is absorbed once per step: scores are products
with the latents. What is paid for it: channels of different frequencies never share a component, so that at equal rank
more is lost than by CSKV's joint basis, and with one or two KV heads there is little to gain.

Departures from the paper: components are kept where their eigenvalue is largest, over all frequencies of a layer,
instead of the same count each; no neighbouring frequencies are folded together (FreqFold, which is approximate); the
model is not converted, so that queries and keys keep their heads and nothing is trained.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kvshrink.errors import SettingError
from kvshrink.methods._codecs.basis import BasisCodec, principal, second_moment
from kvshrink.methods._packing import Packing, packing
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._settings import keep_and_bits
from kvshrink.methods._stats import CalibrationStats, LayerShape
from kvshrink.shapes import Float


@final
@dataclass(frozen=True)
class RopeCommuting(Method):
    """Complex PCA of keys per RoPE frequency, stored after RoPE; values as CSKV's.

    keep: share of channels of keys and of values, rank over KV width. A complex component is two channels.
    bits: bits of a stored latent: None (the model's dtype), 8, 4, 3 or 2.
    """

    keep: float = 0.2
    bits: int | None = None

    needs_fit: ClassVar[bool] = True
    budget_setting: ClassVar[str] = "keep"
    value_group: ClassVar[int] = 64  # latent channels that share a value's scale

    def check(self) -> None:
        super().check()
        keep_and_bits(self.keep, self.bits)

    def budget_values(self, shape: LayerShape, tokens: int) -> list[float]:
        return [2 * pairs / shape.width for pairs in range(1, shape.width // 2 + 1)]

    def ranks(self, shape: LayerShape) -> tuple[int, int]:
        """(rank of keys, rank of values), rounded down, keys to an even number."""
        rank = int(self.keep * shape.width + 1e-6)
        if rank < 2:
            raise SettingError(
                f"keep={self.keep} keeps no pair of {shape.width} channels. Use keep of at least {2 / shape.width:g}."
            )
        return rank // 2 * 2, rank

    def fit_layer(self, stats: CalibrationStats) -> dict[str, Tensor]:
        rank_k, rank_v = self.ranks(stats.shape)
        value = principal(stats.value.covariance, 1, rank_v)[1]
        tensors = {
            "key_up": commuting(second_moment(stats.key), stats.shape.heads, stats.pairs, rank_k)[None],
            # a mean before RoPE rotates with the position, so that no constant could be taken off and put back
            "key_mean": torch.zeros_like(stats.key.mean)[None],
            "value_up": value,
            "value_mean": stats.value.mean[None],
        }
        return {k: t.float().contiguous() for k, t in tensors.items()}

    def codecs(self, shape: LayerShape, fitted: Fitted) -> tuple[Codec, Codec]:
        key, value = self._packings(shape)
        up_k, up_v = fitted["key_up"], fitted["value_up"]
        return (
            BasisCodec("k_post", up_k.transpose(1, 2), up_k, fitted["key_mean"], key),
            BasisCodec("v", up_v.transpose(1, 2), up_v, fitted["value_mean"], value),
        )

    def bits_per_token(self, shape: LayerShape, fitted: Fitted) -> float:
        """By the rank rule alone: what is fitted does not change it."""
        return sum(p.page_bytes() for p in self._packings(shape)) * 8 / self.page

    def _packings(self, shape: LayerShape) -> tuple[Packing, Packing]:
        rank_k, rank_v = self.ranks(shape)
        return (
            packing(1, rank_k, self.page, self.bits, "channel", self.value_group, shape.dtype),
            packing(1, rank_v, self.page, self.bits, "token", self.value_group, shape.dtype),
        )


def commuting_spectrum(
    second: Float[Tensor, "n n"], heads: int, pairs: tuple[Tensor, Tensor] | None
) -> tuple[Float[Tensor, "1 r"], Float[Tensor, "1 r n"]]:
    """(mean square of each latent after RoPE, basis), of all components, the largest first. second: of the rows."""
    up = commuting(second, heads, pairs, len(second) // 2 * 2)
    square = torch.einsum("rn,nm,rm->r", up, second.double(), up)
    # RoPE turns the two of a component into each other
    both = square.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2)
    return both[None], up[None]


def commuting(second: Tensor, heads: int, pairs: tuple[Tensor, Tensor] | None, rank: int) -> Float[Tensor, "r n"]:
    """Orthonormal rows that commute with RoPE and keep most of the second moment, two rows to a component.

    With z_g = a_g + i b_g of head g and C = E[z z^H], C u = w u: the latent u^H z keeps w. As real rows it is
    (Re u, Im u) and (-Im u, Re u) on (a, b). Channels that RoPE does not rotate have a real PCA, and keep two
    components of it at a time.
    """
    n = len(second)
    second = second.double().view(heads, n // heads, heads, -1)
    still = torch.ones(n // heads, dtype=torch.bool, device=second.device)
    gains, rows = [], []
    if pairs is not None:
        a, b = (x.to(second.device) for x in pairs)
        still[a] = still[b] = False
        real = second[:, a, :, a] + second[:, b, :, b]  # [f, h, h]
        energy, vectors = torch.linalg.eigh(torch.complex(real, second[:, b, :, a] - second[:, a, :, b]))
        u = vectors.transpose(1, 2)  # [f, component, h]
        made = second.new_zeros(len(a), heads, 2, heads, n // heads)
        each = torch.arange(len(a), device=second.device)
        made[each, :, 0, :, a], made[each, :, 0, :, b] = u.real, u.imag
        made[each, :, 1, :, a], made[each, :, 1, :, b] = -u.imag, u.real
        gains.append(energy.flatten())
        rows.append(made.flatten(3).flatten(0, 1))
    if bool(still.any()):
        energy, vectors = torch.linalg.eigh(second[:, still][..., still].flatten(2).flatten(0, 1))
        made = second.new_zeros(len(energy), heads, n // heads)
        made[..., still] = vectors.T.unflatten(1, (heads, -1))
        made, energy = made.flatten(1).flip(0), energy.flip(0)  # largest first
        even = len(energy) // 2 * 2
        gains.append(energy[:even].unflatten(0, (-1, 2)).sum(1))
        rows.append(made[:even].unflatten(0, (-1, 2)))
    best = torch.cat(gains).topk(rank // 2).indices
    return torch.cat(rows)[best].flatten(0, 1)


METHOD = RopeCommuting
