"""lm-evaluation-harness through the compressed cache: its own baseline without loss, other numbers with loss."""

import json
import os
import subprocess
import sys

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import kvshrink
from kvshrink import data
from kvshrink.errors import EvalError, SettingError
from kvshrink.eval.run.harness import KVShrinkLM
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.reference import FOLDER

LOSSLESS = "rtn:bits=None"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of lm-eval tasks: a passkey to write, to choose among five, and a book passage to predict."""
    root = tmp_path_factory.mktemp("tasks")
    book = " ".join(data.path("heldout.txt").read_text(encoding="utf-8").split())
    rows = []
    for i, key in enumerate(("48213", "90577")):
        choices = [key, *(str(int(key) + n) for n in (1, 20, 300, 4000))]
        before, after = book[9000 * i : 9000 * i + 800], book[9000 * i + 800 : 9000 * i + 2200]
        context = (
            "<|bos|>There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            f"{before} The pass key is {key}. Remember it. {after}\nWhat is the pass key? The pass key is"
        )
        rows.append({"context": context, "key": key, "choices": choices, "text": book[50_000 + 900 * i :][:400]})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "rows.jsonl")}, "cache_dir": str(root / "cache")},
        "test_split": "test",
    }
    tasks = {
        "key_write": {
            "output_type": "generate_until",
            "doc_to_text": "{{context}} ",
            "doc_to_target": "{{key}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
        "key_choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
        },
        "book_roll": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, task in tasks.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return root


@pytest.fixture(scope="module")
def evaluate(folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model, tasks=("key_write", "key_choose", "book_roll"), **args):
        return lm_eval.simple_evaluate(
            model=model, model_args={"dtype": "float32", **args}, tasks=list(tasks), task_manager=manager,
            device="cpu", bootstrap_iters=0,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def baseline(evaluate):
    return evaluate("hf", pretrained=str(FOLDER))


def answers(results, task):
    return [r for s in sorted(results["samples"][task], key=lambda s: s["doc_id"]) for r in s["filtered_resps"]]


def check_same(results, other):
    """Equal generations and greedy flags; log-likelihoods within 1e-4."""
    assert answers(results, "key_write") == answers(other, "key_write")
    for (ours, greedy), (theirs, wanted) in zip(
        answers(results, "key_choose"), answers(other, "key_choose"), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert greedy == wanted
    # a sum over some 120 tokens
    assert answers(results, "book_roll") == pytest.approx(answers(other, "book_roll"), abs=1e-3, rel=0)


def test_a_lossless_cache_gives_the_baselines_answers(baseline, evaluate):
    results = evaluate("kvshrink", pretrained="reference", method=LOSSLESS)
    check_same(results, baseline)
    assert results["results"]["key_choose"]["acc,none"] == 1
    assert answers(results, "key_write") == ["48213", "90577"]


def test_a_lossy_cache_changes_every_kind_of_answer_and_says_what_it_read(baseline, evaluate):
    results = evaluate("kvshrink", pretrained="reference", method="streaming_llm:window=16", chunk=4)
    assert answers(results, "key_write") != answers(baseline, "key_write")
    for (ours, _), (theirs, _) in zip(answers(results, "key_choose"), answers(baseline, "key_choose"), strict=True):
        assert abs(ours - theirs) > 1e-2
    for ours, theirs in zip(answers(results, "book_roll"), answers(baseline, "book_roll"), strict=True):
        assert abs(ours - theirs) > 1e-2
    info = results["config"]["kvshrink"]
    assert (info["method"], info["query_aware"], info["chunk"]) == ("streaming_llm", True, 4)
    write, choose, roll = (info["tasks"][t] for t in ("key_write", "key_choose", "book_roll"))
    assert (write["sequences"], choose["sequences"], roll["sequences"]) == (2, 10, 2)
    assert write["sequences_reading_compressed"] == write["tokens_reading_compressed"] == 1
    assert choose["tokens"] == 10 * 6  # a space and five digits
    assert 0 < choose["byte_ratio"] == choose["bytes"] / choose["full_bytes"] < 0.15
    # the first tokens of a text fill the window: they are predicted from exact ones, and that is said
    assert 0 < roll["tokens_reading_compressed"] < 1
    json.dumps(info)


@pytest.fixture(scope="module")
def pair():
    """(model, tokenizer) in float32."""
    model, tokenizer = kvshrink.reference_model()
    return model.float(), tokenizer


@pytest.fixture
def make(pair):
    def call(method=LOSSLESS, **settings):
        return KVShrinkLM(pair[0], method, tokenizer=pair[1], device="cpu", **settings)

    return call


def ask(kind, *arguments, task="t"):
    return [Instance(kind, {}, a, i, (task, i, 1)) for i, a in enumerate(arguments)]


BOOK = " ".join(data.path("heldout.txt").read_text(encoding="utf-8").split())[70_000:72_000]
A, B, C = (BOOK.rfind(" ", 0, n) for n in (300, 700, 900))  # at words, so that tokens are the same on both sides
PAIRS = [(BOOK[:B], BOOK[B:C]), (BOOK[:B], " something else"), (BOOK[:A], BOOK[A : A + 80]), ("", BOOK[:40])]


def test_texts_longer_than_max_length_are_cut_as_the_baseline_cuts_them(make, pair):
    """Truncated contexts, an empty one, and a rolling text of three windows, of which the last has a long context."""
    ours, theirs = make(max_length=100, chunk=7), HFLM(pair[0], tokenizer=pair[1], device="cpu", max_length=100)
    requests = ask("loglikelihood", *PAIRS)
    for a, b in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert a == (pytest.approx(b[0], abs=1e-4), b[1])
    rolling = ask("loglikelihood_rolling", (BOOK[:800],))
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3, rel=0)
    assert ours.usage["t"].sequences == 4 + 3
    with pytest.raises(EvalError, match=r"a continuation has \d+ tokens, 1 to max_length=100"):
        ours.loglikelihood(ask("loglikelihood", (BOOK[:100], BOOK[:900])))


def test_scores_are_those_of_a_cache_filled_compressed_and_read_by_hand(make, pair):
    """With loss; and what shares a context, or stands in another order, is scored as if it stood alone."""
    model, tokenizer = pair
    lm = make(kvshrink.RTN(bits=1))
    scored = lm.loglikelihood(ask("loglikelihood", *PAIRS[:3]))
    assert lm.loglikelihood(ask("loglikelihood", *PAIRS[2::-1])) == scored[::-1]
    for (context, continuation), (score, greedy) in zip(PAIRS[:3], scored, strict=True):
        n, ids = len(tokenizer(context)["input_ids"]), torch.tensor([tokenizer(context + continuation)["input_ids"]])
        cache = kvshrink.make_cache(model, kvshrink.RTN(bits=1))
        with torch.no_grad():
            model(ids[:, : n - 1], past_key_values=cache)
            rows = [
                model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0] for i in range(n - 1, ids.shape[1] - 1)
            ]
        logs = torch.stack(rows).log_softmax(-1)
        assert score == pytest.approx(float(logs.gather(1, ids[0, n:, None]).sum()), abs=1e-4)
        assert greedy == bool((logs.argmax(1) == ids[0, n:]).all())


def test_counts_are_of_predictions_that_read_compressed_tokens(make):
    lm = make(StreamingLLM(window=16, sinks=4), chunk=3)
    ids = lm.tok_encode(BOOK)
    # a page is dropped when its 32 and 16 of the window are in: the 48th token
    context, continuation = lm.tok_decode(ids[:40]), lm.tok_decode(ids[40:60])
    lm.loglikelihood(ask("loglikelihood", (context, continuation)))
    # 39 are prefilled, then three a step: after three steps 48 are in, and the last eleven predictions miss some
    assert (lm.usage["t"].tokens, lm.usage["t"].tokens_read, lm.usage["t"].sequences_read) == (20, 11, 1)


def test_a_run_that_never_reads_a_compressed_token_has_no_result(make, caplog):
    lm = make(kvshrink.RTN(bits=1))
    lm.loglikelihood(ask("loglikelihood", ("A short context", " and so on"), task="short"))
    assert "short: no request was long enough to read a compressed token" in caplog.text
    with pytest.raises(EvalError, match="none of 1 requests was long enough"):
        lm.get_model_info()
    lm.loglikelihood(ask("loglikelihood", *PAIRS[:1], task="long"))
    tasks = lm.get_model_info()["kvshrink"]["tasks"]
    assert {k: v["sequences_reading_compressed"] for k, v in tasks.items()} == {"short": 0, "long": 1}
    assert lm.usage == {}


def test_generation_keeps_the_tasks_length_stops_and_sampling(make, pair):
    lm, count = make(), lambda text: len(pair[1](text)["input_ids"])
    greedy = {"max_gen_toks": 40, "do_sample": False}  # more than the 32 of the model's own settings
    long, stopped, sampled, other = lm.generate_until(
        ask(
            "generate_until",
            (BOOK[:700], greedy),
            (BOOK[:700], greedy | {"until": [" the"]}),
            (BOOK[:700], {"max_gen_toks": 40, "do_sample": True, "temperature": 5.0}),
            (BOOK[:500], greedy),
        )
    )
    assert count(long) > 32
    assert " the" in long
    assert stopped == long.split(" the")[0]
    assert sampled != long
    assert other != long


def test_a_method_that_must_be_fitted_is_fitted_on_the_given_text(make, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(data.path("calibration.txt").read_text(encoding="utf-8")[:12_000])
    lm = make("cskv:keep=0.25;window=16", bits=4, text=str(text))
    lm.loglikelihood(ask("loglikelihood", *PAIRS[:1]))
    info = lm.get_model_info()["kvshrink"]
    assert (info["settings"]["keep"], info["settings"]["bits"], info["settings"]["window"]) == (0.25, 4, 16)
    assert info["provenance"]
    lm.method.save_pretrained(tmp_path / "art")
    again = make(None, artifact=str(tmp_path / "art"))
    assert again.loglikelihood(ask("loglikelihood", *PAIRS[:1])) == lm.loglikelihood(ask("loglikelihood", *PAIRS[:1]))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"batch_size": "auto"}, EvalError, "batch_size=auto: one sequence is scored at a time"),
        ({"chunk": 0}, EvalError, "chunk=0 is not possible"),
        ({"mixed_precision_dtype": "bfloat16"}, EvalError, "would change the cache's dtype"),
        ({"method": None}, EvalError, "no method"),
        ({"method": "full"}, EvalError, "use --model hf"),
        ({"method": "rtn:bits=4;keep=0.5"}, SettingError, "rtn has no setting 'keep'"),
        ({"method": "rtn", "text": __file__}, SettingError, "rtn needs no fit"),
        ({"method": "cskv", "text": "no.txt"}, kvshrink.KVShrinkError, "cannot read text file no.txt"),
        ({"method": "rtn", "artifact": "folder"}, SettingError, "cannot change the artifact folder"),
        ({"method": kvshrink.RTN(), "bits": 2}, SettingError, "cannot change a method that is made already"),
    ],
)
def test_what_would_be_ignored_or_wrong_is_refused(make, settings, error, words):
    with pytest.raises(error, match=words):
        make(**settings)


def test_answers_of_another_method_cannot_be_read_from_a_response_cache(make):
    with pytest.raises(EvalError, match="--use_cache does not tell methods apart"):
        make().set_cache_hook(None)


def kvshrink_lm_eval(*args, code):
    command = [sys.executable, "-m", "kvshrink.cli", "lm-eval", *args]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr
    return done


def test_the_command_passes_everything_on_to_lm_eval(folder, tmp_path):
    out = tmp_path / "results.json"
    arguments = "pretrained=reference,dtype=float32,method=rtn:bits=1;window=8"
    done = kvshrink_lm_eval(
        *("--model", "kvshrink", "--model_args", arguments, "--tasks", "key_choose", "--include_path", str(folder)),
        *("--device", "cpu", "--limit", "1", "--output_path", str(out)),
        code=0,
    )
    assert "|key_choose|" in done.stdout
    (written,) = tmp_path.glob("results*.json")
    info = json.loads(written.read_text())["config"]["kvshrink"]
    assert (info["settings"]["bits"], info["settings"]["window"]) == (1, 8)
    assert info["tasks"]["key_choose"]["sequences_reading_compressed"] == 1


def test_the_commands_help_is_ours_and_a_subcommands_is_lm_evals(monkeypatch, capsys):
    from kvshrink import cli

    for args, words in ((["--help"], "method=cskv:keep=0.2;bits=4"), (["run", "--help"], "--apply_chat_template")):
        monkeypatch.setattr(sys, "argv", ["kvshrink", "lm-eval", *args])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        assert words in capsys.readouterr().out


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch, capsys):
    from kvshrink import cli

    monkeypatch.delitem(sys.modules, "kvshrink.eval.run.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.setattr(sys, "argv", ["kvshrink", "lm-eval", "--model", "kvshrink"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Run: pip install 'kvshrink[lm-eval]'")
