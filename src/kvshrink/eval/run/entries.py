"""The methods of a comparison: by text such as "cskv:keep=0.2,bits=4", or as objects."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kvshrink.errors import SettingError
from kvshrink.methods import build, get
from kvshrink.methods._bounded import Bounded
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.evict import compose
from kvshrink.methods.text import parse_settings, parts_of, split

FULL = "full"
ZEROS = "zeros"
CONTROLS = (FULL, ZEROS)
LIKE = "like"


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
    """ "full", "zeros", "name", "name:setting=value,...", two of them with " + " between (methods/evict/compose.py), or
    "streaming_llm:like=<label of another entry>".

    `defaults` are settings that the text may override. Raises SettingError on anything that is no method or setting.
    """
    if len(parts := parts_of(text)) > 1:
        return Entry(" + ".join(parts), compose.parse(parts))
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
    if len(parts_of(text)) > 1:
        return False
    if name in CONTROLS or rest.startswith(f"{LIKE}="):
        return False
    own = parse_settings(rest)
    return setting not in own and (not own or setting in {f.name for f in dataclasses.fields(get(name))})


def specs(text: str) -> list[str]:
    """The methods of "cskv,rtn:bits=4,group=64,streaming_llm": a part without a name of its own is a setting of the
    method before it."""
    found: list[str] = []
    for part in split(text):
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
