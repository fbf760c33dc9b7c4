"""Checks of settings, each one line of error that says what to use instead."""

from kvshrink.errors import SettingError

BITS = (8, 4, 3, 2)  # of a stored latent
EXACT = 2**20  # tokens of a window: room for them all is taken at once


def whole(name: str, value: object, optional: bool = False, most: int | None = None) -> None:
    """Raise SettingError unless the value is an int, or None where a setting may be left out."""
    require(type(value) is int or (optional and value is None), f"{name}={value!r}", "Use a whole number.")
    require(most is None or value <= most, f"{name}={value}", f"Use at most {most}.")  # type: ignore[operator]


def number(name: str, value: object) -> None:
    """Raise SettingError unless the value is a number."""
    require(type(value) in (int, float), f"{name}={value!r}", "Use a number.")


def require(ok: bool, what: str, remedy: str) -> None:
    """Raise SettingError unless ok."""
    if not ok:
        raise SettingError(f"{what} is not possible. {remedy}")


def keep_and_bits(keep: object, bits: object) -> None:
    """Raise SettingError unless keep is a share above 0 and bits are those of a latent, or None."""
    number("keep", keep)
    whole("bits", bits, optional=True)
    require(0 < keep <= 1, f"keep={keep}", "Use a share of channels above 0, up to 1.")  # type: ignore[operator]
    require(bits is None or bits in BITS, f"bits={bits}", f"Use None or one of {BITS}.")


def one_of(name: str, value: object, offered: tuple) -> None:
    """Raise SettingError unless the value is one of those offered, and of their type (2.0 is not 2, True is not 1)."""
    ok = any(type(value) is type(x) and value == x for x in offered)
    require(ok, f"{name}={value!r}", f"Use one of {', '.join(map(repr, offered))}.")
