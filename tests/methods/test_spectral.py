import copy
import dataclasses
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import methods
from kvshrink.cache.rope import Rope, as_stored, as_used
from kvshrink.errors import DataError, SettingError
from kvshrink.kernels import native
from kvshrink.kernels.latents import code_of
from kvshrink.kernels.normal import expected_error
from kvshrink.methods._packing import mixed
from kvshrink.methods._packing.mixed import Mixed, group_bytes
from kvshrink.methods._rotate import rotation
from kvshrink.methods._stats import KVS, LayerShape, Parts, Probe
from kvshrink.methods.lowrank import _bits
from kvshrink.methods.lowrank._balance import ROUGH, ROUNDS
from kvshrink.methods.lowrank.spectral import Spectral

SMALL = LayerShape(4, 20, torch.bfloat16)  # 80 channels each: 5 groups
ODD = LayerShape(3, 12, torch.bfloat16)  # 36: two groups and one of 4
WIDTHS = (1, 2, 3, 4, 8)
FORMS = ("normal", "trellis")


# --- where the bytes go ---


def test_fill_is_the_best_of_all_choices():
    """Against every combination of widths: greedy on a convex fall is optimal where the budget is met exactly."""
    energies, sizes = [9.0, 4.0, 1.0, 0.2], [16, 16, 16, 16]
    for budget in (70, 200, 330, 500):
        chosen = _bits.fill(energies, sizes, budget, (1, 2, 3, 4), 32, expected_error)
        spent = _bits.cost_of(chosen, sizes, 32)
        assert spent <= budget
        every = itertools.product((0, 1, 2, 3, 4), repeat=4)
        best = min(_bits.error_of(c, energies, expected_error) for c in every if _bits.cost_of(c, sizes, 32) <= spent)
        assert _bits.error_of(chosen, energies, expected_error) == pytest.approx(best, rel=1e-9)


def test_fill_goes_on_to_a_smaller_group_that_still_fits():
    assert _bits.fill([1.0, 0.5], [16, 4], 20, (1,), 32, expected_error) == (0, 1)


def test_share_follows_the_steepest_hull():
    curves = {
        "a": [(0, 10.0), (10, 4.0), (20, 3.0)],  # 0.6 a byte, then 0.1
        "b": [(0, 8.0), (10, 7.9), (20, 4.0), (30, 3.9)],  # 0.2 a byte over a bump, then 0.01
        "c": [(0, 1.0), (10, 2.0)],  # never falls
    }
    assert _bits.share(curves, 10) == {"a": 10, "b": 0, "c": 0}
    assert _bits.share(curves, 25) == {"a": 10, "b": 15, "c": 0}
    assert _bits.share(curves, 30) == {"a": 10, "b": 20, "c": 0}
    assert _bits.share(curves, 45) == {"a": 20, "b": 25, "c": 0}
    assert _bits.share(curves, 999) == {"a": 20, "b": 30, "c": 0}


class Told(Probe):
    """A model to which layer `dear` is worth a thousand times the others, and only its keys: KL is the sum of errors,
    so weighted."""

    def __init__(self, method: Spectral, layers: dict, dear: int) -> None:
        self.layers, self.dear, self.asked, self.known = layers, dear, 0, {}

    def parts(self, codecs, turn) -> Parts:
        self.asked += 1
        costs = {(i, kv): self.cost(i, kv, c) for i in codecs for kv, c in zip(KVS, codecs[i], strict=True)}
        whole = sum(costs.values())
        return Parts(whole, {at: cost / whole for at, cost in costs.items()})

    def cost(self, layer: int, kv: str, codec) -> float:
        energies = [float(part.sum()) for part in self.layers[layer][f"{kv}_variance"].double().split(16)]
        bits = list(codec.packing.bits) + [0] * (len(energies) - len(codec.packing.bits))
        error = sum(e * expected_error(b) for e, b in zip(energies, bits, strict=True)) / sum(energies)
        return error * (1.0 if (layer, kv) == (self.dear, "key") else 0.001)

    def kl(self, codecs):
        raise AssertionError("single losses are not asked for")

    @property
    def tokens(self):
        raise AssertionError("nor are tokens judged")

    def fisher(self):
        raise AssertionError("nor is Fisher information")

    def near(self, budget):
        return budget

    def once(self, key, measure):
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]


