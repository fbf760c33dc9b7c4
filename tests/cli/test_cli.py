"""The command line as a user meets it: output, the last JSON line, files, and one-line errors with exit code 2."""

import json
from pathlib import Path

import pytest

from kvshrink import data, methods
from kvshrink.eval.run.runner import Runner
from kvshrink.methods._quantiser import Quantiser
from kvshrink.methods.artifact import Artifact
from kvshrink.store.digest import sealed
from tests.probes import small_probe

CODECS = [n for n in methods.names() if issubclass(c := methods.get(n), Quantiser) and c.of_latents]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(data.path("calibration.txt").read_text(encoding="utf-8")[:6_000])
    return file


def test_fit_inspect_generate_and_eval_work_together(run, text, tmp_path):
    code, out, _ = run("fit", "--keep", 0.25, "--bits", 4, "--text", text, "--length", 256, "--out", "art", "--json")
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert set(record["layers"]) == {"0", "1", "2", "3"}
    assert Artifact.from_pretrained(tmp_path / "art").method.keep == 0.25
    assert not (tmp_path / "art" / ".unfinished").exists()

    code, out, _ = run("inspect", "--artifact", "art", "--out", "s.png", "--json")
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    full, shrunken = record["layers"][0]["32768"]
    assert (full, shrunken / full < 0.09) == (32768 * 512, True)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")

    prompt = tmp_path / "p.txt"
    prompt.write_text(data.path("heldout.txt").read_text(encoding="utf-8")[:1500])
    args = ("generate", "--artifact", "art", "--prompt-file", prompt, "--max-new-tokens", 4, "--json")
    code, out, _ = run(*args)
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert 0 < record["byte_ratio"] < 0.4
    assert record["output"]

    args = ("eval", "--task", "longeval:lines=8", "--artifact", "art", "--method", "rtn:bits=4", "--cases", 2)
    args = (*args, "--out", "e", "--json")
    code, out, _ = run(*args)
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert [r["method"] for r in record["results"]] == ["full", "rtn bits=4", "art"]
    assert (tmp_path / "e" / "accuracy.png").exists()
    assert run(*args)[1].splitlines()[-1] == out.splitlines()[-1], "a second run resumes and changes nothing"


def test_inspect_of_a_model_shows_every_layer_and_writes_the_picture(run, tmp_path):
    code, out, _ = run("inspect", "--keep", 0.2, "--json")
    assert code == 0
    layers = json.loads(out.splitlines()[-1])["layers"]
    assert [r["layer"] for r in layers] == [0, 1, 2, 3]
    assert layers[0]["body_per_token"] == 2 * 25 * 2
    assert (tmp_path / "spectra.png").exists()


