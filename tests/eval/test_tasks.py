import json
import re

import pytest

from kvshrink import data
from kvshrink.errors import EvalError
from kvshrink.eval import tasks
from kvshrink.eval.tasks import _book, _common, _longeval_cases, _words

LONGEVAL = tasks.get("longeval")
GENERATED = {"official": False, "lines": 7}
SETTINGS = [  # the first two are official cases, the same for every seed
    ("longeval", {}),
    ("longeval", {"wording": "longeval", "lines": None}),
    ("longeval", GENERATED),
    ("longeval", GENERATED | {"wording": "longeval"}),
    ("passkey", {"tokens": 700}),
    ("needle", {"tokens": 700}),
]
each_task = pytest.mark.parametrize(("name", "settings"), SETTINGS)


def sample(name="longeval", **settings):
    return tasks.get(name).samples(1, 0, **settings)[0]


def test_tasks_are_found_by_file_name():
    assert {"longeval", "needle", "passkey"} <= set(tasks.names())
    assert not [name for name in tasks.names() if name.startswith("_")]
    for name in tasks.names():
        assert callable(tasks.get(name).samples)
        assert callable(tasks.get(name).score)


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(EvalError, match=r"No task 'passkeys'\. Known: .*passkey"):
        tasks.get("passkeys")


@each_task
def test_a_longer_run_repeats_a_shorter_one(name, settings):
    task = tasks.get(name)
    assert task.samples(5, 1, **settings) == task.samples(50, 1, **settings)[:5]


@pytest.mark.parametrize(("name", "settings"), SETTINGS[2:])
def test_seeds_and_indices_differ(name, settings):
    task = tasks.get(name)
    contexts = [s.context for seed in (0, 1) for s in task.samples(9, seed, **settings)]
    assert len(set(contexts)) == 18


@each_task
def test_the_answer_stands_once_in_the_context_and_not_in_the_question(name, settings):
    for s in tasks.get(name).samples(50, 2, **settings):
        (answer,) = s.answers
        assert re.findall(r"\d+", s.context).count(answer) == 1
        assert answer not in s.question + s.answer_prefix
        assert s.prompt == s.context + s.question + s.answer_prefix
        assert len(answer) < s.max_new_tokens
        assert 0 <= s.meta["depth"] <= 1


@each_task
def test_right_and_near_miss(name, settings):
    s = sample(name, **settings)
    (answer,) = s.answers
    score = tasks.get(name).score
    assert score(s, answer) == 1.0
    assert score(s, answer + ">\n") == 1.0
    for wrong in ("", "no idea", answer[:-1], answer + "0", "1" + answer, answer[:-1] + "x" + answer[-1]):
        assert score(s, wrong) == 0.0, wrong


@each_task
def test_no_samples_is_refused(name, settings):
    with pytest.raises(EvalError, match="0 samples"):
        tasks.get(name).samples(0, 0, **settings)


def test_depths_are_the_same_for_every_n_and_even():
    assert [_common.depth(i) for i in range(7)] == [0, 1, 0.5, 0.25, 0.75, 0.125, 0.625]
    for n in (3, 5, 9, 17, 33):
        assert sorted(_common.depth(i) for i in range(n)) == [i / (n - 1) for i in range(n)]


@pytest.mark.parametrize(
    ("text", "leading", "first", "last"),
    [
        ("4244>, line 7", "4244", 4244, 7),
        ("The number is 31.", "", 31, 31),
        ("<17>", "", 17, 17),
        ("none", "", None, None),
        ("", "", None, None),
    ],
)
def test_numbers_in_an_output(text, leading, first, last):
    assert _common.leading_digits(text) == leading
    assert LONGEVAL.first_integer(text) == first
    assert LONGEVAL.last_integer(text) == last


# --- longeval


def test_whole_official_cases_have_the_official_prompt():
    rows = [json.loads(row) for row in data.path("longeval/200_lines.jsonl").read_text().splitlines()]
    whole = LONGEVAL.samples(50, 0, lines=None, wording="longeval")
    assert len(rows) == 50
    for s, row in zip(whole, rows, strict=True):
        assert s.prompt == row["prompt"]
        assert s.answers == (str(row["expected_number"]),)
        assert s.context.count(row["correct_line"]) == 1
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


def test_cut_by_hand():
    case = _longeval_cases.Case(tuple((f"k{i}", str(i)) for i in range(11)), asked=8, question="?")
    # depth .8 of 6 lines is position 4: lines 4 to 9
    short = _longeval_cases.cut(case, 6)
    assert [k for k, _ in short.lines] == ["k4", "k5", "k6", "k7", "k8", "k9"]
    assert short.lines[short.asked] == ("k8", "8")


def test_the_reference_prompt_word_for_word():
    case = _longeval_cases.Case((("brave-king", "41234"), ("old-bird", "17000")), asked=1, question="unused")
    s = LONGEVAL._sample(0, case, "reference", official=False)
    assert s.prompt == (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value.\n"
        "line brave-king: REGISTER_CONTENT is <41234>\nline old-bird: REGISTER_CONTENT is <17000>\n"
        "Tell me what is the REGISTER_CONTENT in line old-bird? Answer: <"
    )
    assert s.answers == ("17000",)


