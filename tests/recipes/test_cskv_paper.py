"""The ablations: every experiment on a tiny random model, resumed without making anything; words follow numbers."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvshrink import data, detach, reference_model
from kvshrink.errors import SettingError
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.fitting import fitted
from kvshrink.eval.run.layers import layer_errors
from kvshrink.eval.run.runner import Runner
from kvshrink.eval.run.teacher import opened
from kvshrink.fit import fit
from kvshrink.fit.curve import curve
from kvshrink.kernels.affine import dequantize, quantize
from kvshrink.methods.lowrank.cskv import CSKV
from recipes.cskv_paper import EXPERIMENTS, chosen, initialisation, quantisation, split, training, window
from recipes.cskv_paper import run as runs
from recipes.cskv_paper.__main__ import main
from recipes.cskv_paper.lab import Settings
from recipes.cskv_paper.latents import OFFICIAL, OURS, UNCLAMPED
from recipes.cskv_paper.official_quantiser import fake_quantise, official, one_sign
from recipes.cskv_paper.rows import LINES, Verdict, better, keeps, nothing
from recipes.cskv_paper.words import claim, tally

SETTINGS = Settings(model="reference", cases=1, documents=2, scored=3, steps=3)
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 800,
}


@pytest.fixture(scope="module")
def tiny():
    _, tokenizer = reference_model()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=0)).eval()
    yield model, tokenizer
    detach(model)


@pytest.fixture(scope="module")
def texts():
    return [data.path("calibration.txt").read_text(encoding="utf-8")[:12_000]]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Fewer points of each experiment, all of its kinds."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (initialisation, quantisation):
            patch.setattr(module, "KEEPS", (0.5, 0.2))
        patch.setattr(window, "WINDOWS", (2, 32, 512, 1024))
        patch.setattr(split, "SHARES", (0.125, 0.25, 0.625, 0.75))
        yield


@pytest.fixture(scope="module")
def done(tiny, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("ablations")
    return runs.run(SETTINGS, *tiny, texts, out, "python -m recipes.cskv_paper"), out


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_every_experiment_leaves_its_rows_its_picture_and_its_paragraph(done):
    result, out = done
    assert result["failures"] == []
    assert list(result["seconds"]) == list(EXPERIMENTS)
    page = (out / "ablations.md").read_text()
    for name, module in EXPERIMENTS.items():
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"## {module.TITLE}" in page
        assert f"]({name}.png)" in page
        assert read(out, name)["settings"]["steps"] == 3
    for sentence in ("Agrees", "Differs", "Not decided", "Is the paper's PTQ of 0.00 the clamped zero point?"):
        assert sentence in page


def test_the_grids_are_those_of_the_paper():
    """As its tables print them."""
    assert list(window.PAPER) == [2**i for i in range(1, 13)]
    assert [list(own) for own in split.PAPER.values()] == [[i / 8 for i in range(1, 8)]] * 2
    assert split.PAPER[0.5][0.75] == max(split.PAPER[0.5].values())
    assert split.PAPER[0.25][0.625] == max(split.PAPER[0.25].values())
    for paper in (initialisation.PAPER, quantisation.PAPER):
        assert [list(own) for own in paper.values()] == [[0.5, 0.4, 0.3, 0.2]] * 3
    assert initialisation.PAPER["asvd"][0.2] == 0.92
    assert quantisation.PAPER["QAT"][0.2] == 0.90


def test_the_rows_are_those_of_the_paper(done):
    _, out = done
    found = {name: read(out, name)["rows"] for name in EXPERIMENTS}
    assert {(r["kind"], r["keep"]) for r in found["methods"]} >= {
        (kind, keep) for kind in EXPERIMENTS["methods"].ORDER for keep in (0.5, 0.2)
    }
    assert {(r["init"], r["keep"], r["when"]) for r in found["initialisation"] if r["init"]} == {
        (init, keep, when)
        for init in ("random", "svd", "asvd", "pca")
        for keep in (0.5, 0.2)
        for when in ("before", "after")
    }
    # the context has 800 tokens: what a window of 1024 or more would hold is all of it
    assert {r["window"] for r in found["window"] if r["window"]} == {2, 32, 512}
    assert [(r["key_channels"], r["value_channels"], r["of"]) for r in found["split"] if r["keep"] == 0.25] == [
        (1, 7, 16),
        (2, 6, 16),
        (5, 3, 16),
        (6, 2, 16),
    ]
    for kind in (window.CLOSED, window.TRAINED):
        bytes_held = [r["kl"]["byte_ratio"] for r in found["window"] if r["kind"] == kind]
        assert bytes_held == sorted(bytes_held)
        assert bytes_held[0] < 0.4 < 0.7 < bytes_held[-1]
    told = {r["key_share"]: r["paper"] for r in found["split"] if r["keep"] == 0.5}
    assert told[0.75] == {"as kept": 0.98, "as removed": 0.94}
    assert {(r["start"], r["keep"], r["kind"]) for r in found["quantisation"] if r["start"]} == {
        (s, k, kind) for s in ("asvd", "pca") for k in (0.5, 0.2) for kind in quantisation.KINDS
    }
    assert [r["init"] for r in found["training"]] == ["random", "svd", "asvd", "asvd", "pca"]
    for name, rows in found.items():
        for row in rows if name != "training" else ():
            titles = {t["task"] for t in row["tasks"]}
            if row["label"] == "full":
                assert row["kl"] is None
            elif not row.get("window") or row["window"] < 512:
                assert titles >= set(LINES), row["label"]
                assert row["lines"]["cases"] == 2
                assert 0 <= row["lines"]["low"] <= row["lines"]["score"] <= row["lines"]["high"] <= 1
            if row["kl"]:
                assert (row["kl"]["documents"], row["kl"]["positions"]) == (2, 6)
                assert row["kl"]["low"] <= row["kl"]["mean"] <= row["kl"]["high"]


def test_streaming_llm_stands_at_the_bytes_that_cskv_holds(done):
    rows = {r["label"]: r for r in read(done[1], "methods")["rows"]}
    for keep in ("0.5", "0.2"):
        ours, theirs = rows[f"CSKV, closed form @{keep}"], rows[f"StreamingLLM, same bytes @{keep}"]
        for what in ("lines", "kl"):
            assert theirs[what]["byte_ratio"] == pytest.approx(ours[what]["byte_ratio"], rel=0.05)


def test_training_starts_where_the_start_is_and_never_goes_below_the_closed_form(done):
    found = read(done[1], "training")
    for row in found["rows"]:
        assert found["closed"] <= row["end"] * (1 + 1e-6)
        assert row["time"] >= 1
        assert [step for step, _ in row["curve"]] == [1, 2, 3]
    by = {r["init"]: r for r in found["rows"]}
    assert by["pca"]["start"] == found["closed"]
    assert by["random"]["start"] > by["svd"]["start"] > found["closed"]


def test_the_loss_of_a_fit_is_what_its_training_saw(tiny):
    """The same row twice, so that a step on one row is a step on the whole text; a rate that moves nothing."""
    model, tokenizer = tiny
    row = torch.randint(2, len(tokenizer), (1, 128), generator=torch.Generator().manual_seed(0))
    artifact = fit(model, CSKV(keep=0.5, init="svd", steps=1, lr=1e-12), row.repeat(2, 1), progress=False)
    records = [x.get("training", x) for x in artifact.provenance["layers"].values()]
    assert training.loss(artifact) == pytest.approx(sum(x["loss"][0] for x in records), rel=1e-4)


def test_latents_are_measured_by_layer_and_side_under_three_quantisers(done):
    found = read(done[1], "quantisation")["latents"]
    assert len(found) == 2 * 2 * 2 * 2  # starts, ratios, layers, sides
    for row in found:
        assert set(row["latent"]) == set(row["rebuilt"]) == {OFFICIAL, UNCLAMPED, OURS}
        assert 0 <= row["one_sign"] <= 1
        assert row["latent"][OURS] <= row["latent"][OFFICIAL] * 1.2
    assert all(r["simulated"] == (r["kind"] == quantisation.CLAMPED) for r in read(done[1], "quantisation")["rows"])
    assert "simulated: none saved" in (done[1] / "ablations.md").read_text()


def test_a_resumed_run_makes_nothing_again_and_writes_the_same(done, tiny, texts, monkeypatch):
    _, out = done
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(Runner, "_answer", never)
    for name in ("lab.follow", "latents._measured", "training.fit"):
        monkeypatch.setattr(f"recipes.cskv_paper.{name}", never)
    monkeypatch.setattr("kvshrink.eval.run.fitting.fit_all", never)
    again = runs.run(SETTINGS, *tiny, texts, out, "python -m recipes.cskv_paper")
    assert again["failures"] == []
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_a_failing_experiment_is_listed_and_the_others_go_on(tiny, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(split, "run", lambda lab: 1 / 0)
    monkeypatch.setattr(window, "WINDOWS", (2, 32))
    settings = Settings("reference", ("window", "split"), cases=1, documents=1, scored=3, steps=1)
    result = runs.run(settings, *tiny, texts, tmp_path, "x")
    assert [(f["experiment"], f["error"]) for f in result["failures"]] == [
        ("split", "ZeroDivisionError: division by zero")
    ]
    assert {r["window"] for r in read(tmp_path, "window")["rows"]} == {None, 2, 32}
    assert "Failed: split on all: ZeroDivisionError" in (tmp_path / "ablations.md").read_text()


def test_a_failing_method_costs_its_own_rows_only(tiny, texts, tmp_path, monkeypatch):
    inner = quantisation.official
    monkeypatch.setattr(quantisation, "KEEPS", (0.5,))
    monkeypatch.setattr(quantisation, "official", lambda a: _broken(inner(a)))
    settings = Settings("reference", ("quantisation",), cases=1, documents=1, scored=3, steps=1)
    result = runs.run(settings, *tiny, texts, tmp_path, "x")
    assert {f["method"].split(", ")[1] for f in result["failures"]} == {"PTQ"}
    rows = {r["label"]: r for r in read(tmp_path, "quantisation")["rows"]}
    for row in rows.values():
        assert (row["lines"] is None) == (row["kind"] == quantisation.CLAMPED)


def _broken(artifact):
    """Tensors that no codec can be made of."""
    return type(artifact)(artifact.method, {i: {} for i in artifact.layers}, artifact.model, artifact.provenance)


def test_a_wrong_name_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--only", "split,windows"])
    assert stop.value.code == 2
    known = "methods, initialisation, window, split, quantisation, training"
    assert capsys.readouterr().err == f"kvshrink: no ablation 'windows'. Known: {known}.\n"
    assert list(chosen(("window", "split"))) == ["window", "split"]
    with pytest.raises(SettingError):
        chosen(("",))


WRONG = [
    *(("--only", x) for x in (",", "nope")),
    *(("--cases", x) for x in ("0",)),
    *(("--steps", x) for x in ("0", str(2**63), "4 --only split")),
    *(("--length", x) for x in ("0", "600000")),
    *(("--scored", x) for x in ("0", "8 --documents 0")),
    ("--documents", "-1"),
    ("--out", "/dev/null"),
    ("--redraw", "nowhere"),
]


@pytest.mark.parametrize(("option", "value"), WRONG)
def test_wrong_options_are_one_line(option, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([option, *value.split(" ")])
    err = capsys.readouterr().err
    assert (stop.value.code, len(err.splitlines())) == (2, 1), err


def test_the_official_formula_by_hand():
    # range 3, scale 1, zero 0 - round(-4) = clamped from -4 to 0: codes 4..7 are cut to 3
    assert fake_quantise(torch.tensor([4.0, 5.0, 6.0, 7.0]), 2).tolist() == [3, 3, 3, 3]
    assert fake_quantise(torch.tensor([4.0, 5.0, 6.0, 7.0]), 2, clamped=False).tolist() == [4, 5, 6, 7]
    # zero 7 is cut to 3: codes -7 + 3 .. -4 + 3 are cut to 0
    assert fake_quantise(torch.tensor([-7.0, -6.0, -5.0, -4.0]), 2).tolist() == [-3, -3, -3, -3]
    assert fake_quantise(torch.tensor([-1.0, 0.2, 0.9, 2.0]), 2).tolist() == [-1, 0, 1, 2]
    # a group of one value: the least range of 1e-5, which is no help where zero is clamped
    assert fake_quantise(torch.full((4,), 5.0), 4).tolist() == pytest.approx([1e-5] * 4)
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [-2.0, -1.0], [0.0, 3.0]])
    assert one_sign(x).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("mean", "wanted", "ours"), [(3, 0.098, 0.025), (4, 0.183, 0.019), (6, 0.363, 0.013), (10, 0.595, 0.008)]
)
def test_the_official_formula_loses_one_sign_groups(mean, wanted, ours):
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)) + mean

    def error(y):
        return float((x - y).norm() / x.norm())

    assert error(fake_quantise(x, 4)) == pytest.approx(wanted, rel=0.03)
    assert error(dequantize(*quantize(x, 4))) == pytest.approx(ours, rel=0.05)
    assert error(fake_quantise(x, 4, clamped=False)) == pytest.approx(ours, rel=0.08)


def test_the_real_cache_reads_what_the_official_formula_gives(tiny, texts):
    """Moving an orthonormal basis' mean along it gives latents of one sign that stand for the same values."""
    model, tokenizer = tiny
    (entry,) = fitted([Entry("x", CSKV(keep=0.5, bits=4))], model, tokenizer, texts)
    centred = entry.method
    layers = {i: dict(fitted) for i, fitted in centred.layers.items()}
    for fitted_layer in layers.values():
        fitted_layer["value_mean"] = fitted_layer["value_mean"] - 3 * fitted_layer["value_up"].sum(1)
    moved = type(centred)(centred.method, layers, centred.model, centred.provenance)
    ids = torch.randint(2, len(tokenizer), (1, 200), generator=torch.Generator().manual_seed(0))
    error = {
        name: [x.value_error for x in layer_errors(model, artifact, ids, 190)]
        for name, artifact in (("ours", moved), ("official", official(moved)), ("centred", official(centred)))
    }
    for ours, clipped, plain in zip(*error.values(), strict=True):
        assert plain == pytest.approx(ours, rel=0.1)
        assert clipped > 1.5 * ours
    held = {name: _held(model, artifact, ids) for name, artifact in (("ours", moved), ("official", official(moved)))}
    assert held["official"] > held["ours"], "simulated: float32 latents"


