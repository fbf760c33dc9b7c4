"""Methods and settings as text: "turboquant:bits=4,window=64"."""

import re
from collections.abc import Collection, Iterator
from dataclasses import fields
from itertools import pairwise

from kvshrink import methods
from kvshrink.data.text import literal
from kvshrink.errors import SettingError
from kvshrink.methods._roles import Method

LONGEST = 10_000  # characters of a method or task with its settings
OPENS, CLOSES, QUOTES = "([{", ")]}", "'\""


def parse_settings(text: str) -> dict[str, object]:
    """ "keep=0.2,bits=4" as a dict. Raises SettingError on a part without "=", and on a setting that comes twice."""
    settings: dict[str, object] = {}
    for part in split(text):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals or not key:
            raise SettingError(f"{part!r} is no setting. Write name:setting=value,setting=value.")
        if key in settings:
            raise SettingError(f"{key} is set twice in {text!r}. Leave one out.")
        settings[key] = _value(value)
    return settings


def text_of(method: Method, without: Collection[str] = ()) -> str:
    """A method as text, with the settings that are not its defaults."""
    given = []
    for f in fields(method):
        value = getattr(method, f.name)
        if f.name not in without and value != f.default:
            given.append(f"{f.name}={value!r}")
    name = methods.name_of(method)
    return f"{name}:{','.join(given)}" if given else name


def parts_of(text: str) -> list[str]:
    """Of "snapkv:ratio=0.25 + cskv", the methods that are joined."""
    return [part.strip() for part in re.split(r"(?:^|\s)\+(?:\s|$)", text)]


def split(text: str) -> list[str]:
    """The parts between commas, but not those within brackets or quotes."""
    if len(text) > LONGEST:
        raise SettingError(f"{text[:20]!r}... has {len(text)} characters. Write at most {LONGEST}.")
    cuts = [-1, *_commas(text), len(text)]
    parts = [text[a + 1 : b] for a, b in pairwise(cuts)]
    return [part for part in parts if part.strip()]


def _commas(text: str) -> Iterator[int]:
    depth, quote, before = 0, "", "="
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in QUOTES and before in f"=,{OPENS}":  # elsewhere it is an apostrophe
            quote = c
        elif c in OPENS:
            depth += 1
        elif c in CLOSES:
            depth -= 1
        elif c == "," and not depth:
            yield i
        if depth < 0:
            break
        before = before if c == " " else c
    if depth or quote:
        raise SettingError(f"a bracket or quote of {text!r} has no other end. Put a text that has one in quotes.")


def _value(text: str) -> object:
    try:
        value = literal(text)
    except ValueError:
        return text
    if not _plain(value):
        raise SettingError(f"{text!r} is no value of a setting. Write a number, a text, True, None or a list of them.")
    return value


def _plain(value: object) -> bool:
    """Whether a value is of the kinds that settings have."""
    if isinstance(value, list | tuple):
        return all(not isinstance(x, list | tuple) and _plain(x) for x in value)
    return value is None or isinstance(value, bool | int | float | str)
