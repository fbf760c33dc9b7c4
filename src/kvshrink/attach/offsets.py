"""Keys with a large constant part, as the key biases of Qwen2 give them: kept apart where a codec loses by it, or told.

A codec that scales whole tokens, or rotates their channels into one another, has steps as wide as the constant. One
that scales each channel by itself, or that takes a fitted mean away, has not. Which it is is tried, on a page or two.
"""

import warnings
from collections.abc import Mapping
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvshrink.attach.families import LayerInfo, first_weight, shape_of
from kvshrink.attach.fitted import with_images
from kvshrink.attach.hook import Attachment
from kvshrink.attach.projections import key_constant
from kvshrink.cache.lossy import round_trip
from kvshrink.methods import name_of
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._tier import Tier
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.visual import visual_method

LARGE = 1  # a bias to what varies, below which nothing is tried
MORE = 1.05  # error with the constant to the error without it, above which the constant is kept apart
LOST = 0.5  # error to what varies, above which it is told
Ladder = tuple[Tier, ...]
Found = tuple[tuple, dict[int, Ladder]]  # of which weights and places, and what was found
TRIED: "WeakKeyDictionary[Attachment, dict[str, Found]]" = WeakKeyDictionary()


def with_constants_apart(
    attachment: Attachment, artifact: Artifact, name: str, weights: str, ladders: Mapping[int, Ladder]
) -> dict[int, Ladder]:
    """Other ladders, {layer: tiers}, for layers whose keys have a constant part that costs accuracy, where the method
    can keep it apart.

    name, weights: digests of the method and of the model. Warns, once for a method, if keys of some layers lose most
    of what varies in them.
    """
    tried = TRIED.setdefault(attachment, {})
    places = {i: (shape_of(attachment.layers[i]), _weight(attachment.layers[i]).device) for i in ladders}
    key = (weights, *places.items())
    if name in tried and tried[name][0] == key:
        return tried[name][1]
    told, found, lost = name in tried, {}, []
    for i, tiers in ladders.items():
        fitted = artifact.layers.get(i, {})
        if tiers[0].codecs is None or artifact.method.stores_delta(fitted):
            continue
        method, info, (shape, device) = artifact.method, attachment.layers[i], places[i]
        shown = visual_method(method)
        text = _apart(method, tiers[0], fitted, info)
        images = None if shown is None else _apart(shown, tiers[-1], {}, info)
        if "lost" in (text, images):
            lost.append(i)
        if isinstance(text, dict) or isinstance(images, dict):
            ladder = method.tiers(shape, text) if isinstance(text, dict) else tuple(t for t in tiers if not t.visual)
            found[i] = with_images(method, ladder, shape, device, images if isinstance(images, dict) else None)
    tried[name] = key, found
    if lost and not told:
        _warn(name_of(artifact.method), lost)  # may be an error, and is not told again
    swamped = [i for i, (s, _) in places.items() if s.swamped and artifact.method.window_form(s).bits is not None]
    if swamped and not told:
        warnings.warn(
            f"the key biases of {len(swamped)} layers (layer {swamped[0]} first) are so large that a window at 8 bits "
            "loses what varies beside them. Use window_bits=None.",
            stacklevel=4,
        )
    return found


def _apart(method: Method, tier: Tier, fitted: Fitted, info: LayerInfo) -> dict[str, Tensor] | Literal["lost"] | None:
    """What codecs are made of with the constant apart; "lost" where they cannot be, and should; None: it may stay."""
    assert tier.codecs is not None
    error, without, constant = _errors(info, tier.codecs[0], method.page)
    if constant is None or error <= MORE * without:
        return None
    apart = method.without_constant(fitted, constant)
    if apart is not None:
        return dict(apart)
    return "lost" if error > max(LOST, 2 * without) else None


def _weight(info: LayerInfo) -> Tensor:
    return first_weight(info.module)


def _warn(name: str, lost: list[int]) -> None:
    warnings.warn(
        f"the key biases of {len(lost)} layers (layer {lost[0]} first) are so large that {name} as it is set loses "
        "most of what varies in their keys. Take a quantiser that learns nothing (turboquant, kivi, rtn), or what fits "
        "a mean (cskv, spectral), or see `kvshrink eval perplexity`.",
        stacklevel=5,  # the call of make_cache, below what own_modes wraps around it
    )


@torch.no_grad()
def _errors(info: LayerInfo, codec: Codec, page: int) -> tuple[float, float, Tensor | None]:
    """(error of keys with their bias, error without it, both to what varies; the bias [h, d], None if it is small)."""
    known = None if codec.joint else key_constant(info.module, info.key_dim)
    if known is None:
        return 0.0, 0.0, None
    constant, spread = known
    if float(constant.abs().max()) < LARGE * float(spread.mean()):
        return 0.0, 0.0, None
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1, len(spread), 2 * page, info.key_dim, generator=draw, device="cpu").to(spread.device)
    varying = noise * spread[:, None]
    errors = [_error(keys, varying, info, codec, page) for keys in (varying + constant[:, None], varying)]
    return errors[0], errors[1], constant


def _error(keys: Tensor, varying: Tensor, info: LayerInfo, codec: Codec, page: int) -> float:
    if info.rope is not None:
        keys = info.rope.apply(keys, torch.arange(keys.shape[2], device=keys.device)[None])
    keys = keys.to(_weight(info).dtype).float()  # as the model gives them: what stores that dtype loses nothing
    return float((round_trip(codec, keys, info.rope, page) - keys).norm() / varying.norm())