def _held(model, artifact, ids):
    return opened(model, {"": artifact}, ids)[1][""].nbytes


def _row(scores, kl):
    lines = {"scores": scores, "score": sum(scores) / len(scores), "low": 0.0, "high": 1.0, "cases": len(scores)}
    return {"lines": lines, "kl": None if kl is None else {"mean": sum(kl) / len(kl), "by_document": kl}}


def test_answers_decide_and_the_kl_only_where_they_do_not():
    good, bad = [1.0] * 10, [0.0] * 8 + [1.0] * 2
    assert better(_row(good, [0.2] * 4), _row(bad, [0.1] * 4)).sign == 1
    assert better(_row(bad, None), _row(good, None)).sign == -1
    close = [1.0] * 9 + [0.0]
    assert better(_row(good, None), _row(close, None)).sign == 0
    assert better(_row(good, [0.2, 0.21, 0.4]), _row(close, [0.1, 0.11, 0.2])).sign == -1
    noisy = better(_row(good, [0.2, 0.1, 0.4]), _row(close, [0.1, 0.2, 0.3]))
    assert (noisy.sign, "within the noise" in noisy.how) == (0, True)
    assert [keeps(_row(good, None), _row(x, None), 0.1) for x in (close, [1.0] * 8 + [0.0] * 2, bad)] == [
        True,
        None,
        False,
    ]
    signs = [nothing({"lines": x}, 0.1).sign for x in (_lines(0.05, 0), _lines(0.2, 0.05), _lines(0.5, 0.3))]
    assert signs == [1, 0, -1]


