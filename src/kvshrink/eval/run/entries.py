"""The methods of a comparison: by text such as "cskv:keep=0.2,bits=4", or as objects."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvshrink.data.text import literal
from kvshrink.errors import SettingError
from kvshrink.methods import build, get
from kvshrink.methods._roles import Bounded, Method
from kvshrink.methods.artifact import Artifact

FULL = "full"
ZEROS = "zeros"
CONTROLS = (FULL, ZEROS)
LIKE = "like"
LONGEST = 10_000  # characters of a method or task with its settings
OPENS, CLOSES, QUOTES = "([{", ")]}", "'\""


@dataclass(frozen=True)
class Entry:
    """One row of a comparison.

    method: None is a control: "full" is the uncompressed cache; "zeros" is it with the context's keys and values
            set to zero, whose score is that of a guess.
    like:   names an entry before it whose measured bytes this one, a Bounded method, is given sample by sample.
    series:  what rows at several budgets have in common.
    target:  the share of bytes asked for; reached: within 5 % of it; setting: what the budget chose, "keep=0.31".
    """

    label: str
    method: Method | Artifact | None
    like: str | None = None
    series: str = ""
    target: float | None = None
    reached: bool = True
    setting: str = ""


def parse(text: str, defaults: dict | None = None) -> Entry:
    """ "full", "zeros", "name", "name:setting=value,..." or "streaming_llm:like=<label of another entry>".

    `defaults` are settings that the text may override. Raises SettingError on anything that is no method or setting.
    """
    name, _, rest = text.partition(":")
    if name in CONTROLS and not rest:
        return Entry(name, None)
    if rest.startswith(f"{LIKE}=") and issubclass(get(name), Bounded):
        like = rest.removeprefix(f"{LIKE}=")
        return Entry(f"{name} as {like}", build(name, {}), like)
    # a bare name must take every default; one with settings of its own takes those that it has
    fields = {f.name for f in dataclasses.fields(get(name))}
    settings = {k: v for k, v in (defaults or {}).items() if not rest or k in fields}
    settings |= parse_settings(rest)
    return Entry(_label(name, settings), build(name, settings))


def parse_settings(text: str) -> dict[str, object]:
    """ "keep=0.2,bits=4" as a dict. Raises SettingError on a part without "=", and on a setting that comes twice."""
    settings: dict[str, object] = {}
    for part in _split(text):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals or not key:
            raise SettingError(f"{part!r} is no setting. Write name:setting=value,setting=value.")
        if key in settings:
            raise SettingError(f"{key} is set twice in {text!r}. Leave one out.")
        settings[key] = _value(value)
    return settings


def parse_all(texts: Sequence[str], defaults: dict) -> list[Entry]:
    """The entries of several texts. Raises SettingError if a default is taken by none of them."""
    for name in defaults:
        if not any(_takes(text, name) for text in texts):
            every = ", ".join(texts) or "the artifacts"
            raise SettingError(f"--{name} has no effect on {every}: each has its own, or none. Leave it out.")
    return [parse(text, defaults) for text in texts]


def _takes(text: str, setting: str) -> bool:
    """Whether a default for a setting would be taken by the method, or refused by it when it is built."""
    name, _, rest = text.partition(":")
    if name in CONTROLS or rest.startswith(f"{LIKE}="):
        return False
    own = parse_settings(rest)
    return setting not in own and (not own or setting in {f.name for f in dataclasses.fields(get(name))})


def specs(text: str) -> list[str]:
    """The methods of "cskv,rtn:bits=4,group=64,streaming_llm": a part without a name of its own is a setting of the
    method before it."""
    found: list[str] = []
    for part in _split(text):
        setting = "=" in part and ":" not in part.partition("=")[0]
        if setting and found:
            found[-1] += ("," if ":" in found[-1] else ":") + part.strip()
        else:
            found.append(part.strip())
    if not found:
        raise SettingError("no method is named. Write name,name:setting=value (docs/methods.md).")
    return found


def check(entries: Sequence[Entry]) -> None:
    """Raise SettingError on two entries of one label, or a `like` that names none before it."""
    seen: set[str] = set()
    for entry in entries:
        if entry.label in seen:
            raise SettingError(f"method {entry.label!r} is listed twice. Leave one out.")
        if entry.like is not None and entry.like not in seen:
            raise SettingError(f"{entry.label!r}: no entry {entry.like!r} before it. Known: {', '.join(sorted(seen))}.")
        seen.add(entry.label)


def _label(name: str, settings: dict) -> str:
    return name + "".join(f" {k}={v}" for k, v in settings.items())


def _split(text: str) -> list[str]:
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
