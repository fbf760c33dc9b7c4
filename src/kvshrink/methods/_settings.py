"""Checks of settings, each one line of error that says what to use instead."""

from typing import Any, Literal, get_args, get_origin

from kvshrink.errors import SettingError

WORDS = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
WORDS |= {str: "a text (in quotes, if it looks like a number)"}
BITS = (8, 4, 3, 2)  # of a stored latent


def whole(name: str, value: object, optional: bool = False) -> None:
    """Raise SettingError unless the value is an int, or None where a setting may be left out."""
    require(type(value) is int or (optional and value is None), f"{name}={value!r}", "Use a whole number.")


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


def check_kind(what: str, value: object, hint: Any) -> None:
    """Raise SettingError unless a value that came as text is of the type that is hinted."""
    if not _is(value, hint):
        raise SettingError(f"{what}={value!r} is not possible. Use {' or '.join(dict.fromkeys(_words(hint)))}.")


def _is(value: object, hint: Any) -> bool:
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return any(type(value) is type(x) and value == x for x in inner)
    if get_origin(hint) is tuple:
        same = inner[-1] is Ellipsis or (isinstance(value, tuple) and len(value) == len(inner))
        return isinstance(value, tuple) and same and all(_is(x, inner[0]) for x in value)
    if inner:
        return any(_is(value, x) for x in inner)
    # True is no number here, and a whole number is a number too
    return type(value) is hint or (hint is float and type(value) is int)


def _words(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [repr(x) for x in get_args(hint)]
    if get_origin(hint) is tuple:
        return ["a list such as (1, 2)"]
    return [WORDS[hint]] if hint in WORDS else [w for x in get_args(hint) for w in _words(x)]
