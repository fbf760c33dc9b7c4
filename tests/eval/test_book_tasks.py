"""Sentences hidden in book text: passkey, needle, needle among four, and stories."""

import re

import pytest

from kvshrink.errors import EvalError
from kvshrink.eval import metrics, tasks
from kvshrink.eval.tasks import _book
from kvshrink.eval.tasks.generated import babi_books


def chars(text: str) -> int:
    """A tokenizer with two characters a token."""
    return (len(text) + 1) // 2


def make(name, n, seed=0, tokens=4000, **settings):
    return tasks.get(name).samples(n, seed, tokens=tokens, count=chars, **settings)


WORDING = {
    "passkey": ("The pass key is {answer}. Remember it.", "What is the pass key? The pass key is "),
    "needle": (
        "One of the special magic numbers for {key} is: {answer}.",
        "What is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is: ",
    ),
}


def hidden(s, intro, sentence):
    """(text before the sentence, text behind it)."""
    assert s.context.startswith(intro)
    assert s.context.endswith("\n")
    before, after = s.context.removeprefix(intro).split(sentence)
    return before.strip(), after.strip()


@pytest.mark.parametrize("name", WORDING)
@pytest.mark.parametrize("tokens", [700, 4000])
def test_the_needle_stands_at_its_depth_in_book_text(name, tokens):
    book = " ".join(_book.words(None))
    for s in make(name, 9, tokens=tokens):
        sentence, question = (text.format(answer=s.answers[0], key=s.meta.get("key")) for text in WORDING[name])
        assert s.question + s.answer_prefix == question
        before, after = hidden(s, tasks.get(name).INTRO, sentence)
        text = f"{before} {after}".strip()
        # whole words of the book, in its order
        assert f" {text} " in f" {book} "
        assert len(before) / len(text) == pytest.approx(s.meta["depth"], abs=0.03)


@pytest.mark.parametrize("name", ["needle", "needle_among"])
def test_a_depth_can_be_chosen_and_lengths_too(name):
    for tokens in (1000, 2000):
        for depth in (0.0, 0.3, 1.0):
            for s in make(name, 2, tokens=tokens, depth=depth):
                assert (s.meta["depth"], s.meta["length"]) == (depth, tokens)
                at = s.context.index(s.answers[0]) / len(s.context)
                assert at == pytest.approx(depth, abs=0.12)
    with pytest.raises(EvalError, match=r"depth=1\.5\. Use 0 \(start\) to 1 \(end\)"):
        make(name, 1, depth=1.5)


def test_the_official_needle_is_word_for_word_and_behind_a_full_stop():
    needle = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
    for s in make("needle", 9, wording="official"):
        before, after = hidden(s, tasks.get("needle").OFFICIAL_INTRO, needle)
        assert s.meta["depth"] == 0 or before.endswith(".")
        assert -0.02 < s.meta["depth"] - len(before) / len(before + after) < 0.1
        assert s.question.strip() == (
            "What is the best thing to do in San Francisco? "
            "Don't give information outside the document or repeat your findings"
        )
        assert metrics.score(s, "Sit in Dolores Park, and eat.") == pytest.approx(6 / 11)


def test_needle_among_four_asks_for_the_one_at_the_depth():
    for s in make("needle_among", 9):
        found = re.findall(r"special magic numbers for ([a-z-]+) is: (\d{7})\.", s.context)
        assert len({key for key, _ in found}) == 4
        assert dict(found)[s.meta["key"]] == s.answers[0]
        assert sorted(number for _, number in found) == sorted([*s.answers, *s.meta["others"]])
        assert s.question == tasks.get("needle").QUESTION.format(key=s.meta["key"])
        assert all(metrics.score(s, number) == 0.0 for number in s.meta["others"])


def test_the_official_passkey_prompt_in_noise():
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    for s in make("passkey", 9, wording="official", filler="noise"):
        key = s.answers[0]
        intro = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
            "I will quiz you about the important information there.\n\n"
        )
        before, after = hidden(s, intro, f"The pass key is {key}. Remember it. {key} is the pass key.")
        assert f"{before} {after}".strip() in f"{noise} " * 100
        assert s.meta["depth"] == 0 or before.endswith(".")
        assert s.question + s.answer_prefix == "\nWhat is the pass key?\n\nThe pass key is"
        assert metrics.score(s, f" {key}. It was {key[::-1]}") == 1.0


def test_noise_reads_no_file():
    with pytest.raises(EvalError, match=r"noise reads no file, got path=x\.txt"):
        make("passkey", 1, filler="noise", path="x.txt")


def test_insert_by_hand():
    text = "One two. Three four five. Six".split()
    assert _book.insert(text, ((0.0, "A"), (0.5, "B"), (1.0, "C")), False) == "A One two. Three B four five. Six C"
    # back to the last full stop, in the order of the sentences
    assert _book.insert(text, ((0.5, "A"), (0.7, "B"), (1.0, "C")), True) == "One two. A B Three four five. C Six"
    assert _book.insert(text, ((0.1, "A"),), True) == "A One two. Three four five. Six"