def test_generated_cases_read_like_official_ones():
    s = sample(official=False, lines=5, wording="longeval")
    key = s.meta["key"]
    assert s.context.startswith(LONGEVAL.OFFICIAL_HEADER + "line ")
    assert re.search(r"<\d+>\n\n$", s.context)
    assert (
        s.question
        == f"Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."
    )


def test_generated_numbers_for_the_reference_model_have_five_digits():
    for s in LONGEVAL.samples(20, 0, official=False):
        assert all(len(v) == 5 for v in re.findall(r"is <(\d+)>", s.context))


def test_the_two_wordings_are_scored_by_their_own_rule():
    chatty = "The content of line 3 is <{}>."
    reference, official = sample(), sample(wording="longeval")
    answer = reference.answers[0]
    assert LONGEVAL.score(official, chatty.format(answer)) == 1.0
    assert LONGEVAL.score(reference, chatty.format(answer)) == 0.0
    trailing = f"{answer}>\nTell me what is the REGISTER_CONTENT in line 9"
    assert LONGEVAL.score(reference, trailing) == 1.0
    assert LONGEVAL.score(official, trailing) == 0.0


@pytest.mark.parametrize("n", [1, 50, 100, 250, _words.LIMIT])
def test_keys_are_distinct_and_share_no_word_while_they_can(n):
    keys = _words.keys(_common.rng("test", 0, n), n)
    assert len(set(keys)) == n
    if n <= 100:
        words = [w for key in keys for w in key.split("-")]
        assert len(set(words)) == 2 * n


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lines": 0}, "lines=0"),
        ({"lines": 201}, "lines=201, the record has 200"),
        ({"official": False, "lines": 10_001}, "Use 1 to 10000"),
        ({"official": False, "lines": None}, "lines=None"),
        ({"official": False, "path": "x.jsonl"}, "path=x.jsonl"),
        ({"wording": "chat"}, "Known: reference, longeval"),
        ({"path": "missing.jsonl"}, r"missing\.jsonl"),
    ],
)
def test_longeval_settings_that_do_not_fit(settings, message):
    with pytest.raises(EvalError, match=message) as raised:
        LONGEVAL.samples(1, 0, **settings)
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
    s = sample(lines=None, path=str(file))
    assert (s.answers, s.meta["lines"], s.meta["depth"]) == (("7",), 1, 0)


# --- needles in book text


WORDING = {
    "passkey": ("The pass key is {answer}. Remember it.", "What is the pass key? The pass key is "),
    "needle": (
        "One of the special magic numbers for {key} is: {answer}.",
        "What is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is: ",
    ),
}


@pytest.mark.parametrize("name", WORDING)
@pytest.mark.parametrize("tokens", [700, 4000])
def test_the_needle_stands_at_its_depth_in_book_text(name, tokens):
    task, book = tasks.get(name), _book.load(None)
    for s in task.samples(9, 0, tokens=tokens):
        sentence, question = (text.format(answer=s.answers[0], key=s.meta.get("key")) for text in WORDING[name])
        assert s.question + s.answer_prefix == question
        assert s.context.startswith(task.INTRO + " ")
        assert s.context.endswith("\n")
        before, after = (part.strip() for part in s.context.removeprefix(task.INTRO).split(sentence))
        text = f"{before} {after}".strip()
        # whole words of the book, in its order
        assert f" {text} " in f" {book} "
        assert len(before) / len(text) == pytest.approx(s.meta["depth"], abs=0.02)


@pytest.mark.parametrize("name", ["passkey", "needle"])
@pytest.mark.parametrize("tokens", [300, 1000, 4000])
def test_prompt_and_answer_fit_the_tokens(name, tokens):
    settings = {"tokens": tokens, "chars_per_token": 2.0}
    for s in tasks.get(name).samples(9, 0, **settings):
        # a tokenizer with exactly two characters a token
        used = 1 + len(s.prompt) / 2 + s.max_new_tokens
        assert 0.95 * tokens < used < tokens


def test_split_by_hand():
    assert _book.split("one two three", 0.0) == ("", "one two three")
    assert _book.split("one two three", 0.5) == ("one", "two three")
    assert _book.split("one two three", 0.6) == ("one two", "three")
    assert _book.split("one two three", 1.0) == ("one two three", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 60}, "tokens=60 leaves 0 characters for book text"),
        ({"chars_per_token": 0}, "chars_per_token=0"),
        ({"tokens": 1_000_000}, "needs [0-9]+ characters of book text, the file has 25[0-9]+"),
        ({"path": "missing.txt"}, r"missing\.txt"),
    ],
)
@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_book_settings_that_do_not_fit(name, settings, message):
    with pytest.raises(EvalError, match=message) as raised:
        tasks.get(name).samples(1, 0, **settings)
    assert "\n" not in str(raised.value)


def test_a_book_that_is_no_text(tmp_path):
    file = tmp_path / "book.bin"
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(EvalError, match=r"Cannot read the book text .*book\.bin"):
        tasks.get("needle").samples(1, 0, path=file)


# --- bundled files


def test_bundled_text_is_unwrapped_and_of_the_stated_size():
    sources = data.path("SOURCES.md").read_text()
    for name in ("calibration.txt", "heldout.txt"):
        raw = data.path(name).read_bytes()
        assert f"| {name} | {len(raw)} |" in sources
        assert b"\n\n" not in raw
        assert raw.endswith(b"\n")


def test_an_unknown_data_file_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"calibration\.txt, heldout\.txt, longeval/200_lines\.jsonl"):
        data.path("book.txt")
