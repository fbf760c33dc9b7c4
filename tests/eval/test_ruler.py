"""RULER: every variant fills its length and repeats itself, and what is refused."""

import re
import sys

import pytest
from transformers import AutoTokenizer

from kvshrink import reference
from kvshrink.errors import EvalError
from kvshrink.eval import metrics
from kvshrink.eval.run import prompt
from kvshrink.eval.tasks import _ruler_words
from kvshrink.eval.tasks.generated import ruler

LIMITS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}
each_variant = pytest.mark.parametrize("variant", ruler.VARIANTS)


def quarter(text: str) -> int:
    """Tokens, for a test."""
    return -(-len(text) // 4)


def made(variant, n=1, seed=0, tokens=2048, count=quarter, **settings):
    settings |= ruler.VARIANTS.get(variant, {"task": variant})
    return ruler.samples(n, seed, tokens=tokens, count=count, **settings)


def length(sample, count=quarter):
    return 1 + count(sample.context) + count(sample.question + sample.answer_prefix) + sample.max_new_tokens


def test_the_suite_runs_eleven_tasks_and_names_the_book():
    assert list(ruler.VARIANTS) == [
        "niah_single_1",
        "niah_single_2[books]",
        "niah_single_3[books]",
        "niah_multikey_1[books]",
        "niah_multikey_2",
        "niah_multikey_3",
        "niah_multivalue[books]",
        "niah_multiquery[books]",
        "vt",
        "cwe",
        "fwe",
    ]


@each_variant
def test_a_sample_fills_its_tokens(variant):
    for tokens in (1500, 4096, 9000):
        for sample in made(variant, 3, tokens=tokens):
            assert 0.95 * tokens < length(sample) <= tokens


@each_variant
def test_with_the_reference_model_tokenizer_and_little_counting(variant):
    tokenizer = AutoTokenizer.from_pretrained(str(reference.FOLDER))
    counter = prompt.counter(tokenizer)
    calls = []

    def count(text):
        calls.append(text)
        return counter(text)

    (sample,) = made(variant, tokens=4096, count=count)
    assert 0.95 * 4096 < length(sample, counter) <= 4096
    assert sum(map(len, calls)) <= 16 * len(sample.prompt)


@each_variant
def test_a_longer_run_repeats_a_shorter_one_and_seeds_and_indices_differ(variant):
    few, more = made(variant, 3), made(variant, 6)
    assert more[:3] == few
    contexts = [s.context for s in [*more, *made(variant, 6, seed=1)]]
    assert len(set(contexts)) == 12


@each_variant
def test_what_a_sample_says_of_itself(variant):
    for i, sample in enumerate(made(variant, 4)):
        assert sample.meta["index"] == i
        assert sample.meta["task"] == variant
        assert sample.meta["length"] == 2048
        assert sample.max_new_tokens == LIMITS[variant.split("_")[0]]
        assert sample.metric == "string_match_all"
        assert metrics.score(sample, ", ".join(sample.answers)) == 1.0
        assert metrics.score(sample, " ".join(a[:-1] + "~" for a in sample.answers)) == 0.0


# --- what is refused


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(EvalError, match=r"no task 'niah'\. Known: niah_single_1, .*qa_2"):
        made("niah")


@each_variant
def test_too_few_tokens_and_no_samples(variant):
    with pytest.raises(EvalError, match=rf"^ruler {re.escape(variant)}: tokens=150 leaves no room for \d+ "):
        made(variant, tokens=150)
    with pytest.raises(EvalError, match="0 samples"):
        made(variant, 0)


def test_more_tokens_than_words():
    with pytest.raises(EvalError, match="8166 distinct words do not fill tokens=500000"):
        made("cwe", tokens=500_000)


@pytest.mark.parametrize("task", ["vt", "niah_single_1", "niah_multikey_3"])
def test_a_file_for_a_task_that_reads_none(task, tmp_path):
    with pytest.raises(EvalError, match=f"ruler {task}: reads no file"):
        made(task, path=tmp_path)


def test_an_empty_book(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(EvalError, match=r"empty\.txt has no words"):
        made("niah_single_2", path=path)


def test_without_wonderwords(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    _ruler_words.words.cache_clear()
    with pytest.raises(EvalError, match=r"pip install 'kvshrink\[eval\]'"):
        made("cwe")
    assert made("vt")
