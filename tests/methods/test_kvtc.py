import itertools
import re

import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.kernels.normal.reference import expected_error
from kvshrink.methods._packing.mixed import group_bytes
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank import _bits, kvtc
from kvshrink.methods.lowrank.kvtc import KVTC, allocate
from tests.cache.build import feed, make

LLAMA31 = LayerShape(8, 128, torch.bfloat16)
SMALL = LayerShape(4, 20, torch.bfloat16)  # 80 components each: 5 groups
WIDTHS = (2, 3, 4, 8)
ERROR = {w: expected_error(w) for w in (0, *WIDTHS)}


# --- dynamic programming ---


@pytest.mark.parametrize("sizes", [(16, 16, 16, 16), (16, 16, 16, 4), (4, 12, 16, 8)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_other_choice_of_widths_has_less_error(sizes, seed):
    """Against all 625 choices, at budgets that no choice meets exactly as well."""
    energies = (torch.rand(4, generator=torch.Generator().manual_seed(seed)) * 6).exp().tolist()
    every = list(itertools.product((0, *WIDTHS), repeat=4))
    cost = {c: sum(group_bytes(s, w, 32) for s, w in zip(sizes, c, strict=True)) for c in every}
    error = {c: sum(e * ERROR[w] for e, w in zip(energies, c, strict=True)) for c in every}
    for budget in (0, 33, 129, 130, 301, 444, 777, 1200, max(cost.values()), 10**4):
        chosen = allocate(energies, sizes, budget, WIDTHS, 32)
        assert cost[chosen] <= budget
        best = min(error[c] for c in every if cost[c] <= budget)
        assert error[chosen] == pytest.approx(best, rel=1e-12)


def test_it_is_never_worse_than_filling_by_the_steepest_fall_and_sometimes_better():
    """The steepest step first may leave no room for what two others would have brought."""
    energies, worse = [10.0, 9.0], 0
    for budget in range(130, 1200, 30):
        greedy = _bits.fill(energies, [16, 4], budget, WIDTHS, 32, expected_error)
        chosen = allocate(energies, [16, 4], budget, WIDTHS, 32)
        gain = _bits.error_of(greedy, energies, expected_error) - _bits.error_of(chosen, energies, expected_error)
        assert gain > -1e-9
        worse += gain > 1e-9
    assert worse > 0, "this case was to show a difference"


def test_a_budget_of_many_steps_is_held_and_nearly_best(monkeypatch):
    energies = torch.logspace(2, -2, 64).tolist()
    exact = allocate(energies, (16,) * 64, 9000, WIDTHS, 32)
    monkeypatch.setattr(kvtc, "CELLS", 300)
    coarse = allocate(energies, (16,) * 64, 9000, WIDTHS, 32)
    assert coarse != exact
    assert _bits.cost_of(coarse, (16,) * 64, 32) <= 9000
    assert _bits.error_of(coarse, energies, expected_error) < 1.25 * _bits.error_of(exact, energies, expected_error)


# --- the method ---


@pytest.mark.parametrize("kept", [0.05, 0.1, 0.25])
def test_the_budget_is_held_and_used(stats_of, kept):
    method = KVTC(budget=kept)
    budget = kept * SMALL.token_bytes * 32
    pair = method.codecs(SMALL, method.fit_layer(stats_of(SMALL)))
    spent = [c.page_bytes() for c in pair]
    assert budget - 2 * group_bytes(16, 2, 32) < sum(spent) <= budget
    assert spent[0] <= budget / 2


def test_the_promise_before_a_fit():
    assert KVTC(budget=0.125).bits_per_token(LLAMA31, {}) == 0.125 * 2 * 1024 * 16


@pytest.mark.parametrize("kv", [0, 1])
@pytest.mark.parametrize("kept", [0.1, 0.25])
def test_the_error_is_that_of_the_best_choice(stats_of, kv, kept):
    """Normal rows: error = sum over groups of eigenvalues x Lloyd-Max error, at the best widths of all 3125 choices."""
    rows = torch.randn(4000, 80) @ torch.diag(torch.logspace(1, -1, 80)) @ torch.linalg.qr(torch.randn(80, 80)).Q + 3
    method = KVTC(budget=kept)
    stats = stats_of(SMALL, keys=rows, values=rows)
    fitted = method.fit_layer(stats)
    codec = method.codecs(SMALL, fitted)[kv]
    values = torch.linalg.eigvalsh(torch.cov(rows.T.double(), correction=0)).flip(0)
    energies = [float(part.sum()) for part in values.split(16)]
    whole = kept * SMALL.token_bytes * 32
    # what the keys leave over goes to the values
    budget = whole / 2 if kv == 0 else whole - method.codecs(SMALL, fitted)[0].page_bytes()
    every = [c for c in itertools.product((0, *WIDTHS), repeat=5) if _bits.cost_of(c, (16,) * 5, 32) <= budget]
    best = min(sum(e * ERROR[w] for e, w in zip(energies, c, strict=True)) for c in every)
    heads = rows[:3200].unflatten(1, (4, 20)).transpose(0, 1)[None]
    back = codec.decode(codec.encode(heads, None), 4)[0].transpose(0, 1).flatten(1)
    got = float((back - rows[:3200]).double().square().sum(1).mean())
    assert got == pytest.approx(best, rel=0.08)


def test_components_without_bits_are_not_kept(stats_of):
    fitted = KVTC(budget=0.05).fit_layer(stats_of(SMALL))
    for kv in ("key", "value"):
        assert (fitted[f"{kv}_widths"] > 0).all()
        assert fitted[f"{kv}_up"].shape[1] == 16 * len(fitted[f"{kv}_widths"]) < 80


def test_the_transfer_form_is_smaller_and_the_same(stats_of, tmp_path):
    """Lloyd-Max codes are not all as likely: a 4-bit code has an entropy of 3.8 bits, and DEFLATE finds some of it."""
    method = KVTC(budget=0.25, widths=(4,))
    fitted = method.fit_layer(stats_of(SMALL))
    cache = make(method, SMALL, [fitted])
    keys, values = (torch.randn(2, 4, 4000, 20) * 3).bfloat16()[:, None]
    feed(cache, [keys], [values])
    cache.save(tmp_path / "plain")
    cache.save(tmp_path / "small", deflate=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("plain", "small")]
    assert sizes[1] < 0.97 * sizes[0]
    loaded = make(method, SMALL, [fitted]).load(tmp_path / "small").state_dict()
    assert all(torch.equal(loaded[k], t) for k, t in cache.state_dict().items())


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget=0.0 is not possible. Use a share of bytes above 0, up to 1."),
        ({"budget": 2}, "budget=2 is not possible. Use a share of bytes above 0, up to 1."),
        ({"widths": ()}, "widths=() is not possible. Use some of 1, 2, 3, 4, 8."),
        ({"widths": (5,)}, "widths=(5,) is not possible. Use some of 1, 2, 3, 4, 8."),
        ({"sinks": -1}, "sinks=-1 is not possible. Use 0 or more tokens."),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
        KVTC(**settings)


def test_a_budget_without_a_group_names_one_that_is_enough(stats_of):
    with pytest.raises(
        SettingError, match=r"^budget=0\.02 leaves the keys no group of components\. Use .* or more\.$"
    ) as e:
        KVTC(budget=0.02).fit_layer(stats_of(SMALL))
    named = float(re.search(r"Use ([\d.]+) or more", str(e.value)).group(1))
    fitted = KVTC(budget=named).fit_layer(stats_of(SMALL))
    assert fitted["key_widths"].tolist() == fitted["value_widths"].tolist() == [2]
    with pytest.raises(SettingError):
        KVTC(budget=named * 0.99).fit_layer(stats_of(SMALL))