@pytest.mark.parametrize("name", ["passkey", "needle", "needle_among", "babi_books"])
def test_book_settings_that_do_not_fit(tmp_path, name):
    with pytest.raises(EvalError, match=r"4[0-9]+ words of text do not fill tokens=1000000\. Lower tokens or give"):
        make(name, 1, tokens=1_000_000)
    with pytest.raises(EvalError, match=r"Cannot read the book text missing\.txt"):
        make(name, 1, path="missing.txt")
    file = tmp_path / "book.txt"
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(EvalError, match=r"Cannot read the book text .*book\.txt"):
        make(name, 1, path=file)
    file.write_text("too short")
    with pytest.raises(EvalError, match="the text to hide in has 2 words"):
        make(name, 1, path=file)


# --- babi_books


def told(s):
    """The facts of the story; each is whole in the context, in this order, and no others are there."""
    at = 0
    for fact in s.meta["facts"]:
        at = s.context.index(fact, at) + len(fact)
    persons = "|".join(babi_books.PERSONS)
    assert len(re.findall(rf"\b(?:{persons}) \w+ (?:to )?the|The \w+ is \w+ of the", s.context)) == len(s.meta["facts"])
    return s.meta["facts"]


def replay(facts):
    """({person: place}, {thing: place}) after the facts."""
    at, holder = {}, {}
    for fact in facts:
        if move := re.fullmatch(r"(\w+) (?:went|moved|travelled|journeyed) to the (\w+)\.", fact):
            at[move[1]] = move[2]
        else:
            person, thing = re.fullmatch(r"(\w+) took the (\w+)\.", fact).groups()
            holder[thing] = person
    return at, {thing: at.get(person) for thing, person in holder.items()}


def test_qa1_asks_where_a_person_is():
    for s in make("babi_books", 20, story="qa1"):
        person = re.search(r"Where is (\w+)\?", s.question)[1]
        assert replay(told(s))[0][person] == s.answers[0]
        assert s.meta["chance"] == 1 / 6


def test_qa2_asks_where_a_thing_is():
    for s in make("babi_books", 20, story="qa2"):
        thing = re.search(r"Where is the (\w+)\?", s.question)[1]
        facts = told(s)
        assert replay(facts)[1][thing] == s.answers[0]
        assert len(facts) == babi_books.FACTS
        # the place where it was taken is another fact
        assert sum("took the" in fact for fact in facts) == 2


def test_qa4_has_one_answer():
    flip = babi_books.SIDES
    for s in make("babi_books", 40, story="qa4"):
        side, place = re.search(r"What is (\w+) of the (\w+)\?", s.question).groups()
        found = [re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups() for fact in told(s)]
        both = found + [(b, flip[way], a) for a, way, b in found]
        assert [a for a, way, b in both if (way, b) == (side, place)] == list(s.answers)
        assert place not in s.meta["labels"]
        assert s.meta["chance"] == 1 / 5


def deciding(s):
    """The fact that the answer follows from: of those that are about the question, the last."""
    about = re.search(r"(\w+)\?", s.question)[1]
    if about in babi_books.THINGS:
        about = next(fact for fact in s.meta["facts"] if f"took the {about}" in fact).split()[0]
    if about in babi_books.PERSONS:
        return max(i for i, fact in enumerate(s.meta["facts"]) if about in fact)
    return next(i for i, fact in enumerate(s.meta["facts"]) if about in fact and s.answers[0] in fact)


@pytest.mark.parametrize("story", babi_books.VARIANTS)
def test_the_deciding_fact_is_at_its_depth_in_the_book(story):
    book = " ".join(_book.words(None))
    for s in make("babi_books", 9, story=story):
        text, at = s.context.removeprefix(babi_books.INTRO).strip(), []
        whole, rest = len(text), text
        for fact in s.meta["facts"]:
            before, rest = rest.split(fact, 1)
            at.append((whole - len(fact + rest)) / whole)
            # behind a full stop, in the text of the book
            assert before.strip() in book
            assert before.strip()[-1:] in ("", ".")
        assert rest.strip() in book
        assert s.answers[0] in s.meta["facts"][deciding(s)]
        assert at[deciding(s)] == pytest.approx(s.meta["depth"], abs=0.06)


def test_babi_answers_are_scored_by_the_labels():
    s = make("babi_books", 1, story="qa1")[0]
    other = next(label for label in s.meta["labels"] if label != s.answers[0])
    assert metrics.score(s, f" The {s.answers[0].upper()}. Not the {other}.") == 1.0
    assert metrics.score(s, f"{s.answers[0]} or {other}") == 0.0
