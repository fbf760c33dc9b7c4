"""What a search may choose, and the setting of a method that fits so many bytes.

Every method has a setting that moves its bytes (`Method.budget_setting`); all else is a choice from a short list, so
each trial uses its budget up, and the search compares what the bytes are spent on.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

from kvshrink.attach.budget import CacheBudget
from kvshrink.errors import SettingError
from kvshrink.methods import build, get, name_of
from kvshrink.methods._roles import Method

METHODS = ("spectral", "cskv", "rtn", "kivi")
WINDOWS, SINKS = (8, 16, 32, 64, 128), (0, 4)  # a small window frees bytes for the body, a large one is exact
# tokens from which on so long a window is tried too: below, it takes too much of the cache
LONG, LONG_WINDOW = 8192, 256
FEWEST_FIRST = ("window", "window_bits", "sinks")  # of each, the smallest value takes the fewest bytes

Choices = Mapping[str, Sequence]


def known(names: Sequence[str]) -> list[str]:
    """The names, each once. Raises SettingError on one that no plan can have."""
    for name in names:
        cls = get(name)
        if cls.budget_setting is None or cls.budget_setting == "window":
            raise SettingError(
                f"{name} cannot be planned: nothing but its window moves its bytes. Use {', '.join(METHODS)}."
            )
    if not names:
        raise SettingError(f"--methods names none. Use some of {', '.join(METHODS)}.")
    return list(dict.fromkeys(names))


def windows(tokens: int) -> tuple[int, ...]:
    """The windows that a sequence of so many tokens may have."""
    return (*WINDOWS, LONG_WINDOW) if tokens >= LONG else WINDOWS


def choices(name: str, sizes: CacheBudget) -> Choices:
    """{setting: values} of a method, its budget setting left out."""
    cls = get(name)
    rounded = "auto" if cls().rounds_window else 8  # which leaves layers exact where 8 bits would not do
    window = windows(sizes.tokens)
    return {"window": window, "window_bits": (rounded, None), "sinks": SINKS, **cls.search_space(sizes.layers)}


def defaults(name: str, sizes: CacheBudget) -> dict[str, Any]:
    """The method's own settings, as far as they are among the choices."""
    own = {f.name: f.default for f in fields(get(name))}
    own["window_bits"] = "auto" if get(name)().rounds_window else None
    return {k: own[k] for k, values in choices(name, sizes).items() if own[k] in values}


def suggest(trial: Any, names: Sequence[str], sizes: CacheBudget) -> Method:
    """What an Optuna trial chooses, the budget setting as the method has it."""
    name = trial.suggest_categorical("method", names)
    chosen = {k: trial.suggest_categorical(f"{name}.{k}", list(v)) for k, v in choices(name, sizes).items()}
    return build(name, chosen)


def fit_to_budget(method: Method, sizes: CacheBudget, nbytes: float) -> Method | None:
    """The method at the largest setting that holds no more than `nbytes` of one sequence, or None."""
    method, name = sizes.resolved(method), str(method.budget_setting)
    values = method.budget_values(sizes.layers[0], sizes.tokens)

    def held(i: int) -> int:
        return sizes.held(replace(method, **{name: values[i]}))

    best = bisect_right(range(len(values)), nbytes, key=held) - 1
    return replace(method, **{name: values[best]}) if best >= 0 and held(best) > 0 else None


def smallest(name: str, sizes: CacheBudget) -> tuple[int, Method]:
    """(bytes of one sequence, the method) at the smallest of all its choices. Raises SettingError if none fits."""
    every, found = choices(name, sizes), []
    alike = {*FEWEST_FIRST, *get(name).byte_neutral}
    for chosen in product(*(values[:1] if k in alike else values for k, values in every.items())):
        method = build(name, dict(zip(every, chosen, strict=True)))
        values = method.budget_values(sizes.layers[0], sizes.tokens)
        held = [*range(len(values))]
        at = bisect_right(
            held, 0, key=lambda i, m=method, v=values: sizes.held(replace(m, **{str(m.budget_setting): v[i]}))
        )
        if at < len(values):
            method = replace(method, **{str(method.budget_setting): values[at]})
            found.append((sizes.held(method), method))
    if not found:
        raise SettingError(f"{name} has no setting for this model's {sizes.layers[0].width} KV channels.")
    return min(found, key=lambda pair: pair[0])


def label(method: Method) -> str:
    """The settings that are not the method's own, the budget setting always: "budget=0.0487 window=16"."""
    own = {f.name: f.default for f in fields(method)}
    named = {k: v for k, v in method.settings().items() if v != own[k] or k == method.budget_setting}
    return f"{name_of(method)} " + " ".join(
        f"{k}={v:.5g}" if type(v) is float else f"{k}={v}" for k, v in named.items()
    )
