"""Settings of any type lead to a method or to one line; what is valid depends on the value alone."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
import torch

import kvshrink
from kvshrink import CSKV, Spectral, methods
from kvshrink.errors import SettingError
from kvshrink.methods._types import fits, shown

DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]


class Odd:
    """Neither shown, nor compared, nor hashed."""

    __hash__ = None

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError


NASTY = [
    *(None, True, False, 0, 1, -1, 3, 2.0, 4.0, 1.5, 0.5, -0.5, 10**9, 2**31, 2**63, 10**400, 10**5000, -(10**400)),
    *(float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 1j, "", "x", "auto", "4", "None", "-" * 100_000, b"x"),
    *([], [4], [1, 2, 4], [None], ["x"], [[1]], (), (1,), (0, 0), (1, "x"), (True, False), (256, 10**9), {}, {"a": 1}),
    *({4}, DEEP, Odd(), object(), int, np.int64(4), np.float64(0.5), np.array([4]), torch.tensor(4), range(3), "cskv"),
    *("rtn", "saq", "zipcache", "kivi\n", "turboquant"),
]


def built(name: str, settings: dict) -> methods.Method | None:
    """The method, or None if it is refused, as it must be."""
    found: list[str] = []
    try:
        return methods.build(name, settings)
    except SettingError as error:
        found.append(str(error))
    assert re.fullmatch(r"[^\n]{1,600}", found[0])
    return None


@pytest.mark.parametrize("name", methods.names())
def test_any_value_of_any_setting_makes_a_method_or_one_line(name):
    for field in dataclasses.fields(methods.get(name)):
        made = 0
        for value in NASTY:
            method = built(name, {field.name: value})
            if method is not None:
                made += 1
                assert methods.build(name, json.loads(json.dumps(method.settings()))) == method
                assert hash(method) == hash(dataclasses.replace(method))
        assert made < len(NASTY)


def test_a_list_is_taken_for_a_tuple():
    assert Spectral(widths=[1, 2, 4]) == Spectral(widths=(1, 2, 4))
    assert hash(Spectral(widths=[8]))


@pytest.mark.parametrize("first", [2, None])
def test_what_is_valid_does_not_depend_on_what_was_asked_before(first):
    if first is not None:
        assert CSKV(codec="turboquant", bits=first).bits == first
        assert CSKV(codec="turboquant", bits=4).bits == 4
    for bits in (2.0, True, np.int64(2), np.float64(2.0)):
        with pytest.raises(SettingError, match=r"^bits="):
            CSKV(codec="turboquant", bits=bits)


def test_numbers_are_of_the_type_that_is_named():
    assert fits(1, float)
    assert not fits(True, int)
    assert not fits(1.0, int)
    assert fits((1, 2), tuple[int, int])
    assert not fits((1, 2, 3), tuple[int, int])
    assert fits((), tuple[int, ...])
    assert not fits((1, 2.0), tuple[int, ...])
    assert len(shown(10**5000)) <= 60


@pytest.mark.parametrize("given", [["rtn"], 3, None, {}, "x" * 100_000])
def test_a_method_of_another_name_is_refused_in_one_line(given):
    with pytest.raises(SettingError, match=r"^(no method|a method is named)[^\n]{0,700}$"):
        methods.build(given, {})
    with pytest.raises(SettingError, match=r"^settings of rtn are a \w+, not an object\.$"):
        methods.build("rtn", [given])
    with pytest.raises(SettingError, match=r"^rtn has no setting [^\n]{0,300}$"):
        methods.build("rtn", {str(given): 1})


def test_packages_are_modules_and_functions():
    import kvshrink.attach.hook as hook
    import kvshrink.fit.probe as probe
    from kvshrink.fit import probe as same

    assert probe is same is kvshrink.fit.probe
    assert kvshrink.attach.hook is hook
    assert list(inspect.signature(kvshrink.fit).parameters)[:3] == ["model", "method", "data"]
    assert kvshrink.fit.__doc__.startswith("Fit a method")
    assert kvshrink.attach.__doc__.startswith("Let the model")
    with pytest.raises(SettingError, match="is not a model"):
        kvshrink.fit(None, CSKV(), "x")
    with pytest.raises(SettingError, match="is not a model"):
        kvshrink.attach(None)
