"""Keys with a large constant part, as the key biases of Qwen2 give them: told of where a codec loses what varies in it.

A codec that scales whole tokens, or rotates their channels into one another, has steps as wide as the constant. One
that scales each channel by itself, or that takes a fitted mean away, has not. Which it is is tried, on a page or two.
"""

import warnings
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvshrink.attach.families import LayerInfo, key_value_biases, key_value_weights
from kvshrink.attach.hook import Attachment
from kvshrink.cache.lossy import round_trip
from kvshrink.methods import name_of
from kvshrink.methods._roles import Codec
from kvshrink.methods._tier import Tier
from kvshrink.methods.artifact import Artifact

LARGE = 8  # a bias to what varies, below which nothing is tried
LOST = 0.5  # error to what varies, above which it is told
TRIED: "WeakKeyDictionary[Attachment, set[str]]" = WeakKeyDictionary()


def warn_of_offsets(
    attachment: Attachment, artifact: Artifact, name: str, ladders: Mapping[int, tuple[Tier, ...]]
) -> None:
    """Warn once if keys of some layers lose most of what varies in them. name: a digest of the method."""
    tried = TRIED.setdefault(attachment, set())
    if name in tried:
        return
    tried.add(name)
    lost = [
        i
        for i, tiers in ladders.items()
        if tiers[0].codecs is not None
        and not artifact.method.stores_delta(artifact.layers.get(i, {}))
        and _loses(attachment.layers[i], tiers[0].codecs[0], artifact.method.page)
    ]
    if lost:
        warnings.warn(
            f"the key biases of {len(lost)} layers (layer {lost[0]} first) are so large that "
            f"{name_of(artifact.method)} as it is set loses most of what varies in their keys. Take one that scales "
            "each channel by itself (kivi, kvquant, rtn) or that fits a mean (cskv, spectral), or see "
            "`kvshrink eval perplexity`.",
            stacklevel=4,  # the call of make_cache, below what own_modes wraps around it
        )


@torch.no_grad()
def _loses(info: LayerInfo, codec: Codec, page: int) -> bool:
    bias, weight = key_value_biases(info.module)[0], key_value_weights(info.module)[0]
    if bias is None or codec.joint or not weight.is_floating_point():
        return False
    # of inputs with a variance of one, as norms leave them
    spread = weight.detach().float().norm(dim=1).view(-1, info.module.head_dim)
    constant = bias.float().view_as(spread)
    if float(constant.abs().max()) < LARGE * float(spread.mean()):
        return False
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1, len(spread), 2 * page, info.module.head_dim, generator=draw, device="cpu").to(spread.device)
    varying = noise * spread[:, None]
    error = _error(varying + constant[:, None], varying, info, codec, page)
    return error > max(LOST, 2 * _error(varying, varying, info, codec, page))


def _error(keys: Tensor, varying: Tensor, info: LayerInfo, codec: Codec, page: int) -> float:
    if info.rope is not None:
        keys = info.rope.apply(keys, torch.arange(keys.shape[2], device=keys.device)[None])
    return float((round_trip(codec, keys, info.rope, page) - keys).norm() / varying.norm())
