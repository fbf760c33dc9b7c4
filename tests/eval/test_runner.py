"""The runner: it reads what the cache holds, resumes, isolates failures, and compares at equal bytes."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from kvshrink import RTN, make_cache
from kvshrink.attach import attach
from kvshrink.attach.fill import fill, prefill
from kvshrink.errors import EvalError, SettingError
from kvshrink.eval import tasks
from kvshrink.eval.report.summary import cells, summarise
from kvshrink.eval.run import prompt
from kvshrink.eval.run import runner as runner_module
from kvshrink.eval.run.entries import Entry, check, parse, specs
from kvshrink.eval.run.rounds import groups, left_pad
from kvshrink.eval.run.runner import Job, Runner
from kvshrink.eval.run.stats import wilson
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.store.log import Log
from tests.scenarios import families


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


def test_what_a_cache_has_seen_when_it_is_compressed(reference, shared):
    """agnostic: the context; aware: all but the last token; multi_turn feeds questions and answers after it."""
    tokenizer = reference[1]
    context, question = prompt.encode(shared[0], tokenizer)
    (agnostic,) = groups(shared, "agnostic", tokenizer, 1)
    assert (agnostic.contexts, agnostic.questions[0], agnostic.feeds) == ([context], [question], [])
    aware = list(groups(shared, "aware", tokenizer, 1))
    for g, (before, asked) in zip(aware, (prompt.encode(s, tokenizer) for s in shared), strict=True):
        assert (g.contexts, g.questions) == ([before + asked[:-1]], [[asked[-1:]]])
    (turns,) = groups(shared, "multi_turn", tokenizer, 1)
    assert turns.contexts == [context]
    told = [f"{s.question}{s.answer_prefix}{s.answers[0]}" for s in shared]
    assert [tokenizer.decode(feed) for feed in turns.feeds] == [told[0], "\n" + told[1], "\n" + told[2]]
    assert turns.reads()[2] == [context, *turns.feeds[:2], turns.questions[2][0]]
    assert turns.tokens() == sum(map(len, turns.reads()[2])) + shared[2].max_new_tokens


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


def test_a_sliding_layer_is_counted_and_copied_as_what_it_holds():
    """transformers leaves it as a view of the whole prompt, which would keep every byte of it alive."""
    model = families.subject("gemma3")
    dense = prefill(model, torch.randint(5, 60, (1, 90)))
    for layer in dense.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert layer.values.untyped_storage().nbytes() == layer.values.nbytes
    assert dense.layers[0].keys.shape[2] < 90 == dense.layers[1].keys.shape[2]


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


def test_all_that_an_answer_depends_on_is_in_its_key(reference, samples):
    model, tokenizer = reference

    def keys(sample=samples[0], mode="agnostic", batch=1, entries=ENTRIES, tokens=tokenizer, net=model):
        (group,) = groups([sample], mode, tokens, batch)
        found = Runner(net, tokens, entries, batch).keys(Job("x", mode), group)
        return [key for by_case in found.values() for key in by_case.values()]

    first = samples[0]
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[2].self_attn.q_proj.weight[3, 4] *= 2
        other.model.layers[2].self_attn.q_proj.weight *= 1.001
    found = [
        *keys(),
        *keys(mode="aware"),
        *keys(batch=2),
        *keys(replace(first, context=first.context.replace("1", "2"))),
        *keys(replace(first, answers=("1",))),
        *keys(replace(first, metric="first_integer")),
        *keys(replace(first, max_new_tokens=9)),
        *keys(replace(first, meta={**first.meta, "labels": ["a"]})),
        *keys(tokens=templated),
        *keys(net=other),
    ]
    assert len(set(found)) == len(found) == 10 * len(ENTRIES)
    assert keys() == keys()
    # a label is only a name: two budgets may come to one setting
    assert keys(entries=[Entry("a", RTN(bits=3))]) == keys(entries=[Entry("b", RTN(bits=3))])


def test_generation_is_greedy_whatever_the_model_s_own_settings_say(reference, samples):
    model, tokenizer = reference
    wanted = outputs(Runner(model, tokenizer, ENTRIES[:1]).run(JOB, samples), "full")
    own = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, repetition_penalty=3.0, do_sample=True, temperature=5.0, max_new_tokens=1
    )
    try:
        assert outputs(Runner(model, tokenizer, ENTRIES[:1]).run(JOB, samples), "full") == wanted
        assert model.generation_config.repetition_penalty == 3.0, "put back"
    finally:
        model.generation_config = own


def test_a_row_ends_at_its_own_end_and_limit():
    assert runner_module._cut([5, 6, 1, 9, 9], 4, {1}) == [5, 6]
    assert runner_module._cut([5, 6, 7, 1], 2, {1}) == [5, 6]
    assert runner_module._cut([5, 6], 4, {None}) == [5, 6]


def test_a_failing_method_is_recorded_and_the_others_go_on(reference, samples, monkeypatch):
    inner, made = Runner._cache, []

    def broken(self, entry, *rest):
        made.append(entry.label)
        if entry.label == "same" and made.count("same") == 2:
            raise RuntimeError("out of memory\nand a long story")
        return inner(self, entry, *rest)

    monkeypatch.setattr(Runner, "_cache", broken)
    runner = Runner(*reference, ENTRIES[:3], isolate=True)
    outcomes = runner.run(JOB, samples)
    assert {o.method for o in outcomes} == {"full", "rtn bits=2"}, "half a task is no score, either"
    (failure,) = runner.failures
    assert (failure.method, failure.task, failure.error) == ("same", "longeval", "RuntimeError: out of memory")
    made.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        Runner(*reference, ENTRIES[:3]).run(JOB, samples)
    monkeypatch.setattr(runner_module, "prefill", lambda *a: 1 / 0)
    runner = Runner(*reference, ENTRIES[:3], isolate=True)
    assert runner.run(JOB, samples) == []
    assert {f.method for f in runner.failures} == {"full", "same", "rtn bits=2"}


def test_summary_counts_bytes_intervals_and_flips(reference, samples):
    outcomes = Runner(*reference, [*ENTRIES[:3], NOTHING]).run(JOB, samples)
    full, same, rtn, nothing = summarise(outcomes)
    assert (full.byte_ratio, full.cases, full.against) == (1.0, 4, None)
    assert full.bytes_per_token == pytest.approx(2 * 2 * 64 * 4 * 4)  # K and V, heads, d, bytes of a float32, layers
    assert rtn.byte_ratio < 0.7 < same.byte_ratio
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
    assert (rtn.to_dict()["removed"], rtn.to_dict()["x_factor"]) == pytest.approx(
        (1 - rtn.byte_ratio, 1 / rtn.byte_ratio), abs=1e-5
    )


def test_questions_about_one_context_are_no_independent_samples(reference, samples):
    outcomes = Runner(*reference, ENTRIES[:2]).run(JOB, samples)
    clustered = [replace(o, context=o.index // 2, score=float(o.index < 2)) for o in outcomes]
    full, same = summarise(clustered)
    assert (full.score, full.interval, full.low, full.high) == (0.5, "wilson", *wilson(1, 2))
    assert same.against.p is None


def test_a_folder_that_cannot_be_written_is_named(reference, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"cannot write .*file/outcomes.jsonl"):
        Runner(*reference, ENTRIES[:1]).run(JOB, samples[:1], Log(tmp_path / "file" / "outcomes.jsonl"))


def test_a_list_of_methods_may_have_settings():
    assert specs("cskv,rtn:bits=4,group=64,streaming_llm") == ["cskv", "rtn:bits=4,group=64", "streaming_llm"]
    assert specs("cskv,bits=4") == ["cskv:bits=4"]
    assert specs("spectral:widths=(1,2),budget=0.1,rtn") == ["spectral:widths=(1,2),budget=0.1", "rtn"]
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


def test_a_question_that_follows_gets_no_space_in_front_of_it():
    """SentencePiece puts one before whatever it is given; the context's last line break has it already."""

    class Pieces:
        bos_token_id = None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) for c in "\u2581" + text.replace(" ", "\u2581")]}

        def convert_ids_to_tokens(self, i):
            return chr(i)

    sample = tasks.Sample("one two\n", "What is it?", " It is", ("three",), "topic", 4, {})
    context, ((question, answer),) = prompt.encode_turns([sample], Pieces())
    assert "".join(map(chr, question)) == "What\u2581is\u2581it?\u2581It\u2581is"
    assert "".join(map(chr, context)) == "\u2581one\u2581two\n"
    assert "".join(map(chr, answer)).lstrip("\u2581") == "three"
    assert prompt.reference_answer(replace(sample, answers=("a", "b"))) == " a"
    assert prompt.reference_answer(replace(sample, answers=("a", "b"), metric="set_f1")) == " a, b"


def test_turns_go_through_a_chat_template(shared):
    context, turns = prompt.encode_turns(shared, _Templated())
    texts = ["".join(map(chr, ids)) for turn in turns for ids in turn]
    first, second = shared[:2]
    assert "".join(map(chr, context)) == f"<user>{first.context}"
    assert texts[0] == f"{first.question}</user><assistant>{first.answer_prefix}"
    assert texts[1] == first.answers[0]
    assert texts[2] == f"</assistant><user>{second.question}</user><assistant>{second.answer_prefix}"
    assert prompt.overhead(_Templated()) == len("<user></user><assistant>")
