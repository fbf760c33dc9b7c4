"""The suite as one run: equal bytes, all its parts; an interrupt costs nothing, a failing method stops nothing."""

import json
from dataclasses import replace
from types import ModuleType

import pytest

from kvshrink import detach, reference_model
from kvshrink.errors import EvalError, SettingError
from kvshrink.eval import tasks
from kvshrink.eval.run import suite as module
from kvshrink.eval.run.catalogue import Choice, choices, gather
from kvshrink.eval.run.prompt import encode
from kvshrink.eval.run.runner import Runner
from kvshrink.eval.run.suite import Settings, Suite
from tests.probes import small_probe

pytestmark = pytest.mark.slow
SETTINGS = Settings(
    model="reference",
    methods=("cskv:bits=4", "rtn", "streaming_llm"),
    byte_ratio=(0.3, 0.15),
    tasks=("passkey/book", "scbench_like/mf"),
    lengths=(600, 1100),
    cases=1,
    documents=2,
    scored=12,
)


@pytest.fixture(scope="module", autouse=True)
def small():
    with small_probe():
        yield


@pytest.fixture(scope="module")
def reference():
    model, tokenizer = reference_model()
    yield model, tokenizer
    detach(model)


@pytest.fixture(scope="module")
def texts():
    from kvshrink import data

    return [data.path("calibration.txt").read_text(encoding="utf-8")[:12_000]]


@pytest.fixture(scope="module")
def done(reference, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("suite")
    return Suite(SETTINGS, *reference, texts, out).run("kvshrink eval suite"), out


def test_every_method_stands_at_every_budget_with_its_measured_bytes(done):
    data, out = done
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(data))
    assert {(x["task"], x["length"], x["mode"]) for x in data["lines"]} == {
        ("passkey/book", 600, "agnostic"),
        ("passkey/book", 1100, "agnostic"),
        ("scbench_like/mf", 600, "agnostic"),
        ("scbench_like/mf", 600, "multi_turn"),
        ("scbench_like/mf", 1100, "agnostic"),
        ("scbench_like/mf", 1100, "multi_turn"),
    }
    for line in data["lines"]:
        if line["target"] is None:
            assert line["byte_ratio"] == 1
        elif line["reached"]:
            assert line["byte_ratio"] == pytest.approx(line["target"], rel=0.1), line
        else:
            assert line["series"] == "rtn", line
    methods = {x["method"] for x in data["lines"]}
    assert methods == {
        "full",
        "zeros",
        *(f"{m} @{k}" for m in ("cskv bits=4", "rtn", "streaming_llm") for k in (0.3, 0.15)),
    }
    scores = {(x["task"], x["method"]): x["score"] for x in data["lines"] if x["length"] == 1100}
    assert (scores["passkey/book", "full"], scores["passkey/book", "zeros"]) == (1, 0)
    assert data["failures"] == []


def test_fidelity_layers_and_memory_are_there_for_every_method_and_length(done):
    data, _ = done
    methods = {x["method"] for x in data["lines"]} - {"zeros", "full"}
    for part in ("fidelity", "memory"):
        assert {(x["method"], x["length"]) for x in data[part]} >= {(m, n) for m in methods for n in (600, 1100)}
    assert {(x["method"], x["layer"]) for x in data["layers"]} == {(m, i) for m in methods for i in range(4)}
    for row in data["fidelity"]:
        assert (row["documents"], row["positions"], row["mode"]) == (2, 24, "decode")
        assert row["kl_mean"] > 0
        assert 0 < row["byte_ratio"] < 0.5
    rtn = {x["target"]: x for x in data["fidelity"] if x["series"] == "cskv bits=4" and x["length"] == 1100}
    assert rtn[0.15]["kl_mean"] > rtn[0.3]["kl_mean"]


def test_an_interrupted_suite_redoes_nothing(reference, texts, tmp_path, monkeypatch):
    less = {"methods": SETTINGS.methods[1:], "tasks": SETTINGS.tasks[:2], "lengths": (600,), "documents": 1}
    small = replace(SETTINGS, byte_ratio=(0.3,), **less)
    whole = Suite(small, *reference, texts, tmp_path / "whole").run("x")
    out, answers = tmp_path / "cut", []
    inner = Runner._answer

    def stop(self, *args):
        if len(answers) == 5:
            raise KeyboardInterrupt
        answers.append(1)
        return inner(self, *args)

    monkeypatch.setattr(Runner, "_answer", stop)
    with pytest.raises(KeyboardInterrupt):
        Suite(small, *reference, texts, out).run("x")
    assert not (out / "results.json").exists()
    assert len((out / "outcomes.jsonl").read_text().splitlines()) == 5
    counted = []
    monkeypatch.setattr(Runner, "_answer", lambda self, *a: counted.append(1) or inner(self, *a))
    monkeypatch.setattr("kvshrink.eval.run.fitting.fit_all", None)  # nothing is fitted again
    resumed = Suite(small, *reference, texts, out).run("x")
    rows = [json.loads(x) for x in (out / "outcomes.jsonl").read_text().splitlines()]
    assert len({r["key"] for r in rows}) == len(rows) == 5 + len(counted)

    def plain(data):
        timed = ("seconds_per_token", "time", "encode")
        return [{k: v for k, v in x.items() if k not in timed} for x in data["lines"]]

    assert plain(resumed) == plain(whole)

    def never(*args, **kwargs):
        raise AssertionError("run again")

    monkeypatch.setattr(Runner, "_answer", never)
    monkeypatch.setattr("kvshrink.eval.run.measure.tracks", never)
    assert Suite(small, *reference, texts, out).run("x") == resumed


