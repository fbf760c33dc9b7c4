"""Plans: the budget is met by real caches, a run goes on where it was, what cannot be is refused with what can."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvshrink import CSKV, RTN, detach, fit, make_cache, reference_model
from kvshrink.attach.budget import CacheBudget
from kvshrink.attach.look import layers_of
from kvshrink.cache import KVCache
from kvshrink.errors import ArtifactError, DataError, SettingError
from kvshrink.eval.run import calibration
from kvshrink.fit import falls
from kvshrink.fit import recall as probes
from kvshrink.fit.data import token_rows
from kvshrink.fit.probe import Recall
from kvshrink.fit.recall import recall_rows, row_length
from kvshrink.fit.source import InMemory
from kvshrink.identity import Identity
from kvshrink.kernels import held
from kvshrink.kernels.ceilings import Ceilings
from kvshrink.methods import build, get, name_of
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.methods.lowrank import _balance
from kvshrink.plan import bench as benches
from kvshrink.plan import file as plans
from kvshrink.plan.bench import Bench, Point, split
from kvshrink.plan.budget import budget, parse_bytes
from kvshrink.plan.check import check
from kvshrink.plan.picture import picture
from kvshrink.plan.search import Search, pareto
from kvshrink.plan.space import METHODS, choices, fit_to_budget, known, smallest
from kvshrink.store.log import Log

QUICK = ("cskv", "rtn", "kivi")  # no losses are measured while these are fitted


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """One row of 512 tokens for the probe instead of four of 2,048, one round, and points for the front only where
    a test asks for them."""
    monkeypatch.setattr(_balance, "ROUGH", 1)
    monkeypatch.setattr(falls, "ROWS", 2)
    monkeypatch.setattr(probes, "ROWS", 1)
    monkeypatch.setattr(probes, "LENGTH", 512)
    monkeypatch.setattr("kvshrink.plan.search.LEVELS", ())


@pytest.fixture(scope="module")
def reference():
    model, tokenizer = reference_model()
    rows = token_rows(calibration.texts(None), tokenizer, 256, 32)[:8]
    yield model, rows
    detach(model)


@pytest.fixture(scope="module")
def llama():
    """Two layers whose cache has the shape of Llama-3.1-8B's: 8 KV heads of 128 channels, read by 32 query heads."""
    shape = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 2}
    # wide enough that keys have as many directions as spectral can spend its bytes on
    config = LlamaConfig(hidden_size=512, intermediate_size=64, vocab_size=300, max_position_embeddings=8192, **shape)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    yield model, torch.randint(3, 300, (7, 256), generator=torch.Generator().manual_seed(1))
    detach(model)


def searched(model, rows, tokens=4096, names=QUICK, trials=6, seed=0, log=None, batch=1, **asked):
    sizes = CacheBudget.of(model, tokens)
    bench = Bench(model, rows, sizes, log or Log(None), progress=False)
    search = Search(bench, budget(sizes, batch, **asked), names, trials, seed)
    return search, search.run()


def named(ready) -> str:
    return name_of(getattr(ready, "method", ready))


def filled(model, method, tokens, batch=1) -> KVCache:
    """A cache that the model itself has filled, token ids drawn at random."""
    cache = make_cache(model, method)
    with torch.inference_mode():
        model(torch.randint(3, 290, (batch, tokens)), past_key_values=cache, logits_to_keep=1)
    return cache


# --- the budget is met ---


def test_spectral_plan_meets_its_budget_on_the_reference_model(reference, monkeypatch):
    """The method is fitted again, as `fit` does it, and the model fills the cache: within 2 % below the budget."""
    model, rows = reference
    monkeypatch.setattr("kvshrink.plan.search.LEVELS", (0.5, 4.0))
    search, chosen = searched(model, rows, 4000, METHODS, trials=2, byte_ratio=0.0625)
    assert chosen.name == "spectral"
    held = filled(model, fit(model, chosen.method, rows, progress=False), 4000).report()
    assert 0.98 * 0.0625 <= held.byte_ratio <= 0.0625
    assert held.nbytes == pytest.approx(chosen.nbytes, rel=0.02)
    names = {p.name for p in search.points}
    assert names == set(METHODS), "what cannot meet the budget is shown where it can stand"


