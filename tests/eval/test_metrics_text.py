"""Scores worked out by hand. The ROUGE and BLEU cases are what PyPI rouge 1.0.1, rouge-score 0.1.2 and nltk give."""

import importlib
import json
import sys
import types

import pytest

from kvshrink.errors import EvalError
from kvshrink.eval import metrics


def score(name, text, *answers, **meta):
    return metrics.get(name)(text, answers, meta)


@pytest.fixture
def jieba(monkeypatch):
    """Cuts after every two characters: the rule is not the point here."""
    cut = lambda text, cut_all: [text[i : i + 2] for i in range(0, len(text), 2)]  # noqa: E731
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(cut=cut))


def test_every_metric_scores_from_0_to_1_and_has_a_name_of_its_own():
    names = ["qa_f1", "rouge_l", "rouge_lsum", "choice_letter", "code_similarity", "first_digits", "bleu_1", "gated_f1"]
    for name in names:
        meta = {"keywords": ""}
        assert 0 <= metrics.get(name)("some words 1", ("other words 2",), meta) <= 1, name


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("The Cat sat.", ("a cat",), 2 / 3),  # articles and punctuation do not count: 1 of 2 and 1 of 1
        ("cat cat dog", ("cat dog dog",), 2 / 3),  # each word as often as both have it
        ("dog", ("cat", "dog"), 1.0),  # the best answer
        ("bird", ("cat",), 0.0),
        ("", ("cat",), 0.0),
        ("U.S.A", ("usa",), 1.0),
    ],
)
def test_qa_f1(text, answers, expected):
    assert score("qa_f1", text, *answers) == pytest.approx(expected)


def test_only_the_first_line_counts_where_the_benchmark_says_so():
    assert score("qa_f1", "\n\nParis\nQuestion: where?", "Paris", first_line=True) == 1.0
    assert score("qa_f1", "Paris\nQuestion: where?", "Paris") < 1.0
    assert score("rouge_l", "a b\nc d", "a b", first_line=True) == pytest.approx(1.0)
    assert score("classification", "Food\nAnimal", "Food", classes=["Food", "Animal"], first_line=True) == 1.0


def test_chinese_f1_by_words_and_by_characters(jieba):
    # 天气|很好 against 天气|不好
    assert score("qa_f1_zh", "天气很好", "天气不好") == pytest.approx(0.5)
    assert score("qa_f1_zh", "天气。、很好", "天气很好") == pytest.approx(1.0)
    assert score("qa_f1_chars", "天气很好。", "天气不好") == pytest.approx(0.75)


def test_chinese_scores_name_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    for name in ("qa_f1_zh", "rouge_l_zh", "gated_f1_zh", "rouge_l_stop_zh"):
        with pytest.raises(EvalError, match=r"jieba .*pip install 'kvshrink\[zh\]'"):
            score(name, "天气", "天气", keywords="")


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("a b c", "a b c", 1.0),
        ("c b a", "a b c", 1 / 3),  # one word in order
        ("a a a a", "a b", 2 / 3),  # different words: 1 of 1 and 1 of 2
        ("x y. a b", "a b. x y", 1.0),  # any two sentences
        ("", "a", 0.0),
        (".", "a", 0.0),
        ("a. ", "a", 2 / 3),  # white space after the last full stop is a word
        ("a x b", "b. a", 0.8),  # 2 of 3 and 2 of 2
    ],
)
def test_rouge_l(text, answer, expected):
    assert score("rouge_l", text, answer) == pytest.approx(expected, abs=1e-7)


def test_of_several_longest_subsequences_the_packages_one_is_taken():
    # of "x y" and "y x" it takes "y", to which the second sentence adds nothing; "x" would give 1
    assert score("rouge_l", "y x. y", "x y") == pytest.approx(0.5, abs=1e-7)
    # rouge-score takes "x" where rouge takes "y"
    assert score("rouge_lsum", "y x\nx", "x y") == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The cat sat", "the CAT sat!", 1.0),
        ("the the the", "the cat", 2 / 5),  # a word counts as often as both have it: 1 of 3 and 1 of 2
        ("cat\nthe", "the cat", 1.0),  # lines are joined by the union
        ("sat cat", "cat sat", 0.5),
        ("a", "a\na", 2 / 3),  # not once for each line
        ("", "cat", 0.0),
    ],
)
def test_rouge_lsum(text, answer, expected):
    assert score("rouge_lsum", text, answer) == pytest.approx(expected)