def test_a_failing_method_is_listed_and_stops_nothing(reference, texts, tmp_path, monkeypatch):
    inner = Runner._cache

    def broken(self, entry, *rest):
        if entry.series == "rtn":
            raise RuntimeError("no such kernel")
        return inner(self, entry, *rest)

    monkeypatch.setattr(Runner, "_cache", broken)
    settings = Settings(
        model="reference",
        methods=("rtn", "streaming_llm"),
        byte_ratio=(0.3,),
        tasks=("passkey/book",),
        lengths=(700,),
        cases=1,
        documents=0,
    )
    data = Suite(settings, *reference, texts, tmp_path).run("x")
    assert [x["method"] for x in data["lines"]] == ["full", "zeros", "streaming_llm @0.3"]
    assert [(x["method"], x["task"], x["error"]) for x in data["failures"]] == [
        ("rtn @0.3", "passkey/book", "RuntimeError: no such kernel")
    ]


def test_every_task_fits_its_length_or_says_why_not(reference):
    _, tokenizer = reference
    samples, skipped = gather(choices(), (500, 4096), 1, 0, tokenizer, reference=True)
    assert {s.title for s in samples} | {s.task for s in skipped} == {c.title for c in choices()}
    for s in samples:
        for sample in s.samples:
            assert sum(map(len, encode(sample, tokenizer))) + sample.max_new_tokens <= 4096
    assert all(s.reason for s in skipped)
    # what a context of 4096 tokens does not allow is skipped for a reason, and it is little
    assert {s.task for s in skipped if s.length == 4096} <= {"longeval_topics"}


def test_a_task_that_overshoots_its_length_is_left_out(reference, monkeypatch):
    def too_long(n, seed, *, tokens, count):
        return [tasks.Sample("word " * 2 * tokens, "What?", "", ("x",), "topic", 4, {"index": i}) for i in range(n)]

    module = ModuleType("tasks.too_long")
    module.samples = too_long
    monkeypatch.setattr("kvshrink.eval.run.catalogue.tasks.get", lambda name: module)
    samples, skipped = gather([Choice("too_long", "too_long", {})], (500,), 2, 0, reference[1], reference=True)
    assert (samples, [s.task for s in skipped]) == ([], ["too_long"])
    assert "its longest sample takes" in skipped[0].reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"methods": ("nope",)}, "no method 'nope'"),
        ({"methods": ("full",)}, "always there"),
        ({"methods": ("rtn", "rtn")}, "none twice"),
        ({"byte_ratio": ()}, "at least one"),
        ({"byte_ratio": (1.2,)}, "byte_ratio=1.2"),
        ({"modes": ("awake",)}, "mode 'awake'"),
        ({"tasks": ("nope",)}, "no offline task 'nope'"),
        ({"stored": ("nope:path=x",)}, "No task 'nope'"),
        ({"methods": ("rtn:bits=4",)}, "bits is what the budget sets"),
        ({"lengths": (9000,)}, "model's context of 4096"),
        ({"stored": ("longbench:subset=qasper,path=nowhere.jsonl",)}, "no file or folder nowhere.jsonl"),
        ({"stored": ("passkey:colour=red",)}, "no setting 'colour'"),
        ({"stored": ("passkey:path=README.md", "passkey:path=README.md")}, "two tasks are called"),
        ({"lengths": (16,), "documents": 0}, "no task fits"),
        ({"lengths": (100,), "scored": 100}, "scored"),
    ],
)
def test_a_suite_that_cannot_run_is_refused_before_it_starts(reference, texts, tmp_path, changes, reason):
    base = {"model": "reference", "methods": ("rtn",), "byte_ratio": (0.2,), "tasks": ("passkey/book",), "cases": 1}
    with pytest.raises((SettingError, EvalError), match=reason):
        Suite(Settings(**base | changes), *reference, texts, tmp_path).run("x")
    assert not (tmp_path / "results.json").exists()


class _NoTurns:
    """A tokenizer whose chat template drops earlier answers."""

    def __init__(self, tokenizer):
        self.inner, self.chat_template = tokenizer, "x"

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"{messages[0]['content']} {len(messages)}"


def test_a_mode_that_a_task_cannot_have_is_skipped_with_the_reason(reference, texts, tmp_path):
    model, tokenizer = reference
    settings = Settings("reference", ("rtn",), (0.3,), ("scbench_like/mf",), lengths=(600,), cases=1, documents=0)
    data = Suite(settings, model, _NoTurns(tokenizer), texts, tmp_path / "a").run("x")
    assert {x["mode"] for x in data["lines"]} == {"agnostic"}
    (skipped,) = data["skipped"]
    assert "mode multi_turn: the chat template changes earlier turns" in skipped["reason"]
    # a conversation that would go beyond the context
    long = replace(settings, lengths=(4096,), modes=("multi_turn",), tasks=("scbench_like/vt",))
    suite = Suite(long, model, tokenizer, texts, tmp_path / "b")
    samples, found = gather(suite.chosen, (4096,), 1, 0, tokenizer, reference=True)
    assert suite._jobs(samples, found) == []
    assert "more than the model's context of 4096" in found[0].reason


def test_the_default_lengths_come_from_the_model(reference):
    assert module._lengths(reference[0]) == (1024, 2048, 4096)