@pytest.fixture
def three(stats_of):
    """Three layers as fit_layer leaves them, whose variances fall by layer."""
    return lambda method: {i: method.fit_layer(stats_of(SMALL)) for i in range(3)}


def held(method: Spectral, layers: dict, shapes: dict) -> list[float]:
    """Bytes a page of keys and of values."""
    return [c.page_bytes() for i in layers for c in method.codecs(shapes[i], layers[i])]


def test_bytes_go_where_the_model_says(three):
    method = Spectral(budget=0.03)
    layers, shapes = three(method), dict.fromkeys(range(3), SMALL)
    done, record = method.finish(layers, shapes, Told(method, layers, dear=1))
    sizes = held(method, done, shapes)
    assert sizes[2] == max(sizes)
    assert sizes[2] > 0.6 * sum(sizes)
    assert record["widths"]["1 key"] != record["widths"]["0 key"]


@pytest.mark.parametrize("allocation", ["kl", "energy", "uniform"])
@pytest.mark.parametrize("kept", [0.02, 0.0625, 0.2, 0.45])
def test_all_layers_together_hold_the_budget(three, allocation, kept):
    method = Spectral(budget=kept, allocation=allocation)
    layers, shapes = three(method), dict.fromkeys(range(3), SMALL)
    done, _ = method.finish(layers, shapes, Told(method, layers, 1))
    budget = kept * 3 * SMALL.token_bytes * 32
    spent = sum(held(method, done, shapes))
    assert spent <= budget
    assert spent > budget - 2 * group_bytes(16, 1, 32) - (0.04 * budget if kept > 0.4 else 0)
    if allocation == "uniform":
        sizes = held(method, done, shapes)
        assert max(sizes) - min(sizes) <= 0.5 * max(sizes)


def test_what_is_fitted_holds_only_directions_with_bits(three):
    method = Spectral(budget=0.03)
    layers, shapes = three(method), dict.fromkeys(range(3), SMALL)
    done, _ = method.finish(layers, shapes, Told(method, layers, 1))
    for i in done:
        for kv in ("key", "value"):
            widths, up = done[i][f"{kv}_widths"], done[i][f"{kv}_up"]
            assert (widths > 0).all()
            assert up.shape == (1, 16 * len(widths), 80)
        before = method.codecs(SMALL, {**layers[i], **{f"{s}_widths": _wide(layers, done, i, s) for s in KVS}})
        rows = torch.randn(1, 4, 32, 20)
        for ours, theirs in zip(method.codecs(SMALL, done[i]), before, strict=True):
            torch.testing.assert_close(
                ours.decode(ours.encode(rows, None), 4), theirs.decode(theirs.encode(rows, None), 4)
            )


def _wide(layers, done, i, kv):
    """The widths of all groups; those with bits come first, since directions are in order."""
    widths = torch.zeros(5, dtype=torch.uint8)
    widths[: len(done[i][f"{kv}_widths"])] = done[i][f"{kv}_widths"]
    return widths


def test_methods_that_share_bytes_alike_ask_once(three):
    """How channels are turned changes no byte; another budget is another question, unless the probe may be rough."""
    method = Spectral(budget=0.03)
    layers, shapes = three(method), dict.fromkeys(range(3), SMALL)
    probe = Told(method, layers, 1)
    method.finish(layers, shapes, probe)
    assert probe.asked == ROUNDS
    dataclasses.replace(method, rotate=False).finish(layers, shapes, probe)
    assert probe.asked == ROUNDS
    dataclasses.replace(method, budget=0.035).finish(layers, shapes, probe)
    assert probe.asked == 2 * ROUNDS
    dataclasses.replace(method, key_metric="query").finish(layers, shapes, probe)
    dataclasses.replace(method, budget=0.9).finish(layers, shapes, probe)  # more than it can use
    assert probe.asked == 4 * ROUNDS
    probe.near = lambda budget: 300.0
    for budget in (0.03, 0.035):
        done, _ = dataclasses.replace(method, budget=budget).finish(layers, shapes, probe)
        spent = sum(held(method, done, shapes))
        assert budget - 0.006 < spent / (3 * SMALL.token_bytes * 32) <= budget
    assert probe.asked == 4 * ROUNDS + ROUGH


