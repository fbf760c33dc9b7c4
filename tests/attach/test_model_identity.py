"""Which model is it: what makes another one, what does not, and that it is asked for when it matters."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

import kvshrink
from kvshrink import CSKV, RTN, Artifact, KVCache
from kvshrink.attach import identity as identities
from kvshrink.attach import owner as owners
from kvshrink.attach.identity import identity_of, model_key, weights
from kvshrink.errors import ArtifactError, CacheError, UnsupportedModelError
from kvshrink.fit.source import InMemory, OnDisk
from kvshrink.identity import Identity, alike, sketch
from tests.scenarios.families import FAMILIES
from tests.scenarios.scenarios import tokens

# PEFT asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHOD = RTN(bits=4, window=8)
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CONFIG = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def model() -> hf.PreTrainedModel:
    return FAMILIES["llama"].build()


def other(model: nn.Module, than: nn.Module | Identity) -> str | None:
    """How a model differs from another one."""
    return (than if isinstance(than, Identity) else identity_of(than)).difference(identity_of(model))


@torch.no_grad()
def more(model: nn.Module, cache: KVCache, count: int = 20) -> None:
    """Another turn of so many tokens."""
    model(input_ids=tokens(1, count, seed=count), past_key_values=cache)


def wrapped(model: nn.Module, size: float = 0.3, name: str = "default", peft: nn.Module | None = None) -> nn.Module:
    """The model under a LoRA whose second factor is of this size."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        if peft is None:
            peft = get_peft_model(model, LoraConfig(**CONFIG), adapter_name=name)
        else:
            peft.add_adapter(name, LoraConfig(**CONFIG))
        for key, weight in peft.named_parameters():
            if "lora_B" in key and name in key:
                weight.data = size * torch.randn_like(weight)
    return peft.eval()


# --- what makes another model ---


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "olmo2", "phi3"])
def test_every_weight_and_every_norm_counts(family):
    model = FAMILIES[family].build()
    before, tried = identity_of(model), 0
    for name, tensor in weights(model.get_decoder()):
        kept = tensor.clone()
        tensor.data.mul_(1.01)
        assert f"1 of {len(before.weights)} weights have other numbers ({name})" == other(model, before)
        tensor.data.copy_(kept)
        tried += 1
    assert tried == len(before.weights) >= len(list(model.get_decoder().parameters()))
    assert other(model, before) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_noise_of_a_thousandth_is_noticed_in_any_dtype(model, dtype):
    before = identity_of(model)
    for layer in model.get_decoder().layers:
        weight = layer.self_attn.v_proj.weight
        weight.data.add_(torch.randn_like(weight), alpha=1e-3 * float(weight.std()))
    assert other(model.to(dtype), before) is not None


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_dtype_makes_no_other_model(family):
    model = FAMILIES[family].build()
    known = [identity_of(copy.deepcopy(model).to(d)) for d in (torch.float32, torch.bfloat16, torch.float16)]
    assert all(a.difference(b) is None for a in known for b in known)
    assert len({i.digest for i in known}) == 3, "answers depend on it"


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope",
        ),
        ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps|variance_epsilon"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma2", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar|scaling"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("mistral_sliding", {"sliding_window": 8}, "sliding_window"),
        ("olmo", {"clip_qkv": 2.0}, "clip_qkv"),
    ],
)
def test_the_same_weights_with_another_setting_are_another_model(family, settings, named):
    model = FAMILIES[family].build()
    config = type(model.config)(**{**model.config.to_dict(), **settings})
    twin = type(model)(config)
    twin.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError, match=named):
        assert other(twin, model) is None, other(twin, model)


def test_a_number_changed_in_a_module_is_another_model(model):
    before = identity_of(model)
    model.get_decoder().layers[1].self_attn.scaling *= 2
    assert "modules' scaling is" in other(model, before)


def test_what_does_not_change_keys_makes_no_other_model(model):
    before = identity_of(model)
    model.config.update({"use_cache": False, "max_position_embeddings": 9999, "attention_dropout": 0.1, "note": 3})
    model.train()
    model.lm_head.weight.data.neg_()
    model.name_or_path = "elsewhere"
    assert other(model, before) is None


def test_the_head_changes_answers(model):
    before = model_key(model)
    model.lm_head.weight.data.mul_(1.01)
    assert model_key(model) != before


def test_quantised_weights_are_compared_as_they_are():
    codes = np.arange(200, dtype=np.uint8)
    assert alike(sketch("uint8", (200,), codes), sketch("uint8", (200,), codes))
    changed = codes.copy()
    changed[7] += 1
    assert not alike(sketch("uint8", (200,), codes), sketch("uint8", (200,), changed))
    assert not alike(sketch("uint8", (200,), codes), sketch("float32", (200,), codes.astype(np.float32)))
    assert not alike(sketch("uint8", (200,), codes), sketch("uint8", (100, 2), codes))


