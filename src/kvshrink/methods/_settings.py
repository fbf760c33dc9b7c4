"""Checks of settings, each one line of error that says what to use instead."""

from typing import Any

from kvshrink.errors import SettingError

BITS = (8, 4, 3, 2)  # of a stored latent
EXACT = 2**20  # tokens of a window: room for them all is taken at once


def require(ok: bool, what: str, remedy: str) -> None:
    """Raise SettingError unless ok."""
    if not ok:
        raise SettingError(f"{what} is not possible. {remedy}")


def keep_and_bits(keep: float, bits: object) -> None:
    """Raise SettingError unless keep is a share above 0 and bits are those of a latent, or None."""
    require(0 < keep <= 1, f"keep={keep}", "Use a share of channels above 0, up to 1.")
    require(bits is None or type(bits) is int, f"bits={bits}", "Use a whole number.")
    require(bits is None or bits in BITS, f"bits={bits}", f"Use None or one of {BITS}.")


def check_topk(topk: int | float) -> None:
    """Raise SettingError unless topk is a number of tokens, or a share of them as a decimal number."""
    ok = 0 < topk <= 1 if isinstance(topk, float) else topk >= 1
    require(ok, f"topk={topk}", "Use a number of tokens from 1, or a share above 0, up to 1.0.")


def reads_part(topk: int | float) -> str | None:
    """What a method with this topk does that its codecs alone do not; None: all tokens are read."""
    return None if isinstance(topk, float) and topk == 1 else "has a new token read a part of the others"


def one_of(name: str, value: object, offered: tuple[Any, ...]) -> None:
    """Raise SettingError unless the value is one of those offered, and of their type (2.0 is not 2, True is not 1)."""
    ok = any(type(value) is type(x) and value == x for x in offered)
    require(ok, f"{name}={value!r}", f"Use one of {', '.join(map(repr, offered))}.")
