"""RULER's two string matches, by hand."""

import pytest

from kvshrink.eval import metrics
from kvshrink.eval.metrics.ruler import string_match_all, string_match_part


def test_metrics_are_found_by_name():
    assert metrics.get("string_match_all") is string_match_all
    assert metrics.get("string_match_part") is string_match_part


@pytest.mark.parametrize(
    ("text", "every", "part"),
    [
        ("1234567 and 7654321.", 1.0, 1.0),
        ("7654321, 1234567", 1.0, 1.0),
        ("it is 71234567", 0.5, 1.0),
        ("1234567", 0.5, 1.0),
        ("123456 7654320", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_all_is_the_share_and_part_is_any(text, every, part):
    answers = ("1234567", "7654321")
    assert string_match_all(text, answers, {}) == every
    assert string_match_part(text, answers, {}) == part


def test_one_of_many_references_is_enough():
    """lm-evaluation-harness's string_match_part gives 1/4 here."""
    answers = ("Denver Broncos", "The Denver Broncos", "the Broncos of Denver", "Denver")
    assert string_match_part("denver", answers, {}) == 1.0
    assert string_match_all("denver", answers, {}) == 0.25


def test_case_does_not_matter_on_either_side():
    assert string_match_all("ABCDE fghij", ("abcde", "FGHIJ"), {}) == 1.0


@pytest.mark.parametrize("control", [chr(i) for i in range(32)])
def test_a_control_character_is_a_line_break(control):
    assert string_match_part(f"new{control}york", ("new\nyork",), {}) == 1.0
    assert string_match_part(f"12{control}34", ("1234",), {}) == 0.0
    assert string_match_part(f"new{control}york", ("new\tyork",), {}) == 0.0


def test_characters_from_the_space_on_stay():
    assert string_match_part("new york", ("new york",), {}) == 1.0
    assert string_match_part("a\x7fb", ("a\x7fb",), {}) == 1.0


def test_space_around_the_output_is_dropped():
    assert string_match_part("  x \n", (" x",), {}) == 0.0
    assert string_match_part("\x00 x", (" x",), {}) == 0.0
