"""Which settings of CSKV go together."""

from typing import Any

from kvshrink.methods import _latents as latents
from kvshrink.methods._settings import keep_and_bits, require
from kvshrink.methods.lowrank import _ranked


def checked(method: Any) -> None:
    """Raise SettingError on settings that no model could use, or that do not go together."""
    heads = method.group_heads
    if heads != "auto":
        require(heads is None or heads >= 1, f"group_heads={heads}", "Use 1 or more, 'auto', or None for all.")
    require(method.shards >= 1, f"shards={method.shards}", "Use a whole number, 1 or more.")
    alone = method.shards == 1 or method.key_share != "auto"
    require(alone, f"shards={method.shards} with key_share='auto'", "Give a share: ranks of shards are rounded.")
    codec, bits = method.own
    keep_and_bits(method.keep, None if codec else bits)
    share = method.key_share
    ok = share == "auto" if isinstance(share, str) else isinstance(share, float) and 0 < share < 1
    require(ok, f"key_share={share!r}", "Use a share between 0 and 1, or 'auto'.")
    for name in ("key_metric", "value_metric"):
        metric = getattr(method, name)
        require(metric == "plain" or method.init == "pca", f"{name}={metric!r} with init={method.init!r}", "Use 'pca'.")
    require(method.steps >= 0 and method.lr > 0, f"steps={method.steps}, lr={method.lr}", "Use steps >= 0 and lr > 0.")
    require(
        not method.qat or (method.steps > 0 and method.own != (None, None)),
        "qat=True without steps and bits",
        "Set both.",
    )
    require(method.loss == "rows" or method.steps > 0, f"loss={method.loss!r} without steps", "Set steps.")
    require(not method.matryoshka or method.steps > 0, "matryoshka=True without steps", "Set steps.")
    if method.budget is not None:
        _ranked.check(method, method.budget)
    if codec is not None:
        own = latents.quantiser(codec, bits)
        why, given = own.apart({}), f"codec={codec!r} with"
        require(not (own.needs_fit and method.steps), f"{given} steps", "It depends on the basis. Use steps=0.")
        require(not (why and method.steps), f"{given} steps", f"It {why}. Use steps=0.")
        require(not (why and method.key_share == "auto"), f"{given} key_share='auto'", f"It {why}. Give a share.")
