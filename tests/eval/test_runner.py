"""The runner: it reads what the cache holds, resumes, isolates failures, and compares at equal bytes."""

import json
from dataclasses import replace

import pytest
import torch

from kvshrink import RTN, StreamingLLM, make_cache
from kvshrink.attach import attach
from kvshrink.errors import EvalError, SettingError
from kvshrink.eval import prompt, tasks
from kvshrink.eval.entries import Entry, check, parse, specs
from kvshrink.eval.outcomes import Log
from kvshrink.eval.prefill import fill, prefill
from kvshrink.eval.rounds import left_pad
from kvshrink.eval.runner import Job, Runner
from kvshrink.eval.summary import cells, summarise


@pytest.fixture(scope="module")
def samples():
    return tasks.get("longeval").samples(4, 3, lines=12, official=False)


@pytest.fixture(scope="module")
def shared(samples):
    """Three questions about one record, of which only the first is known to be asked of it."""
    first = samples[0]
    lines = [line.split(": REGISTER_CONTENT is <") for line in first.context.splitlines()[1:4]]
    return [
        replace(
            first,
            question=first.question.replace(first.meta["key"], key.removeprefix("line ")),
            answers=(number.rstrip(">"),),
            meta={**first.meta, "turn": turn},
        )
        for turn, (key, number) in enumerate(lines)
    ]


ENTRIES = [
    Entry("full", None),
    Entry("same", RTN(bits=None)),
    parse("rtn:bits=2"),
    parse("streaming_llm:like=rtn bits=2"),
]
NOTHING = Entry("window", StreamingLLM(window=1, sinks=0))
JOB = Job("longeval")


def outputs(outcomes, label):
    return [o.output for o in outcomes if o.method == label]


