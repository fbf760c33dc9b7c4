"""LongEval, lines and topics: official files are read as they are, and generated records read like them."""

import json
import re
from pathlib import Path

import pytest

from kvshrink import data
from kvshrink.errors import EvalError
from kvshrink.eval import metrics, tasks
from kvshrink.eval.tasks import _longeval_cases
from kvshrink.eval.tasks.generated import longeval_topics

LONGEVAL = tasks.get("longeval")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "longeval"
TOPICS = SHARED / "topics"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the larger official files are not in the repository")


def chars(text: str) -> int:
    """A tokenizer with four characters a token."""
    return (len(text) + 3) // 4


def make(name, n, seed=0, tokens=3000, **settings):
    return tasks.get(name).samples(n, seed, tokens=tokens, count=chars, **settings)


# --- longeval


def longeval(**settings):
    return LONGEVAL.samples(1, 0, **settings)[0]


def test_whole_official_cases_have_the_official_prompt():
    check_whole(data.path("longeval/200_lines.jsonl"))


@needs_shared
def test_every_official_file_can_be_read():
    files = sorted((SHARED / "lines").glob("*_lines.jsonl"))
    assert len(files) == 12
    for file in files:
        check_whole(file)


def check_whole(file):
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    whole = LONGEVAL.samples(50, 0, lines=None, wording="official", path=file)
    assert len(rows) == 50
    for s, row in zip(whole, rows, strict=True):
        assert s.prompt == row["prompt"]
        assert s.answers == (str(row["expected_number"]),)
        assert s.context.count(row["correct_line"]) == 1
        assert s.meta["lines"] == row["num_lines"]
        assert s.question.startswith("Now the record is over. Tell me what is the <REGISTER_CONTENT> in line ")


@pytest.mark.parametrize("lines", [1, 2, 30, 199, 200])
def test_a_cut_keeps_the_asked_line_at_its_depth(lines):
    whole = LONGEVAL.samples(50, 0, lines=None)
    for long, short in zip(whole, LONGEVAL.samples(50, 0, lines=lines), strict=True):
        record = re.findall("^line .*$", short.context, re.MULTILINE)
        assert len(record) == lines == short.meta["lines"]
        # a window: the lines stand side by side in the whole record
        assert "\n".join(record) in long.context
        assert f"line {short.meta['key']}: REGISTER_CONTENT is <{short.answers[0]}>" in record
        assert (long.answers, long.question) == (short.answers, short.question)
        assert lines == 1 or abs(long.meta["depth"] - short.meta["depth"]) <= 0.5 / (lines - 1) + 1e-9


def test_official_records_are_cut_to_what_fits_or_left_whole():
    for s in make("longeval", 9, tokens=1000, lines=None):
        assert 0.95 * 1000 < 1 + chars(s.context) + chars(s.question + " <") + 8 <= 1000
        assert 50 < s.meta["lines"] < 120
    assert make("longeval", 9, tokens=5_000, lines=None) == LONGEVAL.samples(9, 0, lines=None)


def test_cut_by_hand():
    case = _longeval_cases.Case(tuple((f"k{i}", str(i)) for i in range(11)), asked=8, question="?")
    # depth .8 of 6 lines is position 4: lines 4 to 9
    short = _longeval_cases.cut(case, 6)
    assert [k for k, _ in short.lines] == ["k4", "k5", "k6", "k7", "k8", "k9"]
    assert short.lines[short.asked] == ("k8", "8")


def test_the_reference_prompt_word_for_word():
    case = _longeval_cases.Case((("brave-king", "41234"), ("old-bird", "17000")), asked=1, question="unused")
    s = LONGEVAL._sample(0, lambda lines: case, "reference", official=False, lines=2)
    assert s.prompt == (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value.\n"
        "line brave-king: REGISTER_CONTENT is <41234>\nline old-bird: REGISTER_CONTENT is <17000>\n"
        "Tell me what is the REGISTER_CONTENT in line old-bird? Answer: <"
    )
    assert s.answers == ("17000",)


