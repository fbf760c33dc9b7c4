"""An artifact's codecs for a model: made once, tried on a page, and refused in one line where they do not fit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvshrink.attach.families import LayerInfo
from kvshrink.cache.layout import try_out
from kvshrink.errors import ArtifactError, CacheError, KVShrinkError, SettingError
from kvshrink.methods import name_of
from kvshrink.methods._roles import Fitted, Method, Stored
from kvshrink.methods._stats import SOME, LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.methods.artifact import LOOKED_AT, Artifact
from kvshrink.methods.visual import visual_tier
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.reason import line

Place = tuple[LayerShape, torch.device]  # of a layer
Ladders = dict[tuple, dict[int, tuple[Tier, ...]]]  # by page and places
LADDERS: "WeakKeyDictionary[Method | Artifact, Ladders]" = WeakKeyDictionary()


@outside_inference_mode
def fitting(artifact: Artifact, places: Mapping[int, Place]) -> dict[int, tuple[Tier, ...]]:
    """{layer: tiers}, with tensors on the model's devices: made once per method or artifact, shared by all its caches.

    Raises ArtifactError if a layer's tensors are not what the method makes of this shape.
    """
    # methods are equal by their settings; an artifact's tensors are its own
    made = LADDERS.setdefault(artifact if artifact.layers else artifact.method, {})
    key = (artifact.method.page, *places.items())
    if key not in made:
        found: dict[int, tuple[Tier, ...]] = {}
        page: Stored | None = None
        for i, (shape, device) in places.items():
            with _refusing(artifact, i):
                found[i], delta = _tiers(artifact, artifact.layers.get(i, {}), shape, device)
                if artifact.layers:
                    page = try_out(found[i], shape, artifact.method.page, device, page if delta else None)
        made[key] = found
    return made[key]


def _tiers(
    artifact: Artifact, fitted: Fitted, shape: LayerShape, device: torch.device
) -> tuple[tuple[Tier, ...], bool]:
    """(tiers, whether the layer follows the one before)."""
    learnt = _Read({k: t.to(device) for k, t in fitted.items() if not k.endswith(LOOKED_AT)})
    if artifact.layers:
        _check_chosen_by(learnt, artifact.method.chooses_by(shape))
    tiers = with_images(artifact.method, artifact.method.tiers(shape, learnt), shape, device)
    delta = artifact.method.stores_delta(learnt)
    if unread := sorted(set(learnt) - learnt.read):
        raise ArtifactError(f"the artifact has a tensor {unread[0]:.60} that its method does not know. Fit again.")
    return tiers, delta


def _check_chosen_by(learnt: "_Read", sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ArtifactError unless what tokens are chosen by is there and of these sizes, -1 for any."""
    for name, size in sizes.items():
        given = tuple(learnt[name].shape) if name in learnt else None
        if given is None or len(given) != len(size) or any(n not in (-1, m) for n, m in zip(size, given, strict=True)):
            raise ArtifactError(f"the artifact's tensor {name} has the sizes {given}, not {size}. Fit again.")


class _Read(Mapping[str, Tensor]):
    """Tensors that remember which of them were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        found = self.tensors[name]
        self.read.add(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@contextmanager
def _refusing(artifact: Artifact, layer: int) -> Iterator[None]:
    """Whatever foreign tensors lead to, as one line."""
    try:
        yield
    except Exception as error:
        told = isinstance(error, KVShrinkError) and not isinstance(
            error, CacheError
        )  # the latter of a page that was tried
        if not artifact.layers or told:
            raise
        raise ArtifactError(
            f"layer {layer} of the artifact does not fit this model ({line(error)}). Fit one for this model."
        ) from error


def with_images(
    method: Method, tiers: tuple[Tier, ...], shape: LayerShape, device: torch.device, fitted: Fitted | None = None
) -> tuple[Tier, ...]:
    """The tiers on a device, with that of images behind them where the method has one. fitted: of the latter."""
    images = visual_tier(method, shape, fitted or {}, tiers[0].codecs)
    return tuple(moved(tier, device) for tier in (*tiers, *([] if images is None else [images])))


def moved(tier: Tier, device: torch.device) -> Tier:
    """The tier with its codecs' tensors on a device."""
    if tier.codecs is None:
        return tier
    key, value = (codec.to(device) for codec in tier.codecs)
    return tier._replace(codecs=(key, value))


def check_widths(info: LayerInfo, method: Method, index: int, joint: bool = False) -> None:
    """Raise SettingError if a method cannot store a layer whose two rows differ in width. joint: stores them as one."""
    if info.key_dim != info.value_dim and (joint or not method.two_widths):
        raise SettingError(
            f"{name_of(method)} cannot store layer {index}, which caches rows of {info.key_dim} and {info.value_dim} "
            "channels (MLA). Use a quantiser that stores both by themselves, such as turboquant, rtn or kivi."
        )


def check_queries(info: LayerInfo, method: Method, index: int) -> None:
    """Raise SettingError if a method asks for queries, or drops tokens, where keys are made of what is cached."""
    policy = method.policy(SOME, {})
    drops = policy.budget is not None or method.drops_tokens
    if info.latent and (policy.scorer is not None or method.samples or drops):
        raise SettingError(
            f"{name_of(method)} ranks, learns from or drops what queries meet, but layer {index} makes its keys "
            "of what is cached. Use a quantiser that learns nothing, such as turboquant, rtn or kivi."
        )
