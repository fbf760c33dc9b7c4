"""What every generated task promises (RULER has tests of its own), and what they share."""

import re

import pytest
from transformers import AutoTokenizer

from kvshrink import data
from kvshrink.errors import EvalError
from kvshrink.eval import metrics, tasks
from kvshrink.eval.run.prompt import counter, encode
from kvshrink.eval.tasks import _common, _longeval_cases, _words
from kvshrink.reference import FOLDER

FILLED = {"official": False, "lines": None}
OFFICIAL = {"wording": "official"}
# tasks whose length is free; longeval's official records have tests of their own
SETTINGS = [
    *(("longeval", FILLED | {"style": style}) for style in _longeval_cases.STYLES),
    ("longeval", FILLED | OFFICIAL),
    *(
        (name, settings)
        for name in tasks.names("generated")
        if name not in ("longeval", "longeval_topics", "ruler")
        for settings in getattr(tasks.get(name), "VARIANTS", {"": {}}).values()
    ),
    *((name, OFFICIAL) for name in ("passkey", "needle", "kv_retrieval")),
]
each_task = pytest.mark.parametrize(
    ("name", "settings"), SETTINGS, ids=[f"{name}-{'-'.join(map(str, s.values()))}" for name, s in SETTINGS]
)


def two_chars(text: str) -> int:
    """A tokenizer with exactly two characters a token."""
    return (len(text) + 1) // 2


def make(name, n, seed=0, tokens=4000, **settings):
    return tasks.get(name).samples(n, seed, tokens=tokens, count=two_chars, **settings)


def right(s) -> str:
    """An output that is right by the sample's metric."""
    if s.metric == "set_f1":
        return f"Final Answer: [{', '.join(s.answers)}]"
    return " ".join(s.answers)


# --- what every task promises


def test_tasks_are_found_by_file_name():
    assert {"longeval", "needle", "passkey", "ruler"} <= set(tasks.names("generated"))
    assert set(tasks.names("generated")) < set(tasks.names())
    assert not [name for name in tasks.names() if name.startswith("_")]
    for name in tasks.names():
        assert callable(tasks.get(name).samples)


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(EvalError, match=r"No task 'passkeys'\. Known: .*passkey"):
        tasks.get("passkeys")


@each_task
def test_a_longer_run_repeats_a_shorter_one(name, settings):
    short, long = make(name, 2, 1, **settings), make(name, 4, 1, **settings)
    assert long[: len(short)] == short
    assert len(long) == 2 * len(short)


@each_task
def test_seeds_and_indices_differ(name, settings):
    contexts = {s.context for seed in (0, 1) for s in make(name, 4, seed, **settings)}
    assert len(contexts) == 8


@each_task
@pytest.mark.parametrize("tokens", [2000, 4001])
def test_prompt_and_answer_fill_the_tokens(name, settings, tokens):
    for s in make(name, 3, tokens=tokens, **settings):
        used = 1 + two_chars(s.context) + two_chars(s.question + s.answer_prefix) + s.max_new_tokens
        assert 0.85 * tokens < used <= tokens
        assert s.meta["length"] == tokens


@each_task
def test_one_character_a_token_is_room_enough_for_the_answer(name, settings):
    for s in make(name, 4, **settings):
        assert s.max_new_tokens > max(len(re.sub(r"\D", "", answer)) for answer in s.answers)


@each_task
def test_the_right_answer_scores_one_and_others_nothing(name, settings):
    for s in make(name, 4, 2, **settings):
        assert metrics.score(s, right(s)) == 1.0
        wrongs = ["", "no idea"]
        if s.answers[0].isdigit():
            answer = s.answers[0]
            # near misses, and 1x2 is not 12
            wrongs += [answer[:-1], answer + "0", "1" + answer, answer[:-1] + "x" + answer[-1]]
        assert [metrics.score(s, wrong) for wrong in wrongs] == [0.0] * len(wrongs)


@each_task
def test_the_answer_is_in_the_context_and_not_in_the_question(name, settings):
    for s in make(name, 4, 2, **settings):
        for answer in s.answers:
            assert answer in s.context
            assert not re.search(rf"\b{answer}\b", s.question + s.answer_prefix)
        assert s.prompt == s.context + s.question + s.answer_prefix


@each_task
def test_indices_count_the_samples_and_depths_are_spread(name, settings):
    made = make(name, 5, **settings)
    assert [s.meta["index"] for s in made] == list(range(len(made)))
    depths = [s.meta["depth"] for s in made]
    assert depths[:5] == pytest.approx([0, 1, 0.5, 0.25, 0.75], abs=0.06)


