"""What comes in from outside: models, texts, prompts, settings, numbers. Each is used, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest

READS = {
    "generate": ["generate", "--prompt", "One day", "--method", "rtn", "--max-new-tokens", 2],
    "fit": ["fit", "--length", 128, "--out", "a"],
    "fit in memory": ["fit", "--length", 128, "--out", "a", "--method", "spectral:budget=0.3"],
    "inspect": ["inspect"],
    "eval": ["eval", "--task", "copy", "--cases", 1, "--method", "rtn"],
    "perplexity": ["eval", "perplexity", "--prefix", 99, "--scored", 4, "--documents", 1, "--method", "rtn"],
    "plan": ["plan", "--byte-ratio", 0.4, "--tokens", 300],
}


@pytest.mark.parametrize("command", READS)
def test_broken_models_are_refused_by_every_command(refused, place, command):
    reasons = {
        "cut": "incomplete metadata",
        "types": "num_hidden_layers",
        "index": "",
        "shard": "",
        "holes": "9 ",
        "deep": "recursion",
        "empty": "model_type",
        "pickle": "",
        "words": "bert",
    }
    if command not in ("generate", "fit", "inspect"):  # the others load as these do
        reasons = {name: reasons[name] for name in ("cut", "words")}
    for name, reason in reasons.items():
        assert reason in refused(*READS[command], "--model", place / "B" / name)
    for name in ("", "./nowhere", place / "T" / "good.txt"):
        assert "model" in refused(*READS[command], "--model", name)
    if command != "inspect":  # it reads no text, and one layer at a time
        assert "tokenizer" in refused(*READS[command], "--model", place / "B" / "bare")
        reason = "token ids run" if command == "fit" else "2 of its tensors"
        assert reason in refused(*READS[command], "--model", place / "B" / "sizes")
    assert not Path("a").exists(), "a fit that could not begin leaves nothing"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("latin.txt", "can't decode byte"),
        ("wide.txt", "can't decode byte"),
        ("wide_bare.txt", "zero bytes"),
        ("binary", "can't decode byte"),
        ("empty.txt", "empty"),
        ("blank.txt", "empty"),
        ("pipe", "empty"),
        (".", "Is a directory"),
        ("/dev/zero", "it is a device"),
        ("x" * 300, "File name too long"),
    ],
)
def test_texts_that_are_none(refused, place, name, reason):
    file, model = place / "T" / name, ("--model", place / "M")
    assert reason in refused("fit", "--text", file, "--out", "a", *model)
    assert reason in refused("generate", "--prompt-file", file, *model)
    assert reason in refused("plan", "--text", file, "--byte-ratio", 0.4, *model)
    if reason != "empty":
        assert reason in refused("eval", "perplexity", "--on", file, *model)
        assert reason in refused("eval", "--task", f"passkey:path='{file}'", *model)


def test_a_mark_and_brackets_make_no_difference(run, place):
    found = []
    for name in ("good.txt", "mark.txt", "bracket[0].txt"):
        args = ("--text", place / "T" / name, "--model", place / "M", "--length", 128)
        code, out, _ = run("fit", *args, "--out", f"a[{name}] :smile:", "--json")
        assert code == 0
        assert f"saved a[{name}] :smile:: " in out
        found.append(json.loads(out.splitlines()[-1])["calibration"])
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("cskv:keep=" + "-" * 9000 + "1", "keep"),
        ("cskv:keep=" + "-" * 100_000 + "1", "characters"),
        ("cskv:keep=(0.5", "no other end"),
        ("cskv:codec='rtn", "no other end"),
        ("cskv:keep=0.5,keep=0.4", "keep is set twice"),
        ("cskv:codec={'a': 1}", "no value of a setting"),
        ("cskv:keep=[[1]]", "no value of a setting"),
        ("cskv:=3", "no setting"),
        ("cskv:keep=nan", "keep"),
        ("cskv:keep=1e400", "keep"),
        ("rtn:bits=four", "bits='four'"),
        ("rtn:group=0", "group=0"),
        ("streaming_llm:sinks=1e9", "sinks=1000000000.0"),
        ("streaming_llm:like=cskv", "not a method that shrinks anything by itself"),
        ("rtn:bits=" + "9" * 5000, "bits"),
        ("\U0001f600", "no method"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("a\nb", r"a\nb"),
    ],
    ids=lambda x: x[:30],
)
def test_method_settings_of_wrong_kinds(refused, spec, reason):
    line = refused("generate", "--prompt", "x", "--method", spec)
    assert reason in line
    assert len(line) < 1100


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("passkey:filler=noise,tokens=1000000000000", "Use a whole number of at most 2147483648"),
        ("longeval:lines=1.5", "lines=1.5 is not possible. Use a whole number"),
        ("longeval:official=3", "official=3"),
        ("scbench_like:turns=True", "turns=True"),
        ("needle:depth=nan", "depth='nan'"),
        ("needle:depth=1e400", "depth=inf"),
        ("needle:depth='x'", "depth='x'"),
        ("passkey:path=3", "path=3 is not possible. Use a name"),
        ("passkey:seed=3", "no setting 'seed'"),
        ("passkey:count=3", "no setting 'count'"),
        ("longbench:path={T}/rows.jsonl", "has no field all_classes"),
        ("infinitebench:path={T}/rows.jsonl,subset='code_run'", "has no field"),
        ("longbench_v2:path={T}/choices.jsonl", "cannot use the rows of"),
        ("longeval:path={T}/deep.json", "is not a LongEval line case"),
        ("lveval:path={T}/deep.json", "cannot read"),
        ("ruler:task=qa_1,path={T}/deep.json", "another layout"),
        ("passkey:path={T}/pipe", "has 0 words"),
    ],
)
def test_task_settings_of_wrong_kinds(refused, place, task, reason):
    args = ("--task", task.format(T=place / "T"), "--cases", 1, "--method", "rtn", "--model", place / "M")
    assert reason in refused("eval", *args)


OUT_OF_RANGE = {
    "generate --prompt x": {
        "max-new-tokens": (0, 2**31, 2**63, "nan", "9" * 5000, "4000"),
        "bits": (0, "1.5"),
        "keep": ("nan",),
    },
    "fit --out a": {
        "length": (0, 1, 2**31, 5000),
        "batch": (0, 1025, "1e3"),
        "keep": (0, -1, "1e400", "inf"),
        "bits": (-4,),
    },
    "plan --byte-ratio 0.4": {
        "tokens": (255, 2**31, 4097),
        "batch": (0, 2**31),
        "trials": (0, 10**6),
        "seed": (-1, 2**32),
        "length": (1, 513),
    },
    "plan": {
        "byte_ratio": (0, 1.5, "nan"),
        "kl": (0, -1, "nan", "inf"),
        "memory": ("-1", "nanGiB", "0", "9" * 400, "1KiB"),
    },
    "eval": {"cases": (0, 10**5), "tokens": (63, 2**31), "seed": (-1,), "batch": (0, 10**4)},
    "eval --task copy": {"tokens": (600,)},
    "eval perplexity": {
        "prefix": (-1, 2**31),
        "scored": (0, 600),
        "documents": (0, 10**9),
        "trajectory": (-1, 2**31),
        "chunk": (0,),
    },
    "eval suite": {
        "byte_ratio": ("0", "nan", "2", "0.2,0.2", ","),
        "lengths": ("0", "-5", "1e3", "9" * 5000, "200,200", ","),
        "cases": (0,),
    },
    "eval suite --documents 0": {
        "tasks": ("", ",", "nope"),
        "modes": (",", ""),
        "methods": (",", "rtn,rtn", "full"),
        "seed": (-1,),
    },
    "demo": {"cases": (0, 51)},
}


@pytest.mark.parametrize("command", OUT_OF_RANGE)
def test_numbers_out_of_range_and_empty_lists(refused, place, command):
    model = () if command == "demo" else ("--model", place / "M")
    for option, values in OUT_OF_RANGE[command].items():
        for value in values:
            assert refused(*command.split(), *model, f"--{option}", value)


def test_prompts(refused, run, place):
    model = ("--model", place / "M", "--method", "rtn")
    line = refused("generate", "--prompt-file", place / "T" / "good.txt", *model)
    assert "of the prompt + 64 new) are more than the model's context of 512" in line
    assert "is no text" in refused("generate", "--prompt", "caf\udce9", *model)
    assert "is no text" in refused("fit", "--text", "caf\udce9.txt", "--out", "a")
    assert "empty" in refused("generate", "--prompt", "", *model)
    code, _, _ = run("generate", "--prompt-file", place / "T" / "prompt.txt", "--max-new-tokens", 2, *model)
    assert code == 0


def test_generation_is_greedy_whatever_the_models_own_settings(run, place, tmp_path):
    shutil.copytree(place / "M", tmp_path / "own")
    settings = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 9.0, "eos_token_id": 2}
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps(settings))
    args = ("generate", "--prompt", "One day in spring", "--method", "rtn", "--max-new-tokens", 8, "--json", "--model")
    answers = [
        json.loads(run(*args, folder)[1].splitlines()[-1])["output"] for folder in (place / "M", tmp_path / "own")
    ]
    assert answers[0] == answers[1]