def test_integers_eight_bit_floats_and_complex_numbers_can_be_read():
    net = nn.Module()
    for name, dtype in {"i8": torch.int8, "i32": torch.int32, "f8": torch.float8_e4m3fn, "c": torch.complex64}.items():
        net.register_buffer(name, torch.arange(1, 2001).reshape(50, 40).T.to(torch.float32).to(dtype))
    sampled = dict(identities._sampled(weights(net), None))
    assert set(sampled) == {"i8", "i32", "f8", "c"}
    assert [sampled[k][2].dtype for k in sampled] == [np.uint8, np.uint8, np.uint8, np.float32]


def test_infinite_and_undefined_numbers_are_alike_where_they_are_the_same():
    odd = sketch("float32", (4,), np.array([np.nan, np.inf, -np.inf, 1.0], np.float32))
    assert alike(odd, odd)
    assert not alike(odd, sketch("float32", (4,), np.array([np.nan, -np.inf, -np.inf, 1.0], np.float32)))


def test_places_are_spread_over_rows_and_columns():
    at = identities.places(4096 * 4096, torch.device("cpu"))
    assert len(set(at.tolist())) == identities.SAMPLES
    assert at.min() >= 0
    assert at.max() < 4096 * 4096
    assert min(len(set((at // 4096).tolist())), len(set((at % 4096).tolist()))) > 100
    assert identities.places(7, torch.device("cpu")).tolist() == list(range(7))


# --- wrappers and adapters ---


class Compiled(nn.Module):
    """What torch.compile makes of a module, as far as names go."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_a_wrapper_makes_no_other_model(model):
    before = identity_of(model)
    assert other(model.model, before) is None
    model.model.layers[0] = Compiled(model.model.layers[0])
    assert other(model, before) is None
    assert other(get_peft_model(model, LoraConfig(**CONFIG)), before) is None, "a LoRA that has learnt nothing"


def test_an_adapter_makes_another_model_as_long_as_it_acts(model):
    base = identity_of(model)
    peft = wrapped(model)
    acting = identity_of(peft)
    assert "it has 12 other weights and lacks 0 (layers.0.self_attn.q_proj.adapter.0." in base.difference(acting)
    assert other(model, acting) is None, "the model inside is the same one"
    with peft.disable_adapter():
        assert other(peft, base) is None
    assert other(peft, acting) is None
    wrapped(model, name="second", peft=peft)
    assert other(peft, acting) is None, "one that does not act does not count"
    peft.set_adapter("second")
    assert "weights have other numbers" in other(peft, acting)
    peft.set_adapter("default")
    assert other(peft, acting) is None
    peft.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    assert "scaling" in other(peft, acting)


def test_a_merged_adapter_is_another_model_and_unmerged_the_first_again(model):
    base, peft = identity_of(model), wrapped(model)
    acting = identity_of(peft)
    peft.merge_adapter()
    assert "weights have other numbers" in other(peft, base)
    assert other(peft, acting) is not None
    peft.unmerge_adapter()
    assert other(peft, acting) is None
    merged = peft.merge_and_unload()
    assert "4 of 22 weights have other numbers (layers.0.self_attn.q_proj.weight)" == other(merged, base)


def test_modules_that_peft_trains_whole_count(model):
    base = identity_of(model)
    peft = get_peft_model(model, LoraConfig(**CONFIG, modules_to_save=["mlp"]))
    assert other(peft, base) is None
    for name, weight in peft.named_parameters():
        if "modules_to_save" in name:
            weight.data.mul_(1.1)
    assert "6 of 22 weights have other numbers (layers.0.mlp.gate_proj.weight)" == other(peft, base)
    with peft.disable_adapter():
        assert other(peft, base) is None


# --- where it is asked for ---


def test_an_artifact_is_refused_by_a_model_that_changed_since(model):
    rows = tokens(4, 64)
    artifact = kvshrink.fit(model, CSKV(keep=0.5, window=8), rows, progress=False)
    kvshrink.make_cache(model, artifact)
    state = copy.deepcopy(model.state_dict())
    changes = [
        lambda p: p.data.mul_(1.1),
        lambda p: setattr(p, "data", p.data * 1.1),
        lambda p: p.copy_(p * 1.1),
    ]
    for change in changes:
        change(model.get_decoder().layers[1].mlp.up_proj.weight)
        with pytest.raises(ArtifactError, match=r"of this model 1 of .* have other numbers \(layers\.1\.mlp\.up"):
            kvshrink.make_cache(model, artifact)
        model.load_state_dict(state)
        kvshrink.make_cache(model, artifact)


def test_a_saved_cache_is_refused_by_a_model_that_changed_since(model, tmp_path):
    cache = kvshrink.make_cache(model, METHOD)
    more(model, cache, 60)
    cache.save(tmp_path / "c")
    fresh = kvshrink.make_cache(model, METHOD)
    model.get_decoder().layers[0].self_attn.v_proj.weight.data.mul_(2)
    for late in (fresh, kvshrink.make_cache(model, METHOD)):
        with pytest.raises(ArtifactError, match=r"is of another model: of this one 1 of 22 weights.*v_proj"):
            late.load(tmp_path / "c")
    model.get_decoder().layers[0].self_attn.v_proj.weight.data.div_(2)
    assert fresh.load(tmp_path / "c").get_seq_length() == 60
    more(model, fresh, 5)


def test_a_used_cache_is_refused_when_a_turn_begins_with_a_changed_model(model):
    peft = wrapped(model)
    cache = kvshrink.make_cache(peft, METHOD)
    more(peft, cache, 60)
    more(peft, cache, 20)
    fork = copy.deepcopy(cache)
    for use, start, end in (
        (cache, peft.merge_adapter, peft.unmerge_adapter),
        (fork, peft.base_model.disable_adapter_layers, peft.base_model.enable_adapter_layers),
    ):
        start()
        with pytest.raises(CacheError, match=r"the model has changed since this cache was made: .* Make one with"):
            more(peft, use, 20)
        end()
        more(peft, use, 20)


def test_a_cache_that_holds_nothing_takes_the_model_as_it_is(model):
    cache = kvshrink.make_cache(model, METHOD)
    more(model, cache, 60)
    model.get_decoder().layers[0].self_attn.v_proj.weight.data.mul_(2)
    cache.reset()
    more(model, cache, 60)
    more(model, cache, 60)
    fitted = kvshrink.fit(model, CSKV(keep=0.5, window=8), tokens(4, 64), progress=False)
    cache = kvshrink.make_cache(model, fitted)
    model.get_decoder().layers[0].self_attn.v_proj.weight.data.mul_(2)
    with pytest.raises(CacheError, match="the model has changed since"):
        more(model, cache, 60)


def test_a_copy_of_an_attached_model_is_known_by_its_own_weights(model):
    cache = kvshrink.make_cache(model, METHOD)
    more(model, cache, 60)
    twin = copy.deepcopy(model)
    more(twin, copy.deepcopy(cache), 5)
    twin.get_decoder().layers[0].self_attn.v_proj.weight.data.mul_(2)
    with pytest.raises(CacheError, match="was made for another model: of this one 1 of 22 weights"):
        more(twin, copy.deepcopy(cache), 1)
    more(model, cache, 5)


def test_single_tokens_look_at_nothing(model, monkeypatch):
    cache = kvshrink.make_cache(model, METHOD)
    more(model, cache, 60)
    monkeypatch.setattr(owners, "Glance", None)
    for _ in range(3):
        more(model, cache, 1)


def test_an_artifact_that_does_not_say_its_model_is_refused_in_one_line(model):
    fitted = kvshrink.fit(model, CSKV(keep=0.5, window=8), tokens(4, 64), progress=False)
    whole = fitted.model["identity"]
    sketches = whole["weights"]
    name = next(iter(sketches))
    wrong = [None, "f", 3, [], {}, whole | {"more": 1}, whole | {"weights": []}, whole | {"settings": None}]
    wrong += [whole | {"weights": sketches | {name: text}} for text in (3, "", "a b c", "float32 4 f===", "f 4 fAAA=")]
    for identity in wrong:
        with pytest.raises(ArtifactError, match=r"^the artifact does not say which model it is of \([^\n]+$"):
            kvshrink.make_cache(model, Artifact(fitted.method, fitted.layers, {"name": "m", "identity": identity}))
    with pytest.raises(ArtifactError, match="or of an earlier version"):
        kvshrink.make_cache(model, Artifact(fitted.method, fitted.layers, {"name": "m", "fingerprint": "0" * 16}))
    assert Identity.from_dict(json.loads(json.dumps(whole))) == identity_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_disk_is_the_loaded_one(model, dtype, tmp_path):
    model = model.to(dtype)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    on_disk = OnDisk(tmp_path / "m").identity()
    assert on_disk.weights == InMemory(loaded).identity().weights
    assert on_disk.difference(identity_of(loaded)) is None
    assert on_disk.difference(identity_of(loaded.to(torch.float16))) is None


def test_weights_that_are_not_in_memory_are_refused_in_one_line():
    config = FAMILIES["llama"].build().config
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match=r"^\S+\.weight is not in memory: [^\n]+$"):
        identity_of(model)
