"""The runner: it reads what the cache holds, resumes, and compares at equal bytes."""

import json

import pytest
import torch

from kvshrink import RTN, StreamingLLM, detach, make_cache, reference_model
from kvshrink.errors import SettingError
from kvshrink.eval import prompt, tasks
from kvshrink.eval.entries import Entry, check, parse
from kvshrink.eval.runner import Runner
from kvshrink.eval.summary import markdown, summarise


@pytest.fixture(scope="module")
def reference():
    model, tokenizer = reference_model("float32")
    yield model, tokenizer
    detach(model)


@pytest.fixture(scope="module")
def samples():
    return tasks.get("longeval").samples(4, 3, lines=12, official=False)


ENTRIES = [
    Entry("full", None),
    Entry("same", RTN(bits=None)),
    parse("rtn:bits=2"),
    parse("streaming_llm:like=rtn bits=2"),
]


@pytest.mark.parametrize("query_aware", [False, True])
def test_a_lossless_cache_answers_as_the_full_one_and_a_lossy_one_does_not(reference, samples, query_aware):
    runner = Runner(*reference, [*ENTRIES, Entry("window", StreamingLLM(window=1, sinks=0))], query_aware)
    outcomes = runner.run("longeval", samples, progress=False)
    by = {label: [o for o in outcomes if o.method == label] for label in ("full", "same", "window")}
    assert [o.output for o in by["same"]] == [o.output for o in by["full"]]
    assert sum(o.score for o in by["full"]) >= 3, "the reference model can do this"
    assert sum(o.score for o in by["window"]) == 0, "nothing is left to answer from"


def test_streaming_llm_gets_at_most_the_bytes_it_is_compared_with(reference, samples):
    outcomes = Runner(*reference, ENTRIES).run("longeval", samples, progress=False)
    for i in range(len(samples)):
        held = {o.method: o.nbytes for o in outcomes if o.index == i}
        assert 0.9 * held["rtn bits=2"] < held["streaming_llm as rtn bits=2"] <= held["rtn bits=2"] * 1.03


def test_the_given_prefill_is_the_models_own(reference, samples):
    """fill() must leave the cache as a forward pass through the model would."""
    model, tokenizer = reference
    from transformers import DynamicCache

    from kvshrink.attach import attach
    from kvshrink.eval.runner import fill

    ids = torch.tensor([prompt.encode(samples[0], tokenizer)[0]])
    dense, given, own = DynamicCache(config=model.config), make_cache(model, RTN()), make_cache(model, RTN())
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=dense)
        model(input_ids=ids, past_key_values=own)
        fill(given, dense, attach(model))
    a, b = given.state_dict(), own.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_interrupted_run_goes_on_and_redoes_nothing(reference, samples, tmp_path, monkeypatch):
    out, runner = tmp_path / "outcomes.jsonl", Runner(*reference, ENTRIES[:3])
    whole = runner.run("longeval", samples, progress=False)
    runner.run("longeval", samples[:2], out=out, progress=False)
    with out.open("a") as f:
        f.write('{"task": "longeval", "method": "fu')  # cut by an interrupt
    counted = []
    inner = Runner._sample
    monkeypatch.setattr(Runner, "_sample", lambda self, *a: counted.append(a[1]) or inner(self, *a))
    resumed = runner.run("longeval", samples, out=out, progress=False)
    assert counted == [2, 3]
    assert [(o.method, o.index, o.output) for o in resumed] == [(o.method, o.index, o.output) for o in whole]


def test_summary_counts_bytes_and_intervals(reference, samples):
    outcomes = Runner(*reference, ENTRIES[:3]).run("longeval", samples, progress=False)
    full, same, rtn = summarise(outcomes)
    assert (full.kept, full.cases) == (1.0, 4)
    assert full.bytes_per_token == pytest.approx(2 * 2 * 64 * 4 * 4)  # K and V, heads, d, bytes of a float32, layers
    assert rtn.kept < 0.7 < same.kept
    assert full.low <= full.accuracy <= full.high
    assert markdown([full]).count("\n") == 3
    assert json.dumps(rtn.to_dict())


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
        return f"<user>{messages[0]['content']}</user><assistant>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}


def test_a_chat_template_goes_around_context_and_question(samples):
    context, question = prompt.encode(samples[0], _Templated())
    text = "".join(map(chr, context)), "".join(map(chr, question))
    assert text[0] == f"<user>{samples[0].context}"
    assert text[1] == f"{samples[0].question}</user><assistant>{samples[0].answer_prefix}"
