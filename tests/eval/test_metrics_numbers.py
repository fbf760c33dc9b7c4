import pytest

from kvshrink.errors import EvalError
from kvshrink.eval import metrics
from kvshrink.eval.metrics.numbers import first_integer, last_integer, leading_digits
from kvshrink.eval.tasks import Sample


@pytest.mark.parametrize(
    ("text", "leading", "first", "last"),
    [
        ("4244>, line 7", True, True, False),
        ("line 7: 4244", False, False, True),
        ("The number is 4244.", False, True, True),
        ("<4244>", False, True, True),
        (" 4244", False, True, True),
        ("42440", False, False, False),
        ("424", False, False, False),
        ("4244.5", True, True, False),
        ("04244", False, True, True),
        # digits of other scripts are no digits
        ("٤٢٤٤", False, False, False),
        ("none", False, False, False),
        ("", False, False, False),
    ],
)
def test_numbers_in_an_output(text, leading, first, last):
    assert leading_digits(text, ("4244",), {}) == float(leading)
    assert first_integer(text, ("4244",), {}) == float(first)
    assert last_integer(text, ("4244",), {}) == float(last)


def test_leading_digits_may_be_any_of_several_answers():
    assert leading_digits("12", ("11", "12"), {}) == 1.0


def test_metrics_are_found_by_name():
    expected = {"leading_digits", "first_integer", "last_integer", "quoted", "leading_words", "word_recall", "topic"}
    assert expected | {"set_f1", "one_label"} <= set(metrics.known())
    with pytest.raises(EvalError, match=r"No metric 'guess'\. Known: .*leading_digits"):
        metrics.get("guess")
    assert metrics.score(Sample("", "", "", ("7",), "last_integer", 1, {}), "6, 7") == 1.0