def test_classification_shares_among_the_named_and_skips_like_upstream():
    classes = ["Food", "Food group", "Animal"]
    assert score("classification", "Animal", "Animal", classes=classes) == 1.0
    assert score("classification", "Animal or Food", "Animal", classes=classes) == 0.5
    assert score("classification", "Food group", "Food group", classes=classes) == 1.0  # "Food" is a part of it
    assert score("classification", "nothing", "Animal", classes=classes) == 0.0
    # after "A" is removed the next, "B", is skipped and stays: 1/2 instead of 1
    assert score("classification", "A B C", "A B C", classes=["A", "B", "A B C"]) == 0.5


def test_numbers_of_paragraphs_and_counts():
    assert score("retrieval", "Paragraph 7", "Paragraph 7") == 1.0
    assert score("retrieval", "7 or 8 or 17", "Paragraph 7") == pytest.approx(1 / 3)
    assert score("retrieval", "段落7", "段落7") == 1.0
    assert score("retrieval", "none", "Paragraph 7") == 0.0
    assert score("count_share", "5, 5 and 6", "5") == pytest.approx(2 / 3)
    assert score("count_share", "55", "5") == 0.0


def test_code_similarity():
    assert score("code_similarity", "\n# a comment\nreturn x", "return x") == 1.0
    assert score("code_similarity", "```\n// c\n", "x") == 0.0
    # 2 * 3 common / 8
    assert score("code_similarity", "abcd", "abdx") == 0.75
    # 2 * 1 / 3 = 0.667, in whole percent
    assert score("code_similarity", "ab", "a") == 0.67


def test_code_similarity_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.fuzz", None)
    with pytest.raises(EvalError, match=r"rapidfuzz .*kvshrink\[eval\]"):
        score("code_similarity", "x", "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The correct answer is (B).", 1.0),
        ("The correct answer is **B**", 1.0),
        ("The correct answer is A. No: The correct answer is (B)", 1.0),  # parentheses first
        ("B", 0.0),
        ("the correct answer is (B)", 0.0),
        ("The correct answer is (C)", 0.0),
    ],
)
def test_choice_letter(text, expected):
    assert score("choice_letter", text, "B") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" B. Bob", 1.0),
        ("Cleo", 0.0),  # starts with a letter that is another choice
        ("the lake", 1.0),
        ("I think the answer is: B", 1.0),
        ("so the answer is the lake!", 1.0),
        ("the answer is", 0.0),
        ("it must be B or C", 1.0),
        ("it must be C or B", 0.0),
        ("no idea", 0.0),
        ("", 0.0),
    ],
)
def test_choice_or_text(text, expected):
    assert score("choice_or_text", text, "the lake", "B") == expected


def test_lveval_gate():
    answer, keys = "Ada Lovelace wrote the first program", "Ada Lovelace"
    # answer: 5 words without the article
    assert score("gated_f1", "wrote the first program", answer, keywords=keys) == 0.0
    assert score("gated_f1", "Ada wrote it", answer, keywords=keys) == pytest.approx(2 * 2 / (3 + 5))
    # listed words open no gate, though they are key words; they count in the F1
    assert score("gated_f1", "of", "of it", keywords="of it") == 0.0
    assert score("gated_f1", "wrote", answer, keywords="") == pytest.approx(2 / 6)


def test_lveval_gate_in_chinese(jieba):
    assert score("gated_f1_zh", "甲乙丙丁", "甲乙丙戊", keywords="") == pytest.approx(
        0.5
    )  # the answer is the key: 1 of 2
    assert score("gated_f1_zh", "甲乙", "甲乙丙戊己庚", keywords="") == 0.0  # 1 of 3
    assert score("gated_f1_zh", "甲乙", "甲乙丙戊己庚", keywords="甲乙") == pytest.approx(0.5)
    assert score("gated_f1_zh", "可以", "可以丙戊", keywords="可以") == 0.0  # a listed word


def test_lveval_rouge_drops_listed_words(jieba):
    # "甲乙 可以" is cut again into 甲乙| 可|以: 以 is listed
    assert score("rouge_l_stop_zh", "甲乙可以", "甲乙") == pytest.approx(2 / 3, abs=1e-6)
    assert score("rouge_l_zh", "甲乙可以", "甲乙") == pytest.approx(2 / 3, abs=1e-6)
    assert score("rouge_l_stop_zh", "", "甲乙") == 0.0