def _lines(score, low):
    return {"score": score, "low": low, "high": 1.0, "cases": 20}


def test_words_follow_from_numbers(done):
    assert claim("x.", Verdict(1, "a")).startswith("**Agrees.**")
    assert claim("x.", Verdict(-1, "a")).startswith("**Differs.**")
    assert claim("x.", Verdict(0, "a")).startswith("**Not decided.**")
    assert claim("x.", Verdict(1, "a", "KL")).startswith("**Agrees, by the KL.**")
    two = [("50 %", Verdict(1, "a")), ("80 %", Verdict(-1, "b"))]
    assert tally("x.", two).startswith("**Mixed.**")
    assert "so at 50 % (50 %: a), the other way round at 80 % (80 %: b)" in tally("x.", two)
    assert tally("x.", two[:1]).startswith("**Agrees.**")

    found = read(done[1], "initialisation")
    paragraph = initialisation.say(found)
    for row in found["rows"]:
        if row["init"] == "random" and row["when"] == "after":
            row["lines"] |= {"score": 0.9, "scores": [1.0] * 9 + [0.0], "cases": 10, "low": 0.6}
    changed = initialisation.say(found)
    assert paragraph[0].startswith("**Agrees.**"), "an untrained random model answers nothing"
    assert changed[0].startswith("**Differs.**")
    assert "50 %: .90" in changed[0]