@pytest.mark.parametrize("budget", ["0.0005", "1e-05"])
@pytest.mark.parametrize("allocation", ["kl", "energy", "uniform"])
def test_a_budget_below_one_group_is_refused(three, allocation, budget):
    method = Spectral(budget=float(budget), allocation=allocation)
    layers, shapes = three(method), dict.fromkeys(range(3), SMALL)
    with pytest.raises(SettingError, match=rf"^budget={budget} is less than one group .* Use 0\.\d+ or more\.$"):
        method.finish(layers, shapes, Told(method, layers, 1))


# --- what is stored ---


@pytest.mark.parametrize("shape", [SMALL, ODD], ids=["80", "36"])
def test_error_is_what_the_widths_promise(stats_of, shape):
    """Golden source: the eigenvalues of the covariance, and the errors of each code of a normal number."""
    n = shape.width
    mixing = torch.randn(n, n, generator=torch.Generator().manual_seed(5)) * torch.linspace(3, 0.01, n)
    rows = torch.randn(32 * 200, n, generator=torch.Generator().manual_seed(6)) @ mixing.T + 2
    stats = stats_of(shape, keys=rows, values=rows)
    values = torch.linalg.eigvalsh(rows.double().T.cov(correction=0)).flip(0)
    for rotate, code in ((True, "scalar"), (False, "scalar"), (True, "trellis")):
        method = Spectral(budget=0.15, allocation="energy", rotate=rotate, code=code)
        fitted = method.fit_layer(stats)
        for codec, side in zip(method.codecs(shape, fitted), KVS, strict=True):
            widths = fitted[f"{side}_widths"].tolist()
            sizes = [16] * (n // 16) + ([n % 16] if n % 16 else [])
            parts = values.split(sizes)
            wanted = sum(float(p.sum()) * method.error(w) for p, w in zip(parts, widths, strict=True))
            heads = rows.unflatten(1, (shape.heads, -1)).transpose(0, 1)[None]
            back = codec.decode(codec.encode(heads, None), shape.heads)
            got = float((back - heads).double().square().sum()) / len(rows)
            assert got == pytest.approx(wanted, rel=0.08)


def test_one_page_holds_all_widths_and_no_more():
    packing = Mixed((16, 16, 16, 4), (8, 3, 3, 1), 32)
    assert packing.page_bytes() == 32 * (16 * 8 + 32 * 3 + 4 * 1) // 8 + 4 * 2
    assert [(b, c.start, c.stop) for b, c in packing.runs()] == [(8, 0, 16), (3, 16, 48), (1, 48, 52)]
    stored = packing.store(torch.randn(2, 1, 64, 52), None)
    assert {k: t.shape for k, t in stored.items()} == {"codes": (2, 2, 1, 912), "gain": (2, 2, 1, 4)}
    assert sum(t.nbytes for t in stored.values()) == 4 * packing.page_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_each_run_comes_back_with_its_own_width(form):
    x = torch.randn(1, 1, 3200, 48)
    packing = Mixed((16, 16, 16), (8, 3, 1), 32, form=form)
    back = packing.load(packing.store(x, None))
    for at, bits in ((0, 8), (16, 3), (32, 1)):
        error = float((back - x)[..., at : at + 16].square().mean())
        assert error == pytest.approx(code_of(form, bits).expected_error(bits), rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_the_gain_follows_louder_text(form):
    """A page a hundred times as loud loses the same share."""
    packing, x = Mixed((16,), (4,), 32, form=form), torch.randn(1, 1, 640, 16)
    for loud in (0.01, 1.0, 100.0):
        back = packing.load(packing.store(x * loud, None))
        assert float((back / loud - x).square().mean()) == pytest.approx(code_of(form, 4).expected_error(4), rel=0.15)
    with pytest.raises(DataError, match="thousands of times"):
        packing.store(x * 1e6, None)


def test_nothing_kept_reads_as_the_mean(stats_of):
    method = Spectral(budget=0.1, allocation="energy")
    fitted = method.fit_layer(stats_of(SMALL))
    fitted["key_widths"] = torch.zeros(5, dtype=torch.uint8)
    codec = method.codecs(SMALL, fitted)[0]
    stored = codec.encode(torch.randn(2, 4, 64, 20), None)
    assert codec.page_bytes() == 0
    want = fitted["key_mean"].unflatten(-1, (4, 20))[:, :, None].expand(2, 4, 64, 20)
    torch.testing.assert_close(codec.decode(stored, 4), want)


@pytest.mark.parametrize("form", FORMS)
def test_straight_through_is_what_is_stored_and_has_a_gradient(form):
    packing, x = Mixed((16, 16), (4, 2), 32, form=form), torch.randn(1, 1, 64, 32, requires_grad=True)
    fake = packing.fake_quantize(x)
    torch.testing.assert_close(fake, packing.load(packing.store(x.detach(), None)))
    fake.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("size", [1, 2, 16, 48, 80, 36])
def test_rotation_is_orthogonal_and_always_the_same(size):
    matrix = rotation(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    assert matrix is rotation(size)
    if size >= 16:
        assert float(matrix.abs().amax()) <= 0.5, "no channel stays by itself"


def test_rotation_spreads_an_outlier(stats_of):
    """Channels of one width, one of them with rare huge values: unrotated, its outliers saturate."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(1, 1, 6400, 16, generator=g)
    spikes = (torch.rand(6400, generator=g) < 0.02) * 7.0
    x[..., 0] = (x[..., 0] * 0.1 + spikes * torch.randn(6400, generator=g).sign()) / 0.995
    packing, matrix = Mixed((16,), (3,), 32), rotation(16)
    plain = (packing.load(packing.store(x, None)) - x).square().mean()
    rotated = (packing.load(packing.store(x @ matrix, None)) @ matrix.T - x).square().mean()
    assert float(rotated) < 0.9 * float(plain)


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, r"budget=0\.0 is not possible\. Use a share of bytes above 0, up to 1\."),
        ({"budget": 1.5}, r"budget=1\.5 is not possible\. .*"),
        ({"budget": True}, r"budget=True is not possible\. Use a number\."),
        ({"widths": ()}, r"widths=\(\) is not possible\. Use some of 1, 2, 3, 4, 8\."),
        ({"widths": (2, 5)}, r"widths=\(2, 5\) is not possible\. .*"),
        ({"allocation": "best"}, r"allocation='best' is not possible\. Use one of \('kl', 'energy', 'uniform'\)\."),
        ({"key_metric": "output"}, r"key_metric='output' is not possible\. Use 'plain' or 'query'\."),
        ({"value_metric": "query"}, r"value_metric='query' is not possible\. Use 'plain' or 'output'\."),
        ({"rotate": 1}, r"rotate=1 is not possible\. Use True or False\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    method = Spectral()
    for name, value in settings.items():
        object.__setattr__(method, name, value)
    with pytest.raises(SettingError, match=f"^{message}$"):
        method.check()


def test_only_measured_allocation_needs_the_model():
    assert Spectral().probes
    assert not Spectral(allocation="energy").probes
    assert not Spectral(allocation="uniform").probes


def test_promise_before_the_fit_is_the_budget():
    shape = LayerShape(8, 128, torch.bfloat16)
    assert Spectral(budget=0.0625).bits_per_token(shape, {}) == 0.0625 * shape.token_bytes * 8
    most = Spectral(budget=1.0).bits_per_token(shape, {})  # 8 bits and a gain each
    assert most == 2 * 64 * group_bytes(16, 8, 32) * 8 / 32
    assert methods.build("spectral", {"budget": 0.1}) == Spectral(budget=0.1)
    assert mixed.GAIN_BYTES == 2


# --- a basis for some heads ---


@pytest.mark.parametrize(
    ("settings", "bases"),
    [({"group_heads": 1}, 4), ({"group_heads": 2}, 2), ({"speed": "balanced"}, 1), ({"speed": "fast"}, 4)],
)
def test_every_speed_has_the_bytes_it_promises_and_is_read_by_the_kernel(settings, bases):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=97, num_attention_heads=4, head_dim=32,
        num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(3, 97, (2, 300), generator=torch.Generator().manual_seed(1))
    method = Spectral(budget=0.4, allocation="energy", **settings)
    cache = kvshrink.make_cache(model, kvshrink.fit(model, method, ids, progress=False))
    first = model(ids, past_key_values=cache).logits
    assert cache.layers[0].codecs[0].up.shape[0] == bases
    assert cache.layers[0].codecs[1].up.shape[0] == 1
    held = cache.report().held
    tokens, layers = 256, 2  # of each row, that have left the window
    assert held.payload + held.metadata <= 0.4 * 2 * tokens * layers * cache.layers[0].shape.token_bytes
    assert native.library() is None or str(cache.layers[0].body.view(None)[0].kernel) == "yes"
    step = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    other = copy.deepcopy(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVSHRINK_REFERENCE", "1")
        assert torch.allclose(model(ids[:, :1], past_key_values=cache).logits, step, atol=1e-4)
    model.set_attn_implementation("eager")  # which is given keys at full width
    assert torch.allclose(model(ids[:, :1], past_key_values=other).logits, step, atol=1e-4)
    assert first.isfinite().all()


@pytest.mark.parametrize("code", ["trellis", "scalar"])
def test_fast_keys_are_never_rebuilt_and_lose_what_the_widths_promise(stats_of, code):
    """Scores are products with the latents, and what all keys have in common times the query."""
    method, shape = (
        Spectral(budget=0.2, allocation="energy", speed="fast", code=code),
        LayerShape(4, 32, torch.bfloat16),
    )
    g = torch.Generator().manual_seed(3)
    keys = torch.randn(32 * 100, 128, generator=g) @ torch.randn(128, 128, generator=g) + 20
    fitted = method.fit_layer(stats_of(shape, keys, keys))
    codec = method.codecs(shape, fitted)[0]
    assert codec.site == "k_post"
    assert codec.expansion is None
    rope, positions = Rope(1e4 ** (-torch.arange(0, 31, 2) / 32), 1.0, False), torch.arange(len(keys))[None]
    used = rope.apply(keys.unflatten(1, (4, 32)).transpose(0, 1)[None], positions)
    rows = as_stored(codec, used, positions, rope)
    query, stored = torch.randn(1, 4, 3, 32, generator=g), codec.encode(rows, None)
    back = codec.decode(stored, 4)
    common = query @ as_used(codec, torch.zeros_like(used), positions, rope).mT
    direct = query @ as_used(codec, back, positions, rope).mT
    torch.testing.assert_close(codec.absorb(query) @ codec.unpack(stored).mT + common, direct, rtol=1e-3, atol=5e-2)
    assert rows.square().sum() < 0.5 * used.square().sum()
    parts = fitted["key_variance"].double().view(4, 32).split(16, 1)
    wanted = sum(float(p.sum()) * method.error(w) for p, w in zip(parts, fitted["key_widths"].tolist(), strict=True))
    assert float((back - rows).square().sum()) / len(keys) == pytest.approx(wanted, rel=0.1)


def test_settings_of_speed_that_do_not_go_together_are_refused():
    with pytest.raises(
        SettingError, match=r"^speed='balanced' with group_heads=2 is not possible\. Give one of them\.$"
    ):
        Spectral(speed="balanced", group_heads=2)
    with pytest.raises(SettingError, match=r"^speed='fast' with key_metric='query' .* Use 'plain'\.$"):
        Spectral(speed="fast", key_metric="query")


def test_a_number_of_heads_that_does_not_divide_is_refused():
    with pytest.raises(SettingError, match="group_heads=3 with 4 KV heads"):
        Spectral(group_heads=3).bits_per_token(LayerShape(4, 16, torch.float32), {})