@pytest.mark.parametrize(
    ("name", "byte_ratio", "batch"),
    [("cskv", 0.15, 1), ("rtn", 0.3, 3), ("kivi", 0.4, 1), ("spectral", 0.0625, 1)],
    ids=lambda x: str(x),
)
def test_budget_is_met_at_the_shape_of_an_8b_model(llama, name, byte_ratio, batch):
    model, rows = llama
    tokens, token = 1500, 2 * 2 * 1024 * 4
    memory = int(byte_ratio * batch * tokens * token)
    search, chosen = searched(model, rows, tokens, (name,), 1, memory=str(memory), batch=batch)
    ready = search.bench.fitted(chosen.method) if chosen.method.needs_fit else chosen.method
    real = filled(model, ready, tokens, batch).report()
    assert real.full == batch * tokens * token
    assert real.nbytes == pytest.approx(chosen.nbytes * batch, rel=0.02)
    assert real.nbytes <= 1.002 * memory  # positions are taken in chunks of 256 tokens
    if name in ("cskv", "spectral"):  # whole bits cannot stand everywhere
        assert real.nbytes >= 0.98 * memory
    checked = check(model, ready, tokens, batch)
    assert (checked.nbytes, checked.full, checked.whole) == (real.nbytes, real.full, True)


def test_a_cache_too_large_to_make_is_checked_in_part(llama, monkeypatch):
    model, _ = llama
    monkeypatch.setattr("kvshrink.plan.check.MOST", 700 * 2 * 2 * 1024 * 4)
    checked = check(model, RTN(bits=4), 4096, 8)
    assert (checked.tokens, checked.batch, checked.whole) == (700, 1, False)
    assert checked.nbytes == pytest.approx(checked.promised, abs=4 * 256)
    assert checked.nbytes == filled(model, RTN(bits=4), 700).report().nbytes


@pytest.mark.parametrize("limit", [0.02, 0.3])
def test_fewest_bytes_within_a_kl(reference, limit):
    model, rows = reference
    search, chosen = searched(model, rows, names=("cskv", "rtn"), trials=4, kl=limit)
    assert chosen.kl <= limit
    assert all(p.nbytes >= chosen.nbytes for p in search.points if p.kl <= limit)
    below = fit_to_budget(chosen.method, search.bench.sizes, chosen.nbytes * 0.97)
    assert below is None or search.bench.point(below).kl > limit * 0.8  # KL is not strictly monotone


# --- a search can be repeated and goes on ---


def test_same_seed_same_plan_and_another_seed_another_search(reference):
    model, rows = reference
    log = Log(None)
    runs = [searched(model, rows, seed=seed, trials=10, log=log, byte_ratio=0.25)[0].points for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2], "another seed tries other settings"
    again = searched(model, rows, trials=4, byte_ratio=0.25)[0].points
    assert again[:4] == runs[0][:4], "measured anew it is the same"


def test_a_resumed_run_measures_nothing_again(reference, tmp_path, monkeypatch):
    model, rows = reference
    whole, chosen = searched(model, rows, log=Log(tmp_path / "whole.jsonl"), byte_ratio=0.25)
    inner, seen = Bench._kl, []

    def stop(self, method):
        seen.append(method)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return inner(self, method)

    path = tmp_path / "points.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_kl", stop)
        with pytest.raises(KeyboardInterrupt):
            searched(model, rows, log=Log(path), byte_ratio=0.25)
    resumed, same = searched(model, rows, log=Log(path), byte_ratio=0.25)
    assert (same, resumed.points) == (chosen, whole.points)
    assert resumed.bench.measured == whole.bench.measured - 3
    monkeypatch.setattr(Bench, "_kl", None)
    third, same = searched(model, rows, log=Log(path), byte_ratio=0.25)
    assert (same, third.bench.measured) == (chosen, 0)
    assert "facts" not in third.bench.__dict__, "not even the text is read"


