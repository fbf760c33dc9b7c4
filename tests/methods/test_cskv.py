import dataclasses
import re

import pytest
import torch

from kvshrink import methods
from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank.cskv import CSKV

LLAMA2 = LayerShape(32, 128, torch.bfloat16)
LLAMA31 = LayerShape(8, 128, torch.bfloat16)
SMALL = LayerShape(4, 8, torch.float32)


@pytest.mark.parametrize(
    ("settings", "shape", "ranks"),
    [
        ({"keep": 0.2}, LLAMA2, (819, 819)),  # .2 * 4096 = 819.2: always rounded down
        ({"keep": 0.2}, LLAMA31, (204, 204)),
        ({"keep": 1.0}, LLAMA31, (1024, 1024)),
        ({"keep": 0.29}, LayerShape(1, 100, torch.float32), (29, 29)),  # .29 * 100 is 28.999.. in floating point
        ({"keep": 0.2, "key_share": 0.3}, LLAMA31, (122, 286)),  # 409.6 channels, 122.88 and 286.72 of them
        ({"keep": 0.2, "key_share": 0.7}, LLAMA31, (286, 122)),
        ({"keep": 0.8, "key_share": 0.9}, LayerShape(1, 100, torch.float32), (100, 60)),  # keys take 100 of 144
        ({"keep": 0.8, "key_share": 0.1}, LayerShape(1, 100, torch.float32), (60, 100)),
        ({"keep": 0.2, "key_share": "auto"}, LLAMA31, (204, 204)),  # half, before `fit` chooses
        ({"keep": 0.2, "group_heads": 2}, LLAMA31, (51, 204)),  # 4 groups of 256: 51.2 each
        ({"keep": 0.2, "group_heads": 1}, LLAMA31, (25, 204)),
    ],
)
def test_rank_rule(settings, shape, ranks):
    assert CSKV(**settings).ranks(shape) == ranks


def test_key_share_given_by_fit_wins():
    assert CSKV(keep=0.2, key_share="auto").ranks(LLAMA31, 0.3) == CSKV(keep=0.2, key_share=0.3).ranks(LLAMA31)


@pytest.mark.parametrize("keep", [0.07, 0.2, 0.5, 0.93])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_ranks_never_exceed_the_share_kept(keep, share):
    key, value = CSKV(keep=keep, key_share=share).ranks(LLAMA31)
    assert 2 * keep * 1024 - 2 < key + value <= 2 * keep * 1024 + 1e-3
    assert max(key, value) <= 1024


def test_bits_by_hand():
    # 204 channels each; keys: a 32-bit scale pair per channel and page of 32; values: 4 pairs per token
    assert CSKV(keep=0.2).bits_per_token(LLAMA31, {}) == 2 * 204 * 16
    assert CSKV(keep=0.2, bits=4).bits_per_token(LLAMA31, {}) == 2 * 204 * 4 + 204 * 32 / 32 + 4 * 32
    assert CSKV(keep=0.2, bits=3).bits_per_token(LLAMA31, {}) == 2 * 204 * 3 + 204 * 32 / 32 + 4 * 32


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"group_heads": 2}, {"key_share": 0.3, "bits": 3}], ids=str)
@pytest.mark.parametrize("init", ["pca", "asvd", "svd", "random"])
def test_promise_before_fit_is_the_promise_after(settings, init, stats_of):
    method = CSKV(keep=0.5, init=init, **settings)
    fitted = method.fit_layer(stats_of(SMALL))
    assert method.bits_per_token(SMALL, {}) == method.bits_per_token(SMALL, fitted)


def test_paper():
    paper = CSKV.paper()
    assert (paper.keep, paper.bits, paper.init, paper.window, paper.sinks) == (0.2, 4, "asvd", 32, 0)
    assert (paper.steps, paper.qat, paper.group_heads, paper.key_share) == (12_000, True, None, 0.5)
    assert (paper.loss, paper.matryoshka) == ("rows", False)
    assert not CSKV.paper(bits=None).qat


# --- closed forms ---