def test_the_suite_ends_in_a_page_and_goes_on_after_an_interrupt(run, text, tmp_path, monkeypatch):
    args = [
        "eval",
        "suite",
        "--methods",
        "rtn,cskv:bits=4,window=16",
        "--byte-ratio",
        0.3,
        "--tasks",
        "passkey/book,copy",
    ]
    args += ["--lengths", 400, "--cases", 2, "--documents", 2, "--scored", 8, "--text", text, "--out", "s", "--json"]
    inner, seen = Runner._answer, []

    def stop(self, *rest):
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return inner(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_answer", stop)
        code, _, err = run(*args)
    assert (code, "again to go on" in err) == (130, True)
    code, out, _ = run(*args)
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert len(record["lines"]) == 2 * 4
    rows = (tmp_path / "s" / "outcomes.jsonl").read_text().splitlines()
    assert len(rows) == len({json.loads(row)["key"] for row in rows}) == 2 * 2 * 4
    page = (tmp_path / "s" / "report.html").read_text()
    assert "cskv bits=4 window=16" in page

    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert results["settings"]["command"].startswith('kvshrink eval suite --model reference --methods "rtn,cskv:')
    (tmp_path / "s" / "report.html").unlink()
    assert run("report", "s")[0] == 0
    assert (tmp_path / "s" / "report.html").read_text() == page


def test_a_plan_is_searched_resumed_and_fitted(run, text, tmp_path):
    args = ["plan", "--byte-ratio", 0.2, "--tokens", 1000, "--batch", 3, "--methods", "cskv,rtn", "--trials", 3]
    args += ["--text", text, "--length", 256, "--work", "w", "--out", "plan.json", "--picture", "p.png", "--json"]
    code, out, _ = run(*args)
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert record.pop("measured") == len((tmp_path / "w" / "points.jsonl").read_text().splitlines()) > 3
    assert record == json.loads((tmp_path / "plan.json").read_text())
    assert record["promised"]["nbytes"] <= 0.2 * 3 * 1000 * 2048
    assert record["check"]["nbytes"] == pytest.approx(record["promised"]["nbytes"], rel=0.02)
    assert "CHOSEN" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    code, out, _ = run(*args)
    assert (code, json.loads(out.splitlines()[-1])) == (0, record | {"measured": 0}), "a second run measures nothing"

    code, out, _ = run("fit", "--plan", "plan.json", "--text", text, "--length", 256, "--out", "art")
    assert code == 0
    method = Artifact.from_pretrained(tmp_path / "art").method
    assert json.loads(json.dumps(method.settings())) == record["settings"]

    code, _, err = run("fit", "--plan", "plan.json", "--bits", 4, "--out", "x")
    assert (code, "--bits cannot change the plan" in err) == (2, True)
    identity = record["model"]["identity"]
    other = identity | {"settings": identity["settings"] | {"rms_norm_eps": 0.5}}
    plan = {k: v for k, v in record.items() if k != "sha256"} | {"model": {"name": "other", "identity": other}}
    (tmp_path / "plan.json").write_text(json.dumps(sealed(plan)))
    code, _, err = run("fit", "--plan", "plan.json", "--out", "x")
    assert (code, "was made for other" in err) == (2, True)
    assert "rms_norm_eps is 1e-05, not 0.5" in err


@pytest.mark.parametrize(("given", "fitted"), [("'auto'", (1, 2)), ("auto", (1, 2)), ("1", (1,)), ("None", (None,))])
def test_group_heads_by_name_number_or_none(run, text, tmp_path, given, fitted):
    spec = f"cskv:keep=0.25,bits=4,group_heads={given}"
    assert run("fit", "--method", spec, "--text", text, "--length", 256, "--out", "art")[0] == 0
    artifact = Artifact.from_pretrained(tmp_path / "art")
    assert artifact.method.group_heads in fitted
    rows = []
    for source in (("--artifact", "art"), ("--method", spec)):
        code, out, _ = run("inspect", *source, "--out", "s.png", "--json")
        assert code == 0
        rows.append(json.loads(out.splitlines()[-1])["layers"])
    assert rows[0] == rows[1]


@small_probe()
def test_a_method_that_asks_the_model_is_fitted_and_inspected(run, text):
    args = ("--text", text, "--length", 256)
    code, out, _ = run("fit", "--method", "spectral:budget=0.1", *args, "--out", "art", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["layers"]["0"]["key_error"] > 0.01, "not that of all channels at full width"
    code, out, _ = run("inspect", "--artifact", "art", "--out", "s.png", "--json")
    assert code == 0
    rows = json.loads(out.splitlines()[-1])["layers"]
    assert 0.9 * 0.1 * 4 * 512 < sum(r["body_per_token"] for r in rows) <= 0.1 * 4 * 512
    code, out, _ = run("inspect", "--method", "spectral:budget=0.1", "--json")
    assert json.loads(out.splitlines()[-1])["layers"][0]["body_per_token"] == pytest.approx(51.2, abs=0.1)


@pytest.mark.slow
@small_probe()
def test_demo_ends_in_a_table_a_picture_and_an_artifact(run, tmp_path):
    code, out, _ = run("demo", "--cases", 1, "--json")
    assert code == 0
    results = json.loads(out.splitlines()[-1])["results"]
    assert len(results) == 14
    assert {"accuracy.png", "results.json", "artifact"} <= {p.name for p in (tmp_path / "demo").iterdir()}


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["fit", "--out", "a", "--method", "cskvv"], "Did you mean 'cskv'"),
        (["fit", "--out", "a", "--keep", "1.5"], "keep=1.5"),
        (["fit", "--out", "a", "--keep", "0.0001"], "key rank 0"),
        (["fit", "--out", "a", "--bits", "5"], "bits=5"),
        (["fit", "--out", "a", "--method", "rtn"], "needs no fit"),
        (["fit", "--out", "a", "--method", "full"], "not a method"),
        (["fit", "--out", "a", "--text", "nowhere.txt"], "cannot read text file"),
        (["fit", "--out", "a", "--model", "nowhere/at-all"], "no model"),
        (["fit", "--out", "a", "--plan", "nowhere.json"], "nowhere.json does not exist"),
        (["fit", "--out", "a", "--plan", "nowhere.json", "--method", "cskv"], "--method cannot change the plan"),
        (["plan"], "exactly one budget, not none"),
        (["plan", "--byte-ratio", "0.1", "--memory", "1GiB"], "not --byte-ratio, --memory"),
        (["plan", "--memory", "lots"], "'lots' are no bytes"),
        (["plan", "--byte-ratio", "0.00001"], "too few for 1 x 4096 tokens: the smallest possible are"),
        (["plan", "--byte-ratio", "0.1", "--methods", "streaming_llm"], "streaming_llm cannot be planned"),
        (["plan", "--byte-ratio", "0.1", "--tokens", "9000"], "model's context of 4096"),
        (["eval", "--model", "./nowhere"], "cannot load model"),
        (["eval", "--task", "nope"], "nope"),
        (["eval", "--task", "longeval:path=nowhere.jsonl"], "nowhere.jsonl"),
        (["eval", "--task", "longeval:lines"], "no setting"),
        (["eval", "--task", "passkey:colour=red"], "no setting 'colour'"),
        (["eval", "--task", "passkey", "--mode", "multi_turn"], "several questions"),
        (["eval", "--task", "passkey", "--tokens", "70"], "tokens=70"),
        (["eval", "--task", "passkey", "--tokens", "9000"], "model's context of 4096"),
        (["eval", "perplexity", "--prefix", "5000", "--documents", "1"], "model's context of 4096"),
        (["eval", "perplexity", "--on", "nowhere.txt"], "cannot read text nowhere.txt"),
        (["eval", "perplexity", "--prefix", "10", "--scored", "20", "--method", "rtn"], "read a compressed one"),
        (["eval", "--task", "longbench"], "path="),
        (["eval", "suite", "--methods", "nope"], "no method 'nope'"),
        (["eval", "suite", "--methods", ","], "no method is named"),
        (["eval", "suite", "--byte-ratio", "much"], "--byte-ratio 'much'"),
        (["eval", "suite", "--byte-ratio", ""], "at least one"),
        (["eval", "suite", "--tasks", "nope"], "no offline task 'nope'"),
        (["eval", "suite", "--lengths", "20"], "scored=128"),
        (["eval", "suite", "--modes", "twice"], "mode 'twice'"),
        (["report", "nowhere"], "nowhere"),
        (["eval", "--artifact", "nowhere"], "no artifact"),
        (["eval", "--method", "streaming_llm:like=x"], "no entry 'x'"),
        (["generate", "--prompt", " "], "prompt is empty"),
        (["generate"], "either by --prompt"),
        (["inspect", "--artifact", "nowhere"], "no artifact"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, args, reason):
    code, _, err = run(*args)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("kvshrink: ")
    assert reason in last
    assert "Traceback" not in err


def test_empty_text_is_refused(run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    code, _, err = run("fit", "--out", "a", "--text", "empty.txt")
    assert (code, "is empty" in err) == (2, True)


def test_an_interrupt_says_how_to_go_on(run, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvshrink.cli.fit.fit_all", stop)
    code, _, err = run("fit", "--out", "a")
    assert (code, "again to go on" in err) == (130, True)


def test_usage_errors_exit_with_2(run):
    assert run("nonsense")[0] == 2
    assert run("fit")[0] == 2


@pytest.mark.parametrize("codec", CODECS[::8])  # each one: tests/methods/test_cskv_codecs.py
def test_cskv_with_each_codec_runs_from_the_command_line(run, text, codec):
    """Fitted, saved, loaded, decoded over: in fewer bytes than the model's dtype would take, and not in silence."""
    spec = f"cskv:keep=0.5,window=16,codec={codec}"
    code, out, err = run("fit", "--method", spec, "--text", text, "--length", 128, "--out", "art", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["layers"]
    Path("p.txt").write_text(data.path("heldout.txt").read_text(encoding="utf-8")[:1200])
    code, out, err = run("generate", "--artifact", "art", "--prompt-file", "p.txt", "--max-new-tokens", 3, "--json")
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert record["byte_ratio"] < 0.75
    assert record["output"]


def test_a_codec_that_is_none_is_refused_in_one_line(run, text):
    for spec in ("cskv:codec=cskv", "cskv:codec=turbo", "cskv:codec=kivi,bits=7"):
        code, _, err = run("fit", "--method", spec, "--text", text, "--out", "art")
        assert code == 2
        assert len(err.strip().splitlines()) == 1