def test_what_was_measured_on_other_text_is_not_taken(reference):
    model, rows = reference
    log = Log(None)
    sizes = CacheBudget.of(model, 4096)
    for part in (rows, rows[1:]):
        bench = Bench(model, part, sizes, log, False)
        bench.point(RTN(bits=4))
        assert bench.measured == 1


# --- what cannot be ---


def test_impossible_budget_names_the_smallest_which_is_then_accepted(reference):
    model, rows = reference
    with pytest.raises(SettingError, match=r"^1000 bytes are too few for 1 x 4096 tokens: the smallest .*") as error:
        searched(model, rows, names=METHODS, memory="1000")
    words = str(error.value)
    size = int(words.split("smallest possible are ")[1].split(" ")[0])
    share = float(words.split("(byte ratio ")[1].split(")")[0])
    for asked in ({"memory": str(size)}, {"byte_ratio": share}):
        search, chosen = searched(model, rows, names=METHODS, trials=2, **asked)
        assert chosen.nbytes == size
    ready = search.bench.fitted(chosen.method)
    assert filled(model, ready, 4096).report().nbytes <= size
    with pytest.raises(SettingError, match=f"smallest possible are {size} "):
        searched(model, rows, names=METHODS, memory=str(size - 1))


def test_a_kl_that_nothing_reaches_is_refused_with_the_smallest(reference):
    model, rows = reference
    with pytest.raises(SettingError, match=r"no setting that was tried comes to a KL of 1e-12 nats: the smallest was"):
        searched(model, rows, names=("kivi",), trials=2, kl=1e-12)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "exactly one budget, not none"),
        ({"byte_ratio": 0.1, "kl": 0.1}, "not --byte-ratio, --kl"),
        ({"byte_ratio": 1.5}, "byte_ratio=1.5"),
        ({"byte_ratio": float("nan")}, "byte_ratio=nan"),
        ({"kl": 0.0}, "kl=0.0"),
        ({"kl": float("nan")}, "kl=nan"),
        ({"memory": "much"}, "'much' are no bytes"),
        ({"memory": "0"}, "'0' are no bytes"),
        ({"memory": "5 TB/s"}, "are no bytes"),
    ],
)
def test_budgets_that_are_refused(reference, asked, message):
    with pytest.raises(SettingError, match=message):
        budget(CacheBudget.of(reference[0], 1024), 1, **asked)


def test_every_form_of_a_budget(reference):
    sizes = CacheBudget.of(reference[0], 1024)
    assert sizes.full == 1024 * 2048
    assert budget(sizes, 4, byte_ratio=0.25).nbytes == 1024 * 512
    assert budget(sizes, 4, memory="1MiB").nbytes == 2**18
    assert (budget(sizes, 4, kl=0.1).nbytes, budget(sizes, 4, kl=0.1).kl) == (None, 0.1)
    for text, size in {"64MiB": 2**26, "1.5 GiB": 3 * 2**29, "20gb": 20 * 10**9, "7": 7, "512 B": 512}.items():
        assert parse_bytes(text) == size


def test_methods_that_no_plan_can_have():
    with pytest.raises(SettingError, match="streaming_llm cannot be planned"):
        known(["cskv", "streaming_llm"])
    with pytest.raises(SettingError, match="names none"):
        known([])
    with pytest.raises(SettingError, match="no method 'cskw'"):
        known(["cskw"])
    assert known(["rtn", "cskv", "rtn"]) == ["rtn", "cskv"]


def test_too_little_text_is_refused(reference):
    _, rows = reference
    fitted, held = split(rows, benches.widest(4096))
    assert (len(fitted), len(held)) == (5, 3)
    assert len(split(torch.zeros(200, 256, dtype=torch.long), benches.widest(4096))[1]) == 20
    with pytest.raises(DataError, match=r"^768 calibration tokens are too few .* Give 920 or more\.$"):
        split(rows[:3], benches.widest(4096))


# --- what is searched ---