def through(method: CSKV, stats, rows: torch.Tensor, kv: int) -> torch.Tensor:
    """Rows [t, n] encoded and decoded."""
    shape = stats.shape
    codec = method.codecs(shape, method.fit_layer(stats))[kv]
    heads = rows.unflatten(1, (shape.heads, -1)).transpose(0, 1)[None]
    return codec.decode(codec.encode(heads, None), shape.heads)[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("kv", [0, 1])
def test_pca_reaches_the_error_of_the_truncated_svd(stats_of, kv):
    """Golden source: Eckart-Young, the best rank-r error is the tail of the singular values of the centred rows."""
    rows = torch.randn(320, 32) @ torch.randn(32, 32) + 5
    stats = stats_of(SMALL, keys=rows, values=rows)
    method = CSKV(keep=0.3)
    best = torch.linalg.svdvals((rows - rows.mean(0)).double())[9:].norm()
    assert method.ranks(SMALL) == (9, 9)
    got = (through(method, stats, rows, kv) - rows).double().norm()
    torch.testing.assert_close(got, best, rtol=1e-5, atol=0)


def test_group_heads_fits_each_group_by_itself(stats_of):
    rows = torch.randn(320, 32) @ torch.randn(32, 32) + 5
    method = CSKV(keep=0.5, group_heads=2)
    got = (through(method, stats_of(SMALL, keys=rows), rows, 0) - rows).double()
    for block in (slice(0, 16), slice(16, 32)):
        part = rows[:, block].double()
        best = torch.linalg.svdvals(part - part.mean(0))[8:].norm()
        torch.testing.assert_close(got[:, block].norm(), best, rtol=1e-5, atol=0)


def test_heads_of_other_groups_do_not_mix(stats_of):
    stats, rows = stats_of(SMALL), torch.randn(32, 32)
    method, changed = CSKV(keep=0.5, group_heads=1), rows.clone()
    changed[:, :8] += 3  # the first head alone
    difference = through(method, stats, changed, 0) - through(method, stats, rows, 0)
    assert difference[:, :8].abs().max() > 0.1
    assert difference[:, 8:].abs().max() < 1e-6


@pytest.mark.parametrize("init", ["asvd", "svd"])
@pytest.mark.parametrize("kv", [0, 1])
def test_asvd_is_the_papers_factorisation(stats_of, init, kv):
    """W = A B with A = diag(1/c) U S^.5 and B = S^.5 V^T of diag(c) W, applied to the layer input x."""
    stats = stats_of(SMALL)
    method = CSKV(keep=0.25, init=init)
    fitted, rank = method.fit_layer(stats), method.ranks(SMALL)[kv]
    weight = (stats.key_weight, stats.value_weight)[kv].double().T  # x @ weight is the key or value
    c = (stats.input_scale.double() + 1e-6).sqrt() if init == "asvd" else torch.ones(12, dtype=torch.float64)
    u, s, v = torch.linalg.svd(c[:, None] * weight, full_matrices=False)
    a, b = u[:, :rank] * s[:rank].sqrt() / c[:, None], s[:rank].sqrt()[:, None] * v[:rank]
    x = torch.randn(40, 12, dtype=torch.float64)
    down, up = (fitted[f"{('key', 'value')[kv]}_{part}"][0].double() for part in ("down", "up"))
    latent = x @ weight @ down
    torch.testing.assert_close(latent.abs(), (x @ a).abs(), atol=1e-4, rtol=1e-4)  # a component's sign is free
    torch.testing.assert_close(latent @ up, x @ a @ b, atol=1e-4, rtol=1e-4)


def test_asvd_needs_no_mean_and_pca_needs_no_down(stats_of):
    asvd, pca = (CSKV(keep=0.5, init=init).fit_layer(stats_of(SMALL)) for init in ("asvd", "pca"))
    assert not asvd["key_mean"].any()
    assert pca["key_mean"].any()
    assert "key_down" not in pca, "an orthonormal basis is stored once"


@pytest.mark.parametrize("init", ["pca", "random"])
def test_bases_are_orthonormal(stats_of, init):
    fitted = CSKV(keep=0.5, init=init, group_heads=2).fit_layer(stats_of(SMALL))
    for up in (fitted["key_up"], fitted["value_up"]):
        eye = torch.eye(up.shape[1]).expand(len(up), -1, -1)
        torch.testing.assert_close(up @ up.transpose(1, 2), eye, atol=1e-5, rtol=0)


def test_pca_beats_the_other_starts(stats_of):
    rows = torch.randn(320, 32) @ torch.randn(32, 32) + 5
    stats = stats_of(SMALL, keys=rows)
    inits = ("pca", "svd", "random")
    error = {i: float((through(CSKV(keep=0.3, init=i), stats, rows, 0) - rows).norm()) for i in inits}
    assert error["pca"] < min(error["svd"], error["random"])


@pytest.mark.parametrize(("bits", "most"), [(8, 0.006), (4, 0.1), (3, 0.2), (2, 0.45)])
def test_bits_cost_what_they_should(stats_of, bits, most):
    rows = torch.randn(320, 32) @ torch.randn(32, 32)
    stats = stats_of(SMALL, keys=rows, values=rows)
    for kv in (0, 1):
        plain = through(CSKV(keep=0.5), stats, rows, kv)
        error = float((through(CSKV(keep=0.5, bits=bits), stats, rows, kv) - plain).norm() / plain.norm())
        assert most / 10 < error < most


def test_values_stay_latent_until_after_the_weighted_sum(stats_of):
    """expand(weights @ latent) = weights @ decode, for weights that sum to one: the mean comes back once."""
    stats = stats_of(SMALL)
    for codec in CSKV(keep=0.5, group_heads=2).codecs(SMALL, CSKV(keep=0.5, group_heads=2).fit_layer(stats)):
        stored = codec.encode(torch.randn(2, 4, 64, 8), None)
        latent = codec.unpack(stored)
        weights = torch.rand(2, 4, 3, 64).softmax(-1)
        late = codec.expand(weights @ latent.repeat_interleave(4 // latent.shape[1], 1), 4)
        torch.testing.assert_close(late, weights @ codec.decode(stored, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv", [0, 1])
def test_a_metric_gives_the_least_error_in_that_metric(stats_of, kv):
    """Golden source: Eckart-Young on the rows times the metric's Cholesky factor, another root than ours."""
    rows = torch.randn(320, 32) @ torch.randn(32, 32) + 5
    stats = stats_of(SMALL, keys=rows, values=rows)
    weighted = CSKV(keep=0.3, key_metric="query", value_metric="output")
    metric = torch.diag(stats.query_energy.flatten()) if kv == 0 else torch.block_diag(*stats.output_gram)
    factor = torch.linalg.cholesky(metric)
    best = torch.linalg.svdvals((rows - rows.mean(0)).double() @ factor)[9:].norm()
    error = {m: ((through(m, stats, rows, kv) - rows).double() @ factor).norm() for m in (weighted, CSKV(keep=0.3))}
    torch.testing.assert_close(error[weighted], best, rtol=1e-3, atol=0)  # the ridge costs a little
    assert error[CSKV(keep=0.3)] > 1.01 * best


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0 is not possible\. Use a share of channels above 0, up to 1\."),
        ({"keep": 1.2}, r"keep=1\.2 is not possible\. Use a share of channels above 0, up to 1\."),
        ({"keep": float("nan")}, r"keep=nan is not possible\. Use a share .*"),
        ({"bits": 5}, r"bits=5 is not possible\. Use None or one of \(8, 4, 3, 2\)\."),
        ({"bits": 4.0}, r"bits=4\.0 is not possible\. Use a whole number\."),
        ({"steps": 1.5}, r"steps=1\.5 is not possible\. Use a whole number\."),
        ({"init": "qr"}, r"init='qr' is not possible\. Use one of \('pca', 'asvd', 'svd', 'random'\)\."),
        ({"key_share": 1.0}, r"key_share=1\.0 is not possible\. Use a share between 0 and 1, or 'auto'\."),
        ({"key_share": "half"}, r"key_share='half' is not possible\. Use a number or 'auto'\."),
        ({"group_heads": 0}, r"group_heads=0 is not possible\. Use 1 or more, 'auto', or None for all\."),
        ({"group_heads": "all"}, r"group_heads='all' is not possible\. Use a whole number or 'auto'\."),
        ({"steps": -1}, r"steps=-1, lr=5e-05 is not possible\. Use steps >= 0 and lr > 0\."),
        ({"lr": 0.0}, r"steps=0, lr=0\.0 is not possible\. Use steps >= 0 and lr > 0\."),
        ({"key_metric": "output"}, r"key_metric='output' is not possible\. Use 'plain' or 'query'\."),
        (
            {"value_metric": "output", "init": "asvd"},
            r"value_metric='output' with init='asvd' is not possible\. Use 'pca'\.",
        ),
        ({"qat": True, "bits": 4}, r"qat=True without steps and bits is not possible\. Set both\."),
        ({"qat": True, "steps": 5}, r"qat=True without steps and bits is not possible\. Set both\."),
        ({"loss": "nll", "steps": 5}, r"loss='nll' is not possible\. Use one of \('rows', 'output', 'kl'\)\."),
        ({"loss": "kl"}, r"loss='kl' without steps is not possible\. Set steps\."),
        ({"matryoshka": True}, r"matryoshka=True without steps is not possible\. Set steps\."),
        ({"window": 0}, r"window=0 is not possible\. Use at least 1 token\."),
        ({"sinks": -1}, r"sinks=-1 is not possible\. Use 0 or more tokens\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    method = CSKV()
    for name, value in settings.items():  # the constructor's own types are checked in tests, so not through it
        object.__setattr__(method, name, value)
    with pytest.raises(SettingError, match=f"^{message}$"):
        method.check()


def test_ranks_that_round_to_zero_are_refused():
    with pytest.raises(SettingError, match=r"^keep=0\.01 .* key rank 0 and value rank 0 of 32 channels\. Use keep of "):
        CSKV(keep=0.01).ranks(SMALL)
    with pytest.raises(SettingError, match=r"key rank 0 and value rank 2 .* at least 0\.125\.$"):
        CSKV(keep=0.08, group_heads=1).ranks(SMALL)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, SMALL),
        ({"group_heads": 1}, SMALL),
        ({"key_share": 0.3}, SMALL),
        ({}, LLAMA31),
        ({"key_share": 0.7}, LLAMA2),
    ],
)
def test_the_keep_that_a_refusal_names_is_enough(settings, shape):
    with pytest.raises(SettingError) as refusal:
        CSKV(keep=1e-4, **settings).ranks(shape)
    named = float(re.search(r"at least ([\d.e-]+)\.$", str(refusal.value)).group(1))
    assert min(CSKV(keep=named, **settings).ranks(shape)) >= 1
    with pytest.raises(SettingError):
        CSKV(keep=named * 0.98, **settings).ranks(shape)


def test_group_heads_must_divide_the_heads():
    with pytest.raises(SettingError, match=r"^group_heads=3 with 4 KV heads is not .*\. Use a divisor of the heads\.$"):
        CSKV(group_heads=3).ranks(SMALL)


@pytest.mark.parametrize(
    ("given", "hint"), [("kep", "keep"), ("bit", "bits"), ("grup_heads", "group_heads"), ("zzz", None)]
)
def test_wrong_option_names_the_right_one(given, hint):
    fields = ", ".join(f.name for f in dataclasses.fields(CSKV))
    end = rf" Did you mean '{hint}'\?" if hint else ""
    with pytest.raises(SettingError, match=rf"^cskv has no setting '{given}'\. It has: {fields}\.{end}$"):
        methods.build("cskv", {given: 1})


def test_wrong_name_names_the_right_one():
    with pytest.raises(SettingError, match=r"^no method 'ckv'\. Known: .*\. Did you mean 'cskv'\?$"):
        methods.get("ckv")
