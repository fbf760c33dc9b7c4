"""Which tokens of a step came from images or videos: as the model itself finds them, by the ids in its input."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.inputs import by_name
from kvshrink.cache.cache import KVCache
from kvshrink.errors import CacheError, SettingError
from kvshrink.methods import name_of
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import SOME
from kvshrink.shapes import Bool
from kvshrink.store.modes import at_once

log = logging.getLogger("kvshrink")
# as configs name the ids that a processor puts where an image's or a video's tokens go
IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
# how names of what they are made of begin; `generate` may have run the vision tower before
GIVEN = ("pixel_values", "mm_encoder_outputs", "image_embeds", "video_embeds", "image_features", "video_features")


def asks(method: Method) -> bool:
    """Whether a method treats tokens of images in another way."""
    return method.visual is not None or method.policy(SOME, {}).visual is not None


def ids_of(module: Any) -> tuple[int, ...]:
    """Ids of image and video tokens that a module's config names."""
    config = getattr(module, "config", None)
    return tuple({i for name in IDS if type(i := getattr(config, name, None)) is int})


def holders(model: Any, tower: Any) -> list[Any]:
    """Modules that are given ids of images and hand their tokens to the text tower, the outermost first."""
    return [m for m in model.modules() if m is not tower and ids_of(m) and any(x is tower for x in m.modules())]


def mark_images(module: Any, args: tuple, kwargs: dict) -> None:
    """Pre-hook of a holder: a cache whose method asks is told which new tokens came from images."""
    given = by_name(module, args, kwargs)
    cache = given.get("past_key_values")
    if isinstance(cache, KVCache) and asks(cache.method):
        _mark(module, given, cache)


@at_once
def _mark(module: Any, given: Mapping[str, Any], cache: KVCache) -> None:
    found, types, cache.visual = given.get("input_ids"), given.get("mm_token_type_ids"), None
    shown = any(name.startswith(GIVEN) and _there(value) for name, value in given.items())
    if isinstance(found, Tensor):
        marks = torch.isin(found, torch.tensor(ids_of(module), device=found.device))
        if shown:
            cache.visual = marks
        elif found.shape[-1] > 1 and bool(marks.any()):  # a single one the model may have written itself
            log.warning("%d ids of images, but no image that is known as one: stored as text.", int(marks.sum()))
    elif shown and isinstance(types, Tensor):
        cache.visual = types > 0


def _there(value: Any) -> bool:
    return bool(value) if isinstance(value, Mapping) else value is not None


def check_marks(cache: KVCache, b: int, s: int) -> None:
    """Raise CacheError if the marks of a step are not of its b x s tokens."""
    marks: Bool[Tensor, "b s"] | None = cache.visual
    if marks is not None and marks.shape != (b, s):
        shape, cache.visual = list(marks.shape), None
        raise CacheError(
            f"the input's ids are {shape}, the decoder was given {b} x {s} tokens: which of them came from images is "
            "not known. Make a cache without visual=."
        )


def check_asks(method: Method, known: bool, model: Any) -> None:
    """Raise SettingError if a method asks for image tokens of a model that shows none. known: whether it does."""
    if asks(method) and not known:
        raise SettingError(
            f"{name_of(method)} has a setting for tokens of images, but {model.config.model_type} has none that can be "
            "seen. Pass the whole image-text model, or leave the setting out."
        )