def test_babilong_lists():
    labels = ["apple", "football", "milk", "nothing"]
    assert score("exact_labels", "Apple and milk. Or football", "apple,milk", labels=labels) == 1.0
    assert score("exact_labels", "milk", "apple,milk", labels=labels) == 0.0
    assert score("exact_labels", "apple, milk, football", "apple,milk", labels=labels) == 0.0
    assert score("exact_labels", "nothing", "nothing", labels=labels) == 1.0


@pytest.mark.parametrize(
    ("name", "text", "answers", "expected"),
    [
        ("word_in_text", '"ab-1": "cd-2"', ("cd-2",), 1.0),
        ("word_in_text", "cd-22", ("cd-2",), 0.0),
        ("name_in_text", "It is Bob.", ("BOB",), 1.0),
        ("name_in_text", "Bobby", ("BOB",), 0.0),
        ("first_digits", "is 71432, not 9", ("71432",), 1.0),
        ("first_digits", " 0712", ("712",), 0.0),
        ("last_word_number", "The value is: -5.", ("-5",), 1.0),
        ("last_word_number", "-5 or 6", ("-5",), 0.0),
        ("last_word_number", "five", ("5",), 0.0),
        ("last_word_number", "", ("5",), 0.0),
        ("first_number", "it is 12.", ("12",), 1.0),
        ("first_number", "12.9", ("12",), 1.0),
        ("first_number", "3.5", ("3.5",), 1.0),
        ("first_number", "none", ("12",), 0.0),
        ("leading_values", "[1, 4, 9]", ("1", "4", "8"), 2 / 3),
        ("leading_values", "[1, 4, 8, 9]", ("1", "4", "8"), 1.0),
        ("leading_values", "[1]", ("1", "4"), 0.5),
        ("leading_values", "[2, 4]", ("1", "4"), 0.0),
        ("code_choice", "B. load", ("load", "B"), 1.0),
        ("code_choice", "The correct option is: B", ("load", "B"), 1.0),
        ("code_choice", "the answer is: load", ("load", "B"), 1.0),
        ("code_choice", "B", ("load", "B"), 0.0),
        ("code_choice", "the answer is:", ("load", "B"), 0.0),
        ("text_contains", "x42y", ("42",), 1.0),
        ("text_contains", "ab", ("AB",), 0.0),
        ("text_contains_any", "It was ada", ("Bob", "Ada"), 1.0),
        ("text_contains_any", "Cleo", ("Bob", "Ada"), 0.0),
    ],
)
def test_infinitebench_and_scbench(name, text, answers, expected):
    assert score(name, text, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "text", "answer", "expected"),
    [
        ("bleu_1", "a b c d", "a b x d", 0.75),
        ("bleu_1", "a a", "a b", 0.5),  # no more often than there
        ("bleu_1", "a", "a b", 0.36787944117144233),  # exp(1 - 2/1)
        ("bleu_1", "", "a", 0.0),
        ("bleu_4", "a b c d e", "a b c d x", 0.5),
        ("bleu_4", "a b", "a b", 0.0),
        ("rouge_1_recall", "a b", "a b c b", 2 / 3),
        ("rouge_2_recall", "a b c", "a b d", 0.5),
        ("rouge_l_recall", "b a", "a b c", 1 / 3),
    ],
)
def test_loogle_text(name, text, answer, expected):
    assert score(name, text, answer) == pytest.approx(expected)


def test_loogle_cloze():
    answer = json.dumps({"<mask-0>": "Ada Lovelace", "<mask-1>": "London"})
    text = "{'<mask-0>': 'Ada', '<mask-1>': 'London', '<mask-2>': 'x'}"
    assert score("cloze_exact", text, answer) == 0.5
    assert score("cloze_partial", text, answer) == 1.0
    for wrong in ("London", "['London']", "{'<mask-0>': ", "{'<mask-5>': 'London'}", "'<mask-1>'", "{'<mask-1>': 3}"):
        assert score("cloze_partial", wrong, answer) == 0.0
    # no code is run
    assert score("cloze_exact", "__import__('os').getcwd()", answer) == 0.0


def test_metrics_are_found_once():
    found = [
        name
        for module in ("qa", "rouge", "choices", "longbench", "lveval", "babilong", "infinitebench", "loogle")
        for name, f in vars(importlib.import_module(f"kvshrink.eval.metrics.{module}")).items()
        if isinstance(f, types.FunctionType) and not name.startswith("_")
    ]
    assert len(found) == len(set(found)) == 32
    assert set(found) <= set(metrics.known())
