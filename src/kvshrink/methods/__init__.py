"""All methods, found by file name: methods/<role>/<name>.py defines METHOD. Nothing to register."""

import dataclasses
import difflib
import importlib
import pkgutil
from functools import cache

from kvshrink.errors import SettingError
from kvshrink.methods._roles import Method


@cache
def names() -> dict[str, str]:
    """{method name: module path}. The file name is the method's name everywhere."""
    found = {}
    for role in pkgutil.iter_modules(__path__):
        if role.ispkg and not role.name.startswith("_"):
            package = importlib.import_module(f"{__name__}.{role.name}")
            for m in pkgutil.iter_modules(package.__path__):
                if not m.name.startswith("_"):
                    found[m.name] = f"{package.__name__}.{m.name}"
    return dict(sorted(found.items()))


def get(name: object) -> type[Method]:
    """The method class called `name`. Raises SettingError that lists the known names."""
    known = names()
    if not isinstance(name, str):
        raise SettingError(f"a method is named by text, not by a {type(name).__name__}. Known: {', '.join(known)}.")
    if name not in known:
        near = difflib.get_close_matches(name[:60], known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SettingError(f"no method {name[:60]!r}. Known: {', '.join(known)}.{hint}")
    found: type[Method] = importlib.import_module(known[name]).METHOD
    return found


def build(name: object, settings: object) -> Method:
    """The method `name` with these settings. Raises SettingError on a setting that it does not have."""
    cls = get(name)
    if not isinstance(settings, dict):
        raise SettingError(f"settings of {name} are a {type(settings).__name__}, not an object.")
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in settings:
        if key not in fields:
            near = difflib.get_close_matches(str(key)[:60], fields, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingError(f"{name} has no setting {str(key)[:60]!r}. It has: {', '.join(fields)}.{hint}")
    return cls(**settings)


def name_of(method: Method) -> str:
    """The file name of a method: 'cskv' for a CSKV object."""
    return type(method).__module__.rsplit(".", 1)[1]