@pytest.mark.parametrize("name", METHODS)
def test_stand_is_the_largest_setting_within_the_bytes(llama, name):
    sizes = CacheBudget.of(llama[0], 4096)
    least, method = smallest(name, sizes)
    assert sizes.held(method) == least
    assert fit_to_budget(method, sizes, least) == method
    assert fit_to_budget(method, sizes, least - 1) is None
    values = list(method.budget_values(sizes.layers[0], 4096))
    for share in (0.1, 0.2, 0.3):
        there = fit_to_budget(method, sizes, share * sizes.full)
        if there is None:
            assert least > share * sizes.full
            continue
        at = values.index(getattr(there, method.budget_setting))
        assert sizes.held(there) <= share * sizes.full
        assert (
            at + 1 == len(values)
            or sizes.held(replace(there, **{method.budget_setting: values[at + 1]})) > share * sizes.full
        )


def test_a_plan_has_a_number_of_heads_per_basis(llama, monkeypatch):
    """None and the divisors are searched; "auto" is one of them, by the device, wherever a method is stood."""
    monkeypatch.setattr("kvshrink.methods.lowrank.cskv.measure", lambda device, dtype: Ceilings(100.0, 1.0))
    sizes = CacheBudget.of(llama[0], 4096)
    assert choices("cskv", sizes)["group_heads"] == (None, 1, 2, 4)
    share = 0.1 * sizes.full
    assert fit_to_budget(CSKV(group_heads="auto"), sizes, share) == fit_to_budget(CSKV(group_heads=2), sizes, share)
    assert fit_to_budget(CSKV(group_heads="auto", bits=4), sizes, share) == fit_to_budget(
        CSKV(group_heads=1, bits=4), sizes, share
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_choice_is_a_setting_of_the_method(llama, name):
    sizes = CacheBudget.of(llama[0], 4096)
    for key, values in choices(name, sizes).items():
        for value in values:
            get(name)(**{key: value})
    assert "window" in choices(name, sizes)


def test_a_long_sequence_may_have_a_long_window(llama):
    short, long = (choices("rtn", CacheBudget.of(llama[0], tokens))["window"] for tokens in (4096, 8192))
    assert (max(short), max(long)) == (128, 256)
    assert benches.widest(8192).window == 256


def test_the_front_is_what_nothing_beats():
    draw = torch.Generator().manual_seed(3)
    numbers = torch.randint(0, 12, (60, 2), generator=draw).tolist()
    points = [Point("rtn", {"bits": 4}, n, n / 12, kl / 10) for n, kl in numbers]
    front = pareto(points)

    def beaten(p):
        return any(q.nbytes <= p.nbytes and q.kl <= p.kl and (q.nbytes, q.kl) != (p.nbytes, p.kl) for q in points)

    assert {(p.nbytes, p.kl) for p in front} == {(p.nbytes, p.kl) for p in points if not beaten(p)}
    assert len(front) == len({(p.nbytes, p.kl) for p in front})


def test_the_judge_reads_what_a_real_cache_would_hold(llama, monkeypatch):
    """Against make_cache in chunks of a page: the same KL, whatever the window, and however it is held."""
    model, rows = llama
    infos, shape = layers_of(model), LayerShape(8, 128, torch.float32)
    judge = Recall(model, infos, rows, benches.widest(4096), False, chunk=32)
    monkeypatch.setattr(held, "_native", lambda tensor: False)
    monkeypatch.setattr(held.reference, "LARGEST", 2)  # codes so coarse that it shows
    found = {}
    rounded = RTN(bits=8, window=64, window_bits=8)
    for method in (RTN(bits=1, window=8, sinks=0), RTN(bits=1, window=128), rounded):
        pair = method.codecs(shape, {})
        found[method.window] = got = judge.seen_by(method).kl(dict.fromkeys(range(2), pair))
        total = 0.0
        made = recall_rows(rows, row_length(model, rows), benches.widest(4096))
        for row, exact in zip(made[:, None], judge.wanted, strict=True):
            cache = make_cache(model, method)
            with torch.no_grad():
                model(row[:, : -judge.tail], past_key_values=cache, logits_to_keep=1)
                parts = [model(p, past_key_values=cache).logits[0] for p in row[:, -judge.tail :].split(32, 1)]
            logs = torch.cat(parts).float().log_softmax(-1)
            total += float((exact.exp() * (exact - logs)).sum(-1).mean()) / len(made)
        # a real window also rounds tokens for their own step where they fit in place
        assert got == pytest.approx(total, rel=0.25 if method is rounded else 0.02)
        assert got > (1e-6 if method is rounded else 1e-4)
    assert found[8] > found[128], "a longer window loses less"
    exact = RTN(bits=8, window=64)
    assert found[64] > 2 * judge.seen_by(exact).kl(dict.fromkeys(range(2), exact.codecs(shape, {})))


# --- the time of a step ---


def test_a_limit_on_a_step_leaves_the_best_of_what_is_fast_enough(reference, monkeypatch):
    """Times are given here: what loses least is slow, and another is chosen; where all are, the fastest is named."""
    model, rows = reference
    slow = {"rtn": 3.0, "cskv": 0.9, "kivi": 1.4}
    asked = []
    monkeypatch.setattr(benches.Pace, "ratio", lambda self, ready: asked.append(ready) or slow[named(ready)])
    log = Log(None)
    free = searched(model, rows, log=log, byte_ratio=0.25)[1]
    assert (free.name, asked) == ("rtn", []), "what nobody asked for is not timed"
    search, chosen = searched(model, rows, log=log, byte_ratio=0.25, step_time=1.5)
    assert chosen.kl == min(p.kl for p in search.points if p.nbytes <= search.budget.nbytes and p.name != "rtn")
    count = len(asked)
    assert searched(model, rows, log=log, byte_ratio=0.25, step_time=1.5)[1] == chosen
    assert len(asked) == count, "times are in the log, too"
    assert searched(model, rows, log=log, kl=1.0, step_time=1.0)[1].name == "cskv"
    with pytest.raises(SettingError, match=r"in 0\.5 times the full cache's time: the fastest took 0\.90, with cskv"):
        searched(model, rows, log=log, byte_ratio=0.25, step_time=0.5)
    with pytest.raises(SettingError, match="step_time=nan"):
        budget(search.bench.sizes, 1, kl=0.1, step_time=float("nan"))


def test_a_step_is_timed_beside_one_over_the_full_cache(reference):
    """A few tokens are read in far less time than thousands that plain torch must unpack; every time is above 0."""
    model, _ = reference
    pace = benches.Pace(model, 8000, 2)
    few, many = pace.ratio(StreamingLLM(window=32)), pace.ratio(build("gear", {}))
    assert 0 < 2 * few < many


# --- the file ---


def test_a_plan_is_read_back_and_an_edited_one_refused(reference, tmp_path):
    model, rows = reference
    search, chosen = searched(model, rows, trials=3, byte_ratio=0.25, batch=2)
    ready = search.bench.fitted(chosen.method)
    front, checked = pareto(search.points), check(model, ready, 4096, 2)
    data = plans.plan_of("reference", search.bench, search.budget, chosen, front, checked, None, {"seed": 0})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    method, made_for = plans.read(path)
    assert method == chosen.method
    assert Identity.from_dict(made_for["identity"]) == InMemory(model).identity()
    assert data["promised"]["nbytes"] == 2 * chosen.nbytes
    assert data["budget"] == {"byte_ratio": 0.25, "tokens": 4096, "batch": 2}
    for change, message in (
        ({"version": 1}, "has plan version 1, this kvshrink reads 4"),
        ({"note": "hello"}, r"missing or unknown keys \['note'\]"),
        ({"settings": {"window": 0}}, r"is edited: window=0"),
        ({"method": "magic"}, r"is edited: no method 'magic'"),
        ({"settings": 3}, "is edited"),
        ({"kl": 0.5}, "is edited: sha256 differs"),
        ({"model": []}, "is edited: its model has no name"),
    ):
        path.write_text(json.dumps(data | change))
        with pytest.raises(ArtifactError, match=message):
            plans.read(path)


def test_the_picture_is_written(tmp_path):
    points = [Point("rtn", {"bits": 4}, 10 * n, n / 10, 0.1 / n) for n in (1, 2, 3)] + [Point("kivi", {}, 30, 0.3, 0.0)]
    path = Path(tmp_path / "p.png")
    picture(points, pareto(points), points[1], path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
