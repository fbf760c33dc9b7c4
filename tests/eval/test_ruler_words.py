"""RULER's vt, cwe and fwe: official prompts to the letter, by hand, and what they draw."""

import re
from collections import Counter

import pytest

from kvshrink.eval.tasks import _ruler_fwe, _ruler_vt, _ruler_words
from tests.eval.test_ruler import made, quarter

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    "\n"
    "VAR {0} = {value}\n"
    f"{NOISE}\n"
    "VAR {1} = VAR {0} \n"
    f"{NOISE}\n"
    "VAR {2} = VAR {1} \n"
    f"{NOISE}\n"
    "VAR {3} = VAR {2} \n"
    f"{NOISE}\n"
    "VAR {4} = VAR {3} \n"
    f"{NOISE}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "5 variables are assigned the value {value}, they are: "
)


def test_vt_to_the_letter():
    """At 100 tokens a line of noise, example and prompt have the five lines that a chain needs."""
    for sample in made("vt", 20, tokens=1100, count=lambda text: 100 * text.count(NOISE)):
        statements = re.findall(r"VAR ([A-Z]+) = (.+)", sample.context)
        short, long = [name for name, _ in statements[:5]], [name for name, _ in statements[5:]]
        old, new = statements[0][1], statements[5][1]
        assert re.fullmatch("[A-Z]{3}( [A-Z]{3}){4} [A-Z]{5}( [A-Z]{5}){4}", " ".join(short + long))
        assert re.fullmatch(r"[1-9]\d{4} [1-9]\d{4}", f"{old} {new}")
        example = VT.format(*short, value=old) + " " + " ".join(short) + "\n\n"
        assert sample.prompt == example + VT.format(*long, value=new)
        assert sample.question.startswith("Question: Find all variables")
        assert sample.answer_prefix.startswith(" Answer: According")
        assert sample.answers == tuple(long)


def test_vt_hides_the_chain_in_order():
    places = set()
    for sample in made("vt", 20):
        example, context = sample.context.split("\n\nMemorize")
        assert quarter(f"{example}\n\n") <= 500
        assert example.count(NOISE) > 5
        assert quarter(f"{example}\n\n" + NOISE) > 500
        lines = context.strip().split("\n")[2:]
        statements = [line for line in lines if line != NOISE]
        value = re.search(r"value (\d+)", sample.question)[1]
        assert [line.rstrip() for line in statements] == [
            line.rstrip() for line in _ruler_vt.chain(list(sample.answers), value)
        ]
        places.add(tuple(lines.index(line) for line in statements))
        assert all(Counter(re.findall("[A-Z]{5}", context))[name] == 2 for name in sample.answers[:4])
    assert len(places) == 20
    assert min(p[0] for p in places) < 5
    assert max(p[-1] for p in places) > 50


CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{}\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)


def entries(text):
    numbers, found = zip(*re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", text), strict=True)
    assert numbers == tuple(str(i) for i in range(1, len(numbers) + 1))
    return Counter(found)


@pytest.mark.parametrize(
    ("tokens", "example", "often"),
    [(10 * (40 + 10 + 61) + 121, (20, 3, 1), (11, 6, 1)), (10 * (190 + 10 + 369) + 121, (40, 10, 3), (33, 30, 3))],
)
def test_cwe_to_the_letter(tokens, example, often):
    """At 10 tokens an entry these have room for ten common words and 1 other, or 23 others."""
    known = set(_ruler_words.words("adjective", "noun", "verb"))
    for sample in made("cwe", 5, tokens=tokens, count=lambda text: 10 * len(re.findall(r"\d+\. ", text))):
        frame = re.escape(CWE).replace(r"\{\}", "(.+)")
        parts = re.fullmatch(f"{frame} (.+)\n{frame}", sample.prompt)
        assert parts
        solved, given = entries(parts[1]), entries(parts[3])
        assert sorted(solved.values()) == [example[2]] * (example[0] - 10) + [example[1]] * 10
        assert list(entries(parts[2])) == [w for w in entries(parts[2]) if solved[w] == example[1]]
        assert sorted(given.values()) == [often[2]] * (often[0] - 10) + [often[1]] * 10
        assert {w for w, times in given.items() if times == often[1]} == set(sample.answers)
        assert len(sample.answers) == 10
        assert re.findall(r"\d+\. (\S+)", parts[3])[:10] != list(sample.answers)  # mixed
        assert {*solved, *given} <= known
        assert sample.question == "Question: What are the 10 most common words in the above list?"
        assert (sample.meta["often"], sample.meta["seldom"]) == often[1:]


def test_cwe_has_the_words_that_upstream_has():
    assert len(_ruler_words.words("adjective", "noun", "verb")) == 8166
    assert len(_ruler_words.words("noun")) == 6782


def test_cwe_takes_the_short_form_where_the_long_one_has_no_room():
    often = [made("cwe", tokens=4096, count=lambda t, k=k: len(t) * k // 100)[0].meta["often"] for k in (20, 30, 60)]
    assert often == [30, 30, 6]


def test_fwe_to_the_letter():
    """By hand: 74 / zeta(2) = 44.99, and 44.99 / 4, 9, 16, 25, 36, 49 = 11.2, 4.999, 2.8, 1.8, 1.2, 0.9."""
    head = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    question = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    words = len((head + question + prefix).split()) + 44 + 11 + 4 + 2 + 1 + 1
    for sample in made("fwe", 10, tokens=10 * words + 51, count=lambda text: 10 * len(text.split())):
        text = sample.context.removeprefix(head).removesuffix("\n")
        assert sample.prompt == f"{head}{text}\n{question}{prefix}"
        assert (sample.question, sample.answer_prefix) == (question, prefix)
        assert text.split(" ")[:44] != ["..."] * 44  # mixed
        counted = Counter(text.split(" ")).most_common()
        assert [times for _, times in counted] == [44, 11, 4, 2, 1, 1]
        assert [word for word, _ in counted][:4] == ["...", *sample.answers]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counted[1:])


def test_fwe_answers_are_never_tied():
    for n in range(_ruler_fwe.SHORTEST, 2000):
        assert sorted(set(_ruler_fwe.counts(n, 5)), reverse=True) == _ruler_fwe.counts(n, 5)


def test_fwe_has_a_distinct_word_for_fifty_tokens():
    (sample,) = made("fwe", tokens=649)
    assert len(set(sample.context.split("words. ")[1].split())) == 12