@pytest.mark.parametrize("mode", ["agnostic", "aware"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_lossless_cache_answers_as_the_full_one_and_a_lossy_one_does_not(reference, samples, mode, batch):
    runner = Runner(*reference, [*ENTRIES, NOTHING], batch)
    outcomes = runner.run(Job("longeval", mode), samples)
    assert outputs(outcomes, "same") == outputs(outcomes, "full")
    assert sum(o.score for o in outcomes if o.method == "full") >= 3, "the reference model can do this"
    assert sum(o.score for o in outcomes if o.method == "window") == 0, "nothing is left to answer from"


@pytest.mark.parametrize("mode", ["agnostic", "aware"])
def test_a_batch_answers_as_single_rows_do(reference, mode):
    """Records of different lengths, so that contexts and questions are padded."""
    task = tasks.get("longeval")
    mixed = [task.samples(4, 3, lines=n, official=False)[i] for i, n in enumerate((9, 14, 12, 10))]
    one, many = (Runner(*reference, ENTRIES[:2], batch).run(Job("x", mode), mixed) for batch in (1, 4))
    assert [o.output for o in one] == [o.output for o in many]
    assert {o.tokens for o in one} != {o.tokens for o in many}, "the batch was padded"
    assert all(o.nbytes == o.full for o in many if o.method == "full")


def test_several_questions_read_one_compressed_context(reference, shared, monkeypatch):
    made = []
    inner = Runner._cache
    monkeypatch.setattr(Runner, "_cache", lambda self, *a: made.append(a[0].label) or inner(self, *a))
    together = Runner(*reference, ENTRIES[:3]).run(JOB, shared)
    assert made == ["full", "same", "rtn bits=2"]
    apart = [o for s in shared for o in Runner(*reference, ENTRIES[:3]).run(JOB, [s])]
    for label in ("full", "same", "rtn bits=2"):
        assert outputs(together, label) == outputs(apart, label)
    assert sum(o.score for o in together if o.method == "full") >= 2


def test_in_multi_turn_a_question_follows_the_reference_answers(reference, shared):
    model, tokenizer = reference
    outcomes = Runner(model, tokenizer, ENTRIES[:2]).run(Job("x", "multi_turn"), shared)
    assert outputs(outcomes, "same") == outputs(outcomes, "full")
    text = shared[0].context
    for sample, outcome in zip(shared, outcomes, strict=False):
        text += sample.question + sample.answer_prefix
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        out = model.generate(ids, max_new_tokens=sample.max_new_tokens, do_sample=False, pad_token_id=0)
        assert outcome.output == tokenizer.decode(out[0, ids.shape[1] :])
        text += sample.answers[0] + "\n"


def test_multi_turn_needs_several_questions(reference, samples):
    with pytest.raises(SettingError, match="several questions"):
        Runner(*reference, ENTRIES[:1]).run(Job("x", "multi_turn"), samples)
    with pytest.raises(SettingError, match="mode 'turns' is not known"):
        Runner(*reference, ENTRIES[:1]).run(Job("x", "turns"), samples)


def test_streaming_llm_gets_at_most_the_bytes_it_is_compared_with(reference, samples):
    outcomes = Runner(*reference, ENTRIES).run(JOB, samples)
    for i in range(len(samples)):
        held = {o.method: o.nbytes for o in outcomes if o.index == i}
        assert 0.9 * held["rtn bits=2"] < held["streaming_llm as rtn bits=2"] <= held["rtn bits=2"] * 1.001


@pytest.mark.parametrize("pads", [0, 5])
def test_the_given_prefill_is_the_models_own(reference, samples, pads):
    """fill() must leave the cache as a forward pass through the model would, pads included."""
    model, tokenizer = reference
    rows = [prompt.encode(samples[0], tokenizer)[0]]
    if pads:
        rows.append(rows[0][:-pads])
    ids, mask = left_pad(rows, 0, model.device)
    given, own = make_cache(model, RTN()), make_cache(model, RTN())
    fill(given, prefill(model, ids, mask if pads else None), attach(model), mask if pads else None)
    with torch.inference_mode():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        model(input_ids=ids, past_key_values=own, attention_mask=mask, position_ids=positions)
    a, b = given.state_dict(), own.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_interrupted_run_goes_on_and_redoes_nothing(reference, samples, tmp_path, monkeypatch):
    out, runner = tmp_path / "outcomes.jsonl", Runner(*reference, ENTRIES[:3])
    whole = runner.run(JOB, samples)
    runner.run(JOB, samples[:2], Log(out))
    with out.open("a") as f:
        f.write('{"key": "longeval", "method": "fu')  # cut by an interrupt
    made = []
    inner = Runner._cache
    monkeypatch.setattr(Runner, "_cache", lambda self, *a: made.append(a[0].label) or inner(self, *a))
    resumed = runner.run(JOB, samples, Log(out))
    assert made == ["full", "same", "rtn bits=2"] * 2
    assert [(o.method, o.index, o.output) for o in resumed] == [(o.method, o.index, o.output) for o in whole]
    assert runner.run(JOB, samples, Log(out)) == resumed
    assert len(made) == 6


def test_another_prompt_mode_or_method_is_run_again(reference, samples):
    runner = Runner(*reference, ENTRIES[:3])
    keys = {runner.key(Job("longeval", mode), e, s) for mode in ("agnostic", "aware") for e in ENTRIES for s in samples}
    assert len(keys) == 2 * len(ENTRIES) * len(samples)
    other = replace(samples[0], context=samples[0].context.replace("1", "2"))
    assert runner.key(JOB, ENTRIES[0], other) != runner.key(JOB, ENTRIES[0], samples[0])
    assert Runner(*reference, ENTRIES, batch=2).key(JOB, ENTRIES[0], samples[0]) not in keys


def test_a_failing_method_is_recorded_and_the_others_go_on(reference, samples, monkeypatch):
    inner = Runner._cache

    def broken(self, entry, *rest):
        if entry.label == "same":
            raise RuntimeError("out of memory\nand a long story")
        return inner(self, entry, *rest)

    monkeypatch.setattr(Runner, "_cache", broken)
    runner = Runner(*reference, ENTRIES[:3], isolate=True)
    outcomes = runner.run(JOB, samples)
    assert {o.method for o in outcomes} == {"full", "rtn bits=2"}
    (failure,) = runner.failures
    assert (failure.method, failure.task, failure.error) == ("same", "longeval", "RuntimeError: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        Runner(*reference, ENTRIES[:3]).run(JOB, samples)


def test_summary_counts_bytes_intervals_and_flips(reference, samples):
    outcomes = Runner(*reference, [*ENTRIES[:3], NOTHING]).run(JOB, samples)
    full, same, rtn, nothing = summarise(outcomes)
    assert (full.kept, full.cases, full.against) == (1.0, 4, None)
    assert full.bytes_per_token == pytest.approx(2 * 2 * 64 * 4 * 4)  # K and V, heads, d, bytes of a float32, layers
    assert rtn.kept < 0.7 < same.kept
    assert (full.low <= full.score <= full.high, full.interval) == (True, "wilson")
    assert (same.against.lost, same.against.won, same.against.delta, same.against.p) == (0, 0, 0, 1)
    assert (nothing.against.lost, nothing.against.won) == (round(4 * full.score), 0)
    assert nothing.against.delta == -full.score
    assert same.against.time > 0
    assert len(cells(full)) == 8
    assert json.dumps(rtn.to_dict())
    graded = summarise([replace(o, score=0.5 if o.method == "full" else 0.25) for o in outcomes[:8]])
    assert [(x.interval, x.low, x.high) for x in graded] == [("bootstrap", 0.5, 0.5), ("bootstrap", 0.25, 0.25)]
    assert graded[1].against.p is None


def test_a_folder_that_cannot_be_written_is_named(reference, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"cannot write .*file/outcomes.jsonl"):
        Runner(*reference, ENTRIES[:1]).run(JOB, samples[:1], Log(tmp_path / "file" / "outcomes.jsonl"))


def test_a_list_of_methods_may_have_settings():
    assert specs("cskv,rtn:bits=4,group=64,streaming_llm") == ["cskv", "rtn:bits=4,group=64", "streaming_llm"]
    assert specs("cskv,bits=4") == ["cskv:bits=4"]
    with pytest.raises(SettingError, match="no method is named"):
        specs(" , ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nope", "no method 'nope'"),
        ("cskvv:keep=0.2", "Did you mean 'cskv'"),
        ("cskv:keeep=0.2", "Did you mean 'keep'"),
        ("cskv:keep", "no setting"),
        ("cskv:keep=2", "keep=2"),
    ],
)
def test_a_wrong_method_text_is_refused(text, reason):
    with pytest.raises(SettingError, match=reason):
        parse(text)


def test_entries_are_checked_together():
    with pytest.raises(SettingError, match="listed twice"):
        check([parse("rtn"), parse("rtn")])
    with pytest.raises(SettingError, match="no entry 'cskv'"):
        check([parse("rtn"), parse("streaming_llm:like=cskv")])


class _Templated:
    bos_token_id = None
    chat_template = "x"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in messages) + "<assistant>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}


def test_a_chat_template_goes_around_context_and_question(samples):
    context, question = prompt.encode(samples[0], _Templated())
    text = "".join(map(chr, context)), "".join(map(chr, question))
    assert text[0] == f"<user>{samples[0].context}"
    assert text[1] == f"{samples[0].question}</user><assistant>{samples[0].answer_prefix}"

    # a benchmark may run a task without the template
    plain = replace(samples[0], meta={"chat": False})
    assert "".join(map(chr, prompt.encode(plain, _Templated())[0])) == plain.context


def test_turns_go_through_a_chat_template(shared):
    context, turns = prompt.encode_turns(shared, _Templated())
    texts = ["".join(map(chr, ids)) for turn in turns for ids in turn]
    first, second = shared[:2]
    assert "".join(map(chr, context)) == f"<user>{first.context}"
    assert texts[0] == f"{first.question}</user><assistant>{first.answer_prefix}"
    assert texts[1] == first.answers[0]
    assert texts[2] == f"</assistant><user>{second.question}</user><assistant>{second.answer_prefix}"
    assert prompt.overhead(_Templated()) == len("<user></user><assistant>")