def test_generated_cases_read_like_official_ones():
    s = longeval(official=False, lines=5, wording="official")
    key = s.meta["key"]
    assert s.context.startswith(LONGEVAL.OFFICIAL_HEADER + "line ")
    assert re.search(r"<\d+>\n\n$", s.context)
    assert (
        s.question
        == f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."
    )


@pytest.mark.parametrize(
    ("style", "pattern"),
    [("noun", "[a-z]+-[a-z]+"), ("numeric", "[0-9]+"), ("abc", "[A-F]{6}"), ("uuid", "[0-9a-f-]{36}")],
)
def test_generated_keys_are_of_their_style(style, pattern):
    for s in LONGEVAL.samples(3, 0, official=False, lines=40, style=style):
        keys = re.findall(r"^line (.*): REGISTER", s.context, re.MULTILINE)
        assert len(set(keys)) == 40
        assert all(re.fullmatch(pattern, key) for key in keys)
        assert style != "numeric" or keys == [str(i) for i in range(1, 41)]


def test_generated_numbers_for_the_reference_model_have_five_digits():
    for s in LONGEVAL.samples(20, 0, official=False):
        assert all(len(v) == 5 for v in re.findall(r"is <(\d+)>", s.context))
    shorter = [s.context for s in LONGEVAL.samples(20, 0, official=False, wording="official")]
    assert any(len(v) < 5 for context in shorter for v in re.findall(r"is <(\d+)>", context))


def test_the_two_wordings_are_scored_by_their_own_rule():
    chatty = "The content of line 3 is <{}>."
    reference, official = longeval(), longeval(wording="official")
    answer = reference.answers[0]
    assert metrics.score(official, chatty.format(answer)) == 1.0
    assert metrics.score(reference, chatty.format(answer)) == 0.0
    trailing = f"{answer}>\nTell me what is the REGISTER_CONTENT in line 9"
    assert metrics.score(reference, trailing) == 1.0
    assert metrics.score(official, trailing) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lines": 0}, "lines=0"),
        ({"lines": 201}, "lines=201, the record has 200"),
        ({"official": False, "lines": 10_001}, "Use 1 to 10000"),
        ({"official": False, "lines": 40_002, "style": "uuid"}, "Use 1 to 40001"),
        ({"official": False, "lines": None}, "needs count="),
        ({"official": False, "path": "x.jsonl"}, "path=x.jsonl"),
        ({"path": "missing.jsonl"}, r"missing\.jsonl"),
        ({"count": chars, "tokens": 200}, "30 lines do not fit into tokens=200"),
        ({"count": len, "tokens": 10**6, "official": False, "lines": None}, "10000 lines do not fill tokens=1000000"),
    ],
)
def test_longeval_settings_that_do_not_fit(settings, message):
    with pytest.raises(EvalError, match=message) as raised:
        longeval(**settings)
    assert "\n" not in str(raised.value)


def test_more_official_cases_than_the_file_has():
    with pytest.raises(EvalError, match=r"51 LongEval cases asked, 200_lines\.jsonl has 50"):
        LONGEVAL.samples(51, 0)


def row(key, number):
    """An official case of one line, asked for `key`."""
    prompt = "line a-b: REGISTER_CONTENT is <7>\n\nNow the record is over. Which?"
    return json.dumps({"prompt": prompt, "random_idx": [key, 0], "expected_number": number})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "holds no LongEval cases"),
        ("not json", "case 0 is not a LongEval line case"),
        ("[]", "case 0 is not a LongEval line case"),
        ('{"prompt": "line a-b"}', "case 0 is not a LongEval line case"),
        (row("a-c", 7), "case 0 is not a LongEval line case"),
        (row("a-b", 8), "the answer is not on the asked line"),
    ],
)
def test_files_that_hold_no_cases(tmp_path, content, message):
    file = tmp_path / "cases.jsonl"
    file.write_text(content)
    with pytest.raises(EvalError, match=message):
        LONGEVAL.samples(1, 0, lines=None, path=file)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "cases.jsonl"
    file.write_text(row("a-b", 7))
    s = longeval(lines=None, path=str(file))
    assert (s.answers, s.meta["lines"], s.meta["depth"]) == (("7",), 1, 0)


