"""Records of a rank's heads against those of all heads on one rank, and what cannot be shared out."""

import pytest
import torch

import kvshrink
from kvshrink import CSKV, Spectral
from kvshrink.errors import SettingError
from kvshrink.eval.run.entries import parse
from kvshrink.serve.ranks import of_rank
from kvshrink.serve.records import PageRecords

TEXTS = torch.randint(10, 3000, (4, 256), generator=torch.Generator().manual_seed(1))
SHARDED = {
    "cskv": CSKV(keep=0.5, bits=4),
    "cskv 16": CSKV(keep=0.5, group_heads=1),
    "cskv tcq": CSKV(keep=0.5, codec="tcq", bits=2),
    "accurate": Spectral(budget=0.2, allocation="energy"),
    "balanced": Spectral(budget=0.2, speed="balanced", allocation="energy"),
    "fast": Spectral(budget=0.2, speed="fast", allocation="energy"),
}
QUANTISERS = [
    *("turboquant:bits=4", "turboquant:bits=2", "kivi:bits=2", "rtn:bits=4", "nvfp4", "fp8", "tcq:bits=3", "kvarn"),
    *("saw_int4", "gear", "kitty"),
]


@pytest.fixture(scope="module")
def model():
    return kvshrink.reference_model("float32")[0]


@pytest.mark.parametrize("name", [*SHARDED, *QUANTISERS])
@torch.inference_mode()
def test_a_rank_stores_its_heads_as_one_rank_does(model, name):
    method = (
        parse(name).method
        if name in QUANTISERS
        else kvshrink.fit(model, SHARDED[name], TEXTS, progress=False, shards=2)
    )
    records = PageRecords.of(model, method)
    draw = torch.Generator().manual_seed(0)
    for part in records.alike[:2]:
        h, d = part.shape.heads, part.shape.head_dim
        keys, values = (torch.randn(3, h, 2 * part.page, d, generator=draw) for _ in range(2))
        first = torch.tensor([0, 32, 320])
        want = part.unpack(part.pack(keys, values, first), first)
        sizes = 0
        for rank in range(2):
            own, heads = of_rank(part, rank, 2, records.method), slice(rank * h // 2, (rank + 1) * h // 2)
            packed = own.pack(keys[:, heads], values[:, heads], first)
            assert packed.shape[-1] == own.layout.size
            sizes += own.layout.size
            for x, y in zip(want, own.unpack(packed, first), strict=True):
                assert (x[:, heads] - y).norm() <= 2e-3 * x[:, heads].norm()
        assert part.layout.size <= sizes <= part.layout.size + 64  # whole bytes, and padding


@torch.inference_mode()
def test_a_sharded_artifact_is_saved_and_decodes_as_any(model, tmp_path):
    """Its latents are those of two bases, which fused kernels read as torch does."""
    artifact = kvshrink.fit(model, Spectral(budget=0.2, allocation="energy"), TEXTS, progress=False, shards=2)
    artifact.save_pretrained(tmp_path)
    artifact = kvshrink.Artifact.from_pretrained(tmp_path)
    assert (artifact.method.shards, len(artifact.layers[0]["value_up"])) == (2, 2)
    made = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    logits = []
    for reference in ("0", "1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVSHRINK_REFERENCE", reference)
            cache = kvshrink.make_cache(model, artifact)
            model(TEXTS[:1], past_key_values=cache)
            logits.append(model(TEXTS[:1, :1], past_key_values=cache).logits)
    assert torch.allclose(*logits, atol=0.02 * float(logits[0].abs().max()))
    assert model.generate(TEXTS[:1, :64], past_key_values=kvshrink.make_cache(model, artifact), **made).shape == (1, 88)


def test_what_heads_share_is_refused_in_a_line(model):
    for method, said in (
        (kvshrink.fit(model, Spectral(budget=0.2, allocation="energy"), TEXTS, progress=False), "shards=2"),
        (kvshrink.fit(model, CSKV(keep=0.5), TEXTS, progress=False), "shards=2"),
    ):
        records = PageRecords.of(model, method)
        with pytest.raises(SettingError, match=said):
            of_rank(records.alike[0], 0, 2, records.method)
    records = PageRecords.of(model, parse("turboquant").method)
    with pytest.raises(SettingError, match="divisor"):
        of_rank(records.alike[0], 0, 3, records.method)


@pytest.mark.parametrize("shards", [0, 3])
def test_shards_that_heads_cannot_be_shared_out_to(model, shards):
    with pytest.raises(SettingError, match="shards="):
        kvshrink.fit(model, CSKV(keep=0.5), TEXTS, progress=False, shards=shards)
    with pytest.raises(SettingError, match="shards="):
        Spectral(budget=0.2, shards=0)


def test_only_methods_with_bases_take_shards(model):
    with pytest.raises(SettingError, match="palu"):
        kvshrink.fit(model, kvshrink.methods.get("palu")(), TEXTS, progress=False, shards=2)


def test_the_budget_that_is_named_is_enough(model):
    """A group of channels is one of each basis: two of them with two shards."""
    for shards in (1, 2):
        with pytest.raises(SettingError, match=r"Use (\S+) or more") as found:
            kvshrink.fit(model, Spectral(budget=1e-5, allocation="energy"), TEXTS, progress=False, shards=shards)
        named = float(str(found.value).split("Use ")[1].split()[0])
        kvshrink.fit(model, Spectral(budget=named, allocation="energy"), TEXTS, progress=False, shards=shards)


@pytest.mark.parametrize("settings", [{"key_share": "auto"}, {"group_heads": 2}])
def test_settings_that_do_not_go_with_shards(model, settings):
    with pytest.raises(SettingError, match="shards"):
        kvshrink.fit(model, CSKV(keep=0.5, **settings), TEXTS, progress=False, shards=2)
