"""Tokens that came from images or videos, under a method of their own: `visual="turboquant:bits=2"` of any method.

Pages of nothing but such tokens go to a tier beside the method's own; a page at an image's border has text in it, and
is stored as text is. VidKV (arXiv 2503.16257) and ZipVL (arXiv 2410.08584) give visual tokens fewer bits, or keep fewer
of them; here any quantiser that learns nothing may store them.
"""

from functools import lru_cache

from kvshrink import methods
from kvshrink.errors import SettingError
from kvshrink.kernels.records import record_bytes
from kvshrink.methods._evicting import Evicting
from kvshrink.methods._roles import Codec, Fitted, Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.methods.text import parse_settings


def visual_method(method: Method) -> Method | None:
    """What stores pages of images under this method; None: the method itself. Raises SettingError if it cannot."""
    if method.visual is None:
        return None
    found = _built(method.visual)
    if found.page != method.page:
        raise SettingError(
            f"visual={method.visual!r} has pages of {found.page} tokens, {methods.name_of(method)} of {method.page}. "
            "Use a method with pages as long, such as turboquant, or rtn."
        )
    return found


def visual_tier(method: Method, shape: LayerShape, fitted: Fitted, codecs: tuple[Codec, Codec] | None) -> Tier | None:
    """The tier of pages of images in a layer. fitted: of the visual method. codecs: of the other pages."""
    own = visual_method(method)
    if own is None:
        return None
    if codecs is None or method.stores_delta({}) or codecs[0].reads(2**20) is not None:
        name = methods.name_of(method)
        raise SettingError(
            f"{name} drops tokens, skips some or stores what layers add, so visual= has no meaning. Leave it out."
        )
    return Tier(own.codecs(shape, fitted), visual=True)


def visual_bytes(method: Method, shape: LayerShape, fitted: Fitted, tokens: int, visual: int) -> int:
    """What a layer holds of one sequence of so many tokens, of which `visual` fill pages of images, beside what it
    would hold without images."""
    own = visual_method(method)
    every = max(0, tokens - method.window) // method.page
    pages = min(every, visual // method.page)
    text = method.body_bytes(shape, fitted, every - pages) - method.body_bytes(shape, fitted, every)
    if own is not None:
        return text + pages * record_bytes(int(own.bits_per_token(shape, {}) * own.page / 8))
    if isinstance(method, Evicting) and method.visual_ratio is not None and pages:
        return text + method.images_beside(shape, fitted, every, pages)
    return 0


@lru_cache
def _built(text: str) -> Method:
    name, _, settings = text.partition(":")
    own = parse_settings(settings)
    found = methods.build(name.strip(), own)
    if given := {"window", "sinks", "window_bits"} & set(own):
        raise SettingError(f"visual={text!r}: {sorted(given)[0]} is one for all tokens. Set it for the method itself.")
    reason = "must be fitted" if found.needs_fit else found.apart({})
    reason = reason or ("has an image method itself" if found.visual is not None else None)
    if reason is not None:
        raise SettingError(
            f"visual={text!r}: {name} {reason}. Use a quantiser that learns nothing, such as turboquant."
        )
    return found
