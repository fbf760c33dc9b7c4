"""Checks of settings, each one line of error that says what to use instead."""

from kvshrink.errors import SettingError


def whole(name: str, value: object) -> None:
    """Raise SettingError unless the value is an int, or None where a setting may be left out."""
    require(value is None or type(value) is int, f"{name}={value!r}", "Use a whole number.")


def number(name: str, value: object) -> None:
    """Raise SettingError unless the value is a number."""
    require(type(value) in (int, float), f"{name}={value!r}", "Use a number.")


def require(ok: bool, what: str, remedy: str) -> None:
    """Raise SettingError unless ok."""
    if not ok:
        raise SettingError(f"{what} is not possible. {remedy}")
