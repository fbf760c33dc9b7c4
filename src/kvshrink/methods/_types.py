"""Whether a setting is of the type that its annotation names: 2.0 is no int, True no number, numpy's numbers neither.

What is valid then depends on the value alone, and a method's own checks may compute with it.
"""

import math
import reprlib
from abc import ABCMeta
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvshrink.errors import SettingError

MOST = 2**31  # of a whole number: more tokens, channels or steps than there are


class Settings(ABCMeta):
    """The class of method classes: what a method is called with is looked at before anything is made of it. A list, as
    JSON has it, is taken for a tuple."""

    def __call__(cls, *args: Any, **named: Any) -> Any:
        named_only = {f.name for f in getattr(cls, "__dataclass_fields__", {}).values() if f.kw_only}
        given = dict(zip((n for n in _hints(cls) if n not in named_only), args, strict=False)) | named
        if len(given) == len(args) + len(named):  # else Python says what is wrong
            args, named = (), {k: tuple(v) if type(v) is list else v for k, v in given.items()}
            check_types(cls, named)
        return super().__call__(*args, **named)


def check_types(cls: type, settings: Mapping[str, object]) -> None:
    """Raise SettingError unless settings are of the types that a dataclass names."""
    for name, value in settings.items():
        hint = _hints(cls).get(name, object)
        if hint is not object:
            _check(name, value, hint)


def check_finite(settings: Mapping[str, object]) -> None:
    """Raise SettingError on a number without end, where other checks let one pass."""
    for name, value in settings.items():
        if type(value) is float and not math.isfinite(value):
            raise SettingError(f"{name}={value} is not possible. Use a finite number.")


def check_type(name: str, value: object, hint: Any) -> None:
    """Raise SettingError unless a value is of this type, and finite."""
    _check(name, value, hint)
    check_finite({name: value})


def _check(name: str, value: object, hint: Any) -> None:
    if type(value) is int and abs(value) > MOST:
        raise SettingError(f"{name}={shown(value)} is not possible. Use a whole number of at most {MOST}.")
    if not fits(value, hint):
        raise SettingError(f"{name}={shown(value)} is not possible. Use {_words(hint)}.")


@cache
def _hints(cls: type) -> Mapping[str, Any]:
    """The annotations of a dataclass's fields, in order."""
    every = get_type_hints(cls)
    return {f.name: every[f.name] for f in fields(cls)}


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of this type; a whole number must be no larger than MOST."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(x) and value == x for x in parts)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        each = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is Ellipsis else parts
        return (
            isinstance(value, tuple)
            and len(value) == len(each)
            and all(fits(x, part) for x, part in zip(value, each, strict=True))
        )
    if hint is float:
        return fits(value, int) or type(value) is float
    return type(value) is hint and (type(value) is not int or abs(value) <= MOST)


def shown(value: object) -> str:
    """A value in a message: short, on one line, whatever it is."""
    try:
        return reprlib.repr(value).replace("\n", " ")[:60]
    except Exception:
        return f"a {type(value).__name__}"


def _words(hint: Any) -> str:
    """What may be used, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, parts)) if len(parts) < 3 else f"one of {parts}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts if part is not NoneType))
    if origin is tuple:
        return "numbers in brackets" if parts[-1] is Ellipsis else f"{len(parts)} numbers in brackets"
    plain = {int: "a whole number", float: "a number", bool: "True or False", str: "a name"}
    return plain.get(hint) or str(hint.__name__)
