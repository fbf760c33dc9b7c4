"""Cases that a review found: a step that failed late, another dtype, other weights, a half-saved artifact."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import CSKV, RTN
from kvshrink.errors import ArtifactError, CacheError, DataError
from kvshrink.store import files

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 256,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture
def rows():
    return torch.randint(0, 61, (2, 128))


@torch.no_grad()
def test_a_step_that_failed_in_the_last_layer_is_noticed(model, rows):
    cache = kvshrink.make_cache(model, RTN())
    weight = model.model.layers[-1].self_attn.v_proj.weight
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(DataError):
        model(rows, past_key_values=cache)
    weight.copy_(kept)
    with pytest.raises(CacheError, match="interrupted"):
        model(rows[:, :1], past_key_values=cache)
    cache.reset()
    model(rows, past_key_values=cache)


def test_an_artifact_fits_the_model_in_every_float_dtype(model, rows):
    artifact = kvshrink.fit(model, CSKV(keep=0.5), rows, progress=False)
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        other = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().to(dtype)
        assert kvshrink.make_cache(other, artifact).get_seq_length() == 0


@torch.no_grad()
def test_a_cache_of_another_dtype_is_not_loaded(model, rows, tmp_path):
    cache = kvshrink.make_cache(model, RTN())
    model(rows, past_key_values=cache)
    cache.save(tmp_path / "c")
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().to(torch.bfloat16)
    with pytest.raises(ArtifactError, match="dtype"):
        kvshrink.make_cache(other, RTN()).load(tmp_path / "c")


def test_a_checkpoint_of_other_weights_is_not_taken(model, rows, tmp_path):
    kvshrink.fit(model, CSKV(keep=0.5), rows, progress=False, checkpoint=tmp_path)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.normal_()
    resumed = kvshrink.fit(model, CSKV(keep=0.5), rows, progress=False, checkpoint=tmp_path)
    wanted = kvshrink.fit(model, CSKV(keep=0.5), rows, progress=False)
    assert torch.equal(resumed.layers[0]["key_up"], wanted.layers[0]["key_up"])


def test_a_failed_description_leaves_the_old_artifact_whole(model, rows, tmp_path, monkeypatch):
    old = kvshrink.fit(model, CSKV(keep=0.5), rows, progress=False)
    old.save_pretrained(tmp_path)

    def full(part):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "json_of", lambda data: full)
    with pytest.raises(ArtifactError, match="No space"):
        kvshrink.fit(model, CSKV(keep=0.25), rows, progress=False).save_pretrained(tmp_path)
    assert kvshrink.Artifact.from_pretrained(tmp_path).method == old.method


def test_auto_key_share_skips_what_leaves_a_side_without_channels(model, rows):
    artifact = kvshrink.fit(model, CSKV(keep=0.08, key_share="auto"), rows, progress=False)
    tried = artifact.provenance["layers"]["0"]["share_errors"]
    assert tried
    assert "0.3" not in tried