@each_task
def test_no_samples_and_no_room_are_refused_in_one_line(name, settings):
    with pytest.raises(EvalError, match="0 samples") as none:
        make(name, 0, **settings)
    with pytest.raises(EvalError, match=r"tokens=40 leaves no room for [0-9]+ .*Raise tokens") as small:
        make(name, 1, tokens=40, **settings)
    assert "\n" not in str(none.value) + str(small.value)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("longeval", "wording"),
        ("longeval", "style"),
        ("passkey", "wording"),
        ("passkey", "filler"),
        ("needle", "wording"),
        ("kv_retrieval", "wording"),
        ("kv_retrieval", "pairs"),
        ("graphwalks", "operation"),
        ("scbench_like", "kind"),
        ("babi_books", "story"),
    ],
)
def test_an_unknown_value_lists_the_known_ones(name, setting):
    with pytest.raises(EvalError, match=rf"^{name}: no {setting} 'chat'\. Known: \w+, \w+"):
        make(name, 1, **{setting: "chat"})


@pytest.mark.parametrize("name", ["longeval", "needle", "kv_retrieval", "copy"])
def test_the_reference_tokenizer_counts_what_the_runner_encodes(name):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    settings = FILLED if name == "longeval" else {}
    for s in tasks.get(name).samples(2, 0, tokens=1000, count=counter(tokenizer), **settings):
        context, question = encode(s, tokenizer)
        assert 960 < len(context) + len(question) + s.max_new_tokens <= 1000


# --- what tasks share


def test_depths_are_the_same_for_every_n_and_even():
    assert [_common.depth(i) for i in range(7)] == [0, 1, 0.5, 0.25, 0.75, 0.125, 0.625]
    for n in (3, 5, 9, 17, 33):
        assert sorted(_common.depth(i) for i in range(n)) == [i / (n - 1) for i in range(n)]


def test_places_are_at_their_depths_and_distinct():
    assert _common.places(11, [0, 1, 0.5, 0.25]) == [0, 10, 5, 2]
    # taken: the next free one, around the end
    assert _common.places(4, [1, 1, 0.9]) == [3, 0, 1]
    assert sorted(_common.places(5, [0.5] * 5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("low", [0, 1, 3, 20])
def test_largest_finds_the_border_and_tries_nothing_much_beyond(low):
    for high in (*range(low - 2, low + 12), 1000):
        for border in (*range(low - 2, high + 2), 999):
            tried = []
            found = _common.largest(low, high, lambda n: tried.append(n) or n <= border)  # noqa: B023
            assert found == (min(border, high) if min(border, high) >= low else low - 1)
            assert all(low <= n <= min(high, 2 * max(border, low) + 1) for n in tried)


def sample_of(context, question, answer_prefix="", limit=1):
    return tasks.Sample(context, question, answer_prefix, ("x",), "quoted", limit, {})


def test_fits_counts_bos_the_context_once_and_the_longest_question_with_its_answer():
    two = [sample_of("c" * 10, "qq", "pppp", 7), sample_of("c" * 10, "q" * 6, "", 8)]
    # in characters: 1 + 10 + max(6 + 7, 6 + 8)
    assert _common.fits(two, 25, len)
    assert not _common.fits(two, 24, len)


def test_fill_refuses_what_cannot_be_filled():
    def size(n):
        return [sample_of("c" * n, "")]

    assert _common.fill("t", size, 1, 99, "letters", 12, len)[0].context == "c" * 10
    with pytest.raises(EvalError, match=r"^t: 10 letters do not fill tokens=50\. Lower tokens or pray\.$"):
        _common.fill("t", size, 1, 10, "letters", 50, len, " or pray")
    with pytest.raises(EvalError, match=r"^t: tokens=4 leaves no room for 3 letters\. Raise tokens\.$"):
        _common.fill("t", size, 3, 10, "letters", 4, len)


@pytest.mark.parametrize("n", [1, 50, 100, 250, _words.LIMIT])
def test_keys_are_distinct_and_share_no_word_while_they_can(n):
    keys = _words.keys(_common.rng("test", 0, n), n)
    assert len(set(keys)) == n
    if n <= 100:
        words = [w for key in keys for w in key.split("-")]
        assert len(set(words)) == 2 * n


def test_uuids_are_of_version_4_and_drawn_from_the_given_source():
    made = _words.uuids(_common.rng("test", 0, 0), 50)
    assert made == _words.uuids(_common.rng("test", 0, 0), 50)
    assert len(set(made)) == 50
    assert all(re.fullmatch("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", u) for u in made)


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
