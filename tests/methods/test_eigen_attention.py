import itertools
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink.errors import SettingError
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank._ranks import by_threshold
from kvshrink.methods.lowrank.eigen_attention import EigenAttention

SHAPE = LayerShape(4, 8, torch.float32)


def rows_of(seed: int, decay: float = 0.3) -> torch.Tensor:
    """Rows [tokens, n] whose heads have directions of falling energy, and a mean."""
    g = torch.Generator().manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(4, 8, 8, generator=g)).Q
    spread = torch.exp(-decay * torch.arange(8.0))
    heads = torch.randn(4, 320, 8, generator=g) * spread @ matrix + 0.5
    return heads.transpose(0, 1).flatten(1)


def heads_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(1, (4, -1)).transpose(0, 1)[None]


@pytest.fixture
def three(stats_of):
    """(rows of keys and values of three layers, their stats): spectra that fall at different speeds."""
    rows = [(rows_of(i, 0.1 + 0.3 * i), rows_of(10 + i, 0.7 - 0.3 * i)) for i in range(3)]
    return rows, [stats_of(SHAPE, keys=k, values=v) for k, v in rows]


def finished(method: EigenAttention, stats: list):
    layers = {i: method.fit_layer(f) for i, f in enumerate(stats)}
    return method.finish(layers, {i: f.shape for i, f in enumerate(stats)}, None)


def test_it_is_the_svd_of_the_uncentred_rows(three):
    """Golden source: torch.linalg.svd of all heads' keys in one matrix, and of each head's values."""
    rows, stats = three
    method = EigenAttention(keep=0.5)
    tensors, record = finished(method, stats)
    for i, (keys, values) in enumerate(rows):
        for codec, x, kv in zip(method.codecs(SHAPE, tensors[i]), (keys, values), ("key", "value"), strict=True):
            rank, heads = record["ranks"][f"{i} {kv}"], heads_of(x)[0].double()
            stacked = heads.flatten(0, 1)[None].expand(4, -1, -1) if kv == "key" else heads
            top = torch.linalg.svd(stacked, full_matrices=False).Vh[:, :rank]
            got = codec.decode(codec.encode(heads_of(x), None), 4)[0].double()
            torch.testing.assert_close(got, heads @ top.transpose(1, 2) @ top, rtol=1e-4, atol=1e-4)
            error = (got - heads).square().sum() / (x - x.mean(0)).double().square().sum()
            assert record["layers"][i][f"{kv}_error"] == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("keep", [0.2, 0.45, 0.5, 0.8, 1.0])
def test_every_rank_is_the_least_that_keeps_the_threshold_and_all_fit_the_budget(three, keep, bits):
    rows, stats = three
    method = EigenAttention(keep=keep, bits=bits)
    tensors, record = finished(method, stats)
    for i, pair in enumerate(rows):
        for x, kv in zip(pair, ("key", "value"), strict=True):
            heads, rank = heads_of(x)[0].double(), record["ranks"][f"{i} {kv}"]
            matrices = [heads.flatten(0, 1)] if kv == "key" else list(heads)
            energies = [torch.linalg.svdvals(m).square() for m in matrices]
            kept = [min(float(e[:r].sum() / e.sum()) for e in energies) for r in (rank - 1, rank)]
            assert kept[1] >= record["threshold"] - 1e-6
            assert kept[0] <= record["threshold"] + 1e-6 or rank == 1, "one channel less would keep enough"
    held = sum(method.bits_per_token(SHAPE, t) for t in tensors.values())
    promised = 3 * method.bits_per_token(SHAPE, {})
    most = 4 * (32 if bits is None else 5)  # bits of one more channel of each head: codes and a scale per page
    assert promised - most < held <= promised
    if keep < 1:
        assert len(set(record["ranks"].values())) > 1


def test_no_higher_threshold_fits():
    """Brute force over all thresholds."""
    draw = random.Random(0)
    for _ in range(100):
        operands = draw.randrange(1, 5)
        energies = [[draw.random() + 0.01 for _ in range(draw.randrange(1, 6))] for _ in range(operands)]
        kept = [[0.0, *itertools.accumulate(x / sum(e) for x in e)] for e in energies]
        costs = [[each * r for r in range(len(k))] for k, each in ((k, draw.randrange(1, 4)) for k in kept)]
        budget = draw.randrange(sum(c[1] for c in costs), sum(c[-1] for c in costs) + 1)

        def ranks(threshold: float, kept=kept) -> list[int]:
            return [max(1, next(r for r, x in enumerate(k) if x >= threshold)) for k in kept]

        def cost(found: list[int], costs=costs) -> int:
            return sum(c[r] for c, r in zip(costs, found, strict=True))

        found = by_threshold(kept, costs, budget)
        # above the top of an operand that rounding left below 1 there is nothing to ask for
        asked = sorted(x for k in kept for x in k[1:] if x <= min(k[-1] for k in kept))
        best = max((t for t in asked if cost(ranks(t)) <= budget), default=None)
        assert cost(found) <= budget
        assert found == (ranks(best) if best is not None else [1] * operands)


def test_the_keys_of_all_heads_have_one_basis_held_once(stats_of):
    fitted = EigenAttention().fit_layer(stats_of(SHAPE))
    assert fitted["key_basis"].shape == (1, 8, 8)
    assert fitted["value_basis"].shape == (4, 8, 8)
    key, _ = EigenAttention().codecs(SHAPE, fitted)
    assert key.up.untyped_storage().nbytes() == 8 * 8 * 4


def test_bits_by_hand():
    shape = LayerShape(8, 128, torch.bfloat16)
    assert EigenAttention(keep=0.5).bits_per_token(shape, {}) == 2 * 8 * 64 * 16
    # 51.2 of 256 channels of a head, 25 and 26; keys: a scale pair per channel and page, values: one per token and head
    assert EigenAttention(keep=0.2).ranks(shape) == (25, 26)
    assert EigenAttention(keep=0.2, bits=4).bits_per_token(shape, {}) == 8 * (51 * 4 + 25 + 32)


def test_fitted_to_a_model_it_holds_its_budget():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=61,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = torch.randint(0, 61, (6, 128))
    artifact = kvshrink.fit(model, EigenAttention(keep=0.4), rows, progress=False)
    assert 0 < artifact.provenance["threshold"] < 1
    assert 0 < artifact.provenance["layers"]["2"]["value_error"] < 1
    cache = kvshrink.make_cache(model, artifact)
    with torch.no_grad():
        assert model(input_ids=rows[:1], past_key_values=cache).logits.isfinite().all()
    held = sum(x.held().total for x in cache.layers)
    assert 0.9 < held / (3 * artifact.method.layer_bytes(cache.layers[0].shape, {}, 128)) <= 1
    kvshrink.detach(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0 is not possible\. Use a share of channels above 0, up to 1\."),
        ({"keep": None}, r"keep=None is not possible\. Use a number\."),
        ({"bits": 5}, r"bits=5 is not possible\. Use None or one of \(8, 4, 3, 2\)\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    method = EigenAttention()
    for name, value in settings.items():  # the constructor's own types are checked in tests, so not through it
        object.__setattr__(method, name, value)
    with pytest.raises(SettingError, match=f"^{message}$"):
        method.check()


def test_a_keep_below_one_channel_a_head_is_refused_with_the_least():
    with pytest.raises(SettingError, match=r"^keep=0\.1 of 8 channels .* at least 1/8\.$"):
        EigenAttention(keep=0.1).bits_per_token(SHAPE, {})
    assert EigenAttention(keep=1 / 8).ranks(SHAPE) == (1, 1)
