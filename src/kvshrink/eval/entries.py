"""The methods of a comparison: by text such as "cskv:keep=0.2,bits=4", or as objects."""

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kvshrink.errors import SettingError
from kvshrink.methods import build, get
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact

FULL = "full"
LIKE = "like"


@dataclass(frozen=True)
class Entry:
    """One row of a comparison. method None is the full cache. `like` names an entry whose measured bytes this one,
    a StreamingLLM, is given to within 3 %: its window is set sample by sample."""

    label: str
    method: Method | Artifact | None
    like: str | None = None


def parse(text: str, defaults: dict | None = None) -> Entry:
    """ "name", "name:setting=value,..." or "streaming_llm:like=<label of another entry>".

    `defaults` are settings that the text may override. Raises SettingError on anything that is no method or setting.
    """
    name, _, rest = text.partition(":")
    if name == FULL and not rest:
        return Entry(FULL, None)
    if name == "streaming_llm" and rest.startswith(f"{LIKE}="):
        like = rest.removeprefix(f"{LIKE}=")
        return Entry(f"{name} as {like}", build(name, {}), like)
    # a bare name must take every default; one with settings of its own takes those that it has
    fields = {f.name for f in dataclasses.fields(get(name))}
    settings = {k: v for k, v in (defaults or {}).items() if not rest or k in fields}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise SettingError(f"{text!r}: {part!r} is no setting. Write name:setting=value,setting=value.")
        settings[key.strip()] = _value(value.strip())
    return Entry(_label(name, settings), build(name, settings))


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
    return [p for p in text.split(",") if p.strip()]


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
