"""RULER's needle tasks: official cases of niah_multikey_3, official prompts to the letter, and where needles stand."""

import json
import re
from pathlib import Path
from uuid import UUID

import pytest

from kvshrink import data
from kvshrink.eval import metrics
from kvshrink.eval.tasks import _ruler_essay, _ruler_niah, _ruler_words
from kvshrink.eval.tasks.generated import ruler
from tests.eval.test_ruler import made

DATA = Path(__file__).parent / "data" / "ruler_niah_multikey_3_4096.jsonl"
ALL_500 = Path(__file__).parents[3] / "shared" / "data" / "ruler_sample" / "niah_multikey_3_4096.jsonl"
UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# --- official cases


def official(path=DATA):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(params=["five", "all 500"])
def cases(request):
    if request.param == "five":
        return official()
    if not ALL_500.is_file():
        pytest.skip("the other 495 official cases are not here")
    return official(ALL_500)


def grammar(text: str) -> list[str]:
    """The prompt with ids taken out, and equal lines that follow each other taken as one."""
    lines = re.sub(UUID4, "<id>", text).split("\n")
    return [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]


def facts(text: str) -> list[tuple[str, str]]:
    return re.findall(rf"^One of the special magic uuids for ({UUID4}) is: ({UUID4})\.$", text, flags=re.M)


def test_official_cases_and_ours_have_one_grammar(cases):
    expected = [
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.",
        "One of the special magic uuids for <id> is: <id>.",
        "What is the special magic uuid for <id> mentioned in the provided text? "
        "The special magic uuid for <id> mentioned in the provided text is",
    ]
    for text in [case["input"] for case in cases] + [s.prompt for s in made("niah_multikey_3", 20, tokens=4096)]:
        assert grammar(text) == expected


def test_an_official_case_is_written_again_from_its_keys_and_values(cases):
    kind = ruler.NIAH["niah_multikey_3"]
    for case in cases:
        lines = [_ruler_niah.needle(kind, key, value) for key, value in facts(case["input"])]
        (asked,) = [key for key, value in facts(case["input"]) if [value] == case["outputs"]]
        assert "".join(_ruler_niah.prompt(kind, "\n".join(lines), [asked])) == case["input"]


def test_ours_have_as_many_needles_as_official_ones(cases):
    """Upstream went up in steps of 25 lines then: 50 and the needle fit into 4096 tokens, 75 and the needle do not."""
    per_character = max((case["length"] - 128) / len(case["input"]) for case in cases)
    ours = made("niah_multikey_3", 20, tokens=4096, count=lambda text: round(per_character * len(text)))
    assert {len(facts(case["input"])) for case in cases} == {51}
    assert all(51 <= len(facts(s.prompt)) < 76 for s in ours)


def test_one_value_answers_and_scores(cases):
    ours = made("niah_multikey_3", 20, tokens=4096)
    for text, outputs in [(c["input"], tuple(c["outputs"])) for c in cases] + [(s.prompt, s.answers) for s in ours]:
        (asked,) = set(re.findall(rf"special magic uuid for ({UUID4})", text))
        assert [value for key, value in facts(text) if key == asked] == list(outputs)
        assert text.count(outputs[0]) == 1
        assert UUID(outputs[0]).version == 4
        right = metrics.score(ours[0], ours[0].answers[0])
        assert right == 1.0 == metrics.get("string_match_all")(f" {outputs[0]}.\n", outputs, {})
        wrong = outputs[0][:-1] + ("0" if outputs[0][-1] != "0" else "1")
        assert metrics.get("string_match_all")(f" {wrong}.\n", outputs, {}) == 0.0


# --- ours


def test_noise_to_the_letter():
    """At 100 tokens a line of noise, 230 tokens have room for one."""
    for sample in made("niah_single_1", 20, tokens=230, count=lambda text: 100 * text.count(NOISE)):
        key, value = re.search(r"numbers for (.+) is: (\d{7})\.", sample.context).groups()
        assert sample.context == (
            "A special magic number is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the number afterwards.\n"
            f"One of the special magic numbers for {key} is: {value}.\n"
            f"{NOISE}\n"
        )
        assert sample.question == f"What is the special magic number for {key} mentioned in the provided text?"
        assert sample.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
        assert sample.answers == (value,)


@pytest.mark.parametrize(
    ("variant", "needles", "value"),
    [
        ("niah_single_2[books]", 1, r"[1-9]\d{6}"),
        ("niah_single_3[books]", 1, UUID4),
        ("niah_multikey_1[books]", 4, r"[1-9]\d{6}"),
        ("niah_multivalue[books]", 4, r"[1-9]\d{6}"),
        ("niah_multiquery[books]", 4, r"[1-9]\d{6}"),
    ],
)
def test_needles_in_the_book(variant, needles, value):
    what = "uuids" if value == UUID4 else "numbers"
    several = "multivalue" in variant or "multiquery" in variant
    are, form = ("are all", what) if several else ("is", what[:-1])
    for sample in made(variant, 10):
        found = re.findall(rf" One of the special magic {what} for ([^.]+?) is: ({value})\.[ \n]", sample.context)
        assert len(found) == needles == sample.context.count("One of the special magic")
        question = rf"What {are} the special magic {form} for (.+) mentioned in the provided text\?"
        asked = re.split(", and |, ", re.fullmatch(question, sample.question)[1])
        assert sorted(sample.answers) == sorted(v for key, v in found if key in asked)
        assert all(map(is_pair, asked))
        assert ("depth" in sample.meta) == (not several)