# --- longeval_topics


@needs_shared
def test_every_official_topic_file_can_be_read_and_is_joined_from_the_bundled_conversations():
    talks = [json.loads(row) for row in data.path("longeval/conversations.jsonl").read_text().splitlines()]
    by_topic = {talk["topic"]: talk["conversation"] for talk in talks}
    for topics in (1, 5, 10, 15, 20):
        file = TOPICS / f"{topics}_topics.jsonl"
        rows = [json.loads(row) for row in file.read_text().splitlines()]
        made = make("longeval_topics", 50, tokens=10**6, path=file)
        assert len(rows) == 50
        for s, row in zip(made, rows, strict=True):
            assert s.prompt == row["prompt"]
            assert s.answers == (row["topics"][0],)
            assert s.meta["topics"] == topics
            assert s.question == longeval_topics.RECORD_END + longeval_topics.QUESTION
            joined = "".join(by_topic[topic] for topic in row["topics"]) + " "
            header = longeval_topics.HEADER.format(topics=topics)
            # upstream says "the first topic name" in its larger files
            header = header.replace("first topic.", "first topic name.") if topics > 10 else header
            assert s.context == header + joined


@pytest.mark.parametrize("tokens", [1000, 2000, 6000])
def test_generated_topics_are_as_many_as_fit_and_the_first_is_asked(tokens):
    for s in make("longeval_topics", 5, tokens=tokens):
        used = 1 + chars(s.context) + chars(s.question) + s.max_new_tokens
        # one more conversation has at most 3304 characters
        assert tokens - 3304 / 4 - 2 < used <= tokens
        found = re.findall("USER: I would like to discuss the topic of (.*?)\\. \n", s.context)
        assert len(set(found)) == s.meta["topics"] > tokens / 1000 - 1
        assert found[0].lower() == s.answers[0].lower()
        # joined and asked as in the official files
        assert s.context.startswith(longeval_topics.HEADER.format(topics=s.meta["topics"]) + "USER: I would like")
        assert re.search(r"the next topic\. Now the record ends\. What is the first topic we discussed\?", s.prompt)
        assert metrics.score(s, f"The first topic was {s.answers[0].lower()}.") == 1.0
        assert metrics.score(s, "The weather.") == 0.0
        assert s.meta["depth"] == 0.0


def test_topics_repeat_and_differ():
    long = make("longeval_topics", 4, 1)
    assert long[:2] == make("longeval_topics", 2, 1)
    assert len({s.context for seed in (0, 1) for s in make("longeval_topics", 4, seed)}) == 8


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(300, "tokens=300 leaves no room for 1 topics"), (10**6, "30 topics do not fill .* or give a larger official")],
)
def test_lengths_that_topics_cannot_have(tokens, message):
    with pytest.raises(EvalError, match=message):
        make("longeval_topics", 1, tokens=tokens)
    with pytest.raises(EvalError, match="0 samples"):
        make("longeval_topics", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"1 LongEval topic cases asked, cases\.jsonl has 0"),
        ("{}", "case 0 is not a LongEval topic case"),
        ('{"prompt": "What?", "topics": ["x"]}', "no 'Now the record ends.'"),
        ('{"prompt": "Now the record ends. What?", "topics": []}', "case 0 is not a LongEval topic case"),
        (json.dumps({"prompt": "x" * 9999 + "Now the record ends.", "topics": ["x"]}), "does not fit into tokens=800"),
    ],
)
def test_topic_files_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "cases.jsonl"
    file.write_text(content)
    with pytest.raises(EvalError, match=message) as raised:
        make("longeval_topics", 1, tokens=800, path=file)
    assert "\n" not in str(raised.value)
    with pytest.raises(EvalError, match=r"Cannot read LongEval topics from .*missing\.jsonl"):
        make("longeval_topics", 1, path=tmp_path / "missing.jsonl")