@pytest.mark.parametrize(
    ("answers", "kl", "word"),
    [(0.625, 0.625, "Agrees"), (0.625, 0.25, "Mixed"), (0.25, 0.625, "Mixed"), (0.25, 0.25, "Differs, by the KL")],
)
def test_the_best_split_is_judged_by_answers_and_by_kl(done, answers, kl, word):
    found = read(done[1], "split")
    for row in found["rows"]:
        if row["keep"] == 0.25:
            top, least = row["key_share"] == answers, row["key_share"] == kl
            row["lines"] |= {
                "score": 0.9 if top else 0.8,
                "scores": [1.0] * (9 if top else 8) + [0.0] * (1 if top else 2),
            }
            row["kl"] |= {"mean": 0.1 if least else 0.2, "by_document": [0.1, 0.11] if least else [0.2, 0.22]}
    assert f"**{word}.** The paper: keys get more" in split.say(found)[-1]


@pytest.mark.parametrize(
    ("ours", "theirs", "answer"),
    [(0.8, 0.0, "Yes"), (0.0, 0.0, "No"), (0.8, 0.8, "No"), (0.9, 0.3, "Not by itself")],
)
def test_the_question_of_the_clamp_is_answered_by_the_scores(done, ours, theirs, answer):
    found = read(done[1], "quantisation")
    for row in found["rows"]:
        if row["start"] == "asvd" and row["kind"] in (quantisation.PTQ, quantisation.CLAMPED):
            score = ours if row["kind"] == quantisation.PTQ else theirs
            right = round(20 * score)
            row["lines"] |= {"score": score, "scores": [1.0] * right + [0.0] * (20 - right), "cases": 20}
            row["kl"] = None
    (said,) = [x for x in quantisation.say(found) if "clamped zero point?" in x]
    assert f"clamped zero point? {answer}" in said


def test_a_curve_is_thinned_to_means():
    assert curve([4.0, 2.0, 3.0, 1.0, 5.0], points=2) == [[3, 3.0], [5, 3.0]]
    assert curve([1.0, None, 3.0]) == [[1, 1.0], [3, 3.0]]
    assert (curve([]), len(curve([1.0] * 12_000))) == ([], 100)
    assert training.TITLE