def test_the_book_is_whole_around_its_needles():
    book = " ".join(data.path("heldout.txt").read_text().split())
    orders = set()
    for sample in made("niah_multivalue[books]", 10):
        text = sample.context.split("\n")[1]
        found = re.findall(r"One of the special magic numbers for .+? is: (\d+)\.", text)
        orders.add(tuple(sample.answers.index(value) for value in found))
        left = re.sub(r"One of the special magic numbers for .+? is: \d+\.", "", text)
        assert book.startswith(" ".join(left.split()))
    assert len(orders) > 5


def is_pair(key):
    """Whether it is an adjective, "-" and a noun; each of them may have a "-" of its own."""
    adjectives, nouns = _ruler_words.words("adjective"), _ruler_words.words("noun")
    return any(key[:i] in adjectives and key[i + 1 :] in nouns for i, letter in enumerate(key) if letter == "-")


def test_several_answers_to_the_letter():
    (sample,) = made("niah_multiquery[books]")
    keys = re.search("for (.+) mentioned", sample.question)[1]
    assert re.fullmatch(r"[^,]+, [^,]+, [^,]+, and [^,]+", keys)
    assert sample.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    assert sample.question == f"What are all the special magic numbers for {keys} mentioned in the provided text?"
    assert sample.answer_prefix == f" The special magic numbers for {keys} mentioned in the provided text are"
    asked = re.split(", and |, ", keys)
    values = dict(re.findall(r"numbers for ([^.]+?) is: (\d+)", sample.context))
    assert sample.answers == tuple(values[key] for key in asked)


def test_the_distractors_of_multikey_2_have_other_words():
    for sample in made("niah_multikey_2", 5):
        lines = sample.context.split("\n")[1:-1]
        found = [
            re.fullmatch(r"One of the special magic numbers for (.+) is: ([1-9]\d{6})\.", x).groups() for x in lines
        ]
        assert len({key for key, _ in found}) == len({value for _, value in found}) == len(found) > 30


def test_an_own_book_to_the_letter(tmp_path):
    """Two sentences: the needle is before, between or after them, with the spaces that upstream leaves."""
    book = tmp_path / "rain.txt"
    book.write_text("Rain  fell.\nDogs slept quietly.")

    def count(text):
        return 10 * len(re.findall("Rain|fell|Dogs|slept|quietly", text))

    seen = set()
    for sample in made("niah_single_2", 150, tokens=10 * 5 + 129, path=book, count=count):
        assert sample.meta["task"] == "niah_single_2[rain.txt]"
        key = re.search("for (.+) mentioned", sample.question)[1]
        sentence = f"One of the special magic numbers for {key} is: {sample.answers[0]}."
        head, haystack, end = sample.context.split("\n")
        assert (head[:23], end) == ("A special magic number ", "")
        seen.add(haystack.replace(sentence, "<>"))
    assert seen == {
        " <> Rain fell. Dogs slept quietly.",
        "Rain fell. <> Dogs slept quietly.",
        "Rain fell. Dogs slept quietly. <> ",
    }


def test_a_short_book_is_repeated(tmp_path):
    book = tmp_path / "short.txt"
    book.write_text("It rained. The dog slept. ")
    (sample,) = made("niah_multikey_1", path=book)
    assert sample.context.count("The dog slept.") > 100


def test_needles_stand_everywhere():
    for variant in ("niah_single_1", "niah_single_2[books]", "niah_multikey_1[books]", "niah_multikey_3"):
        depths = [s.meta["depth"] for s in made(variant, 60)]
        assert min(depths) < 0.1
        assert max(depths) > 0.9
        assert 0.35 < sum(depths) / len(depths) < 0.65


def test_depths_are_those_of_upstream():
    assert _ruler_essay.DEPTHS[:6] == [0, 3, 5, 8, 10, 13]
    assert _ruler_essay.DEPTHS[-3:] == [95, 97, 100]
    assert len(set(_ruler_essay.DEPTHS)) == 40


def test_sentences_end_at_stops_but_not_after_titles():
    text = (
        'Mr. Trelawney met Dr. Livesey and J. Hawkins at 3.30 today. "Come!" he said. Was it late? It was... he slept. '
        "“Pieces of eight!” It ended."
    )
    assert _ruler_essay.sentences(text) == [
        "Mr. Trelawney met Dr. Livesey and J. Hawkins at 3.30 today.",
        '"Come!" he said.',
        "Was it late?",
        "It was... he slept.",
        "“Pieces of eight!”",
        "It ended.",
    ]
    assert _ruler_essay.sentences("") == [""]
