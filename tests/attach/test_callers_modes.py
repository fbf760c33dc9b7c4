"""Ways of running an attached model: autocast, torch.compile, offload, another attention, training, a used cache."""

import accelerate
import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kvshrink
from kvshrink import CSKV, RTN
from kvshrink.attach.attention import NAME
from kvshrink.errors import CacheError, UnsupportedModelError
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from tests.attach.test_attach import filled, hooks, logits, untouched
from tests.scenarios.families import FAMILIES
from tests.scenarios.scenarios import generate, tokens

METHOD = RTN(bits=None, window=8)


@pytest.fixture
def model() -> hf.PreTrainedModel:
    return FAMILIES["llama"].build()


# --- autocast ---


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_is_as_with_a_full_cache(family, dtype, kind):
    """As far from DynamicCache as that is from float32; the cache is made outside, inside, or used in turn."""
    model, ids = FAMILIES[family].build().to(dtype), tokens(2, 120)
    exact = logits(FAMILIES[family].build(), DynamicCache(config=model.config), ids)
    with torch.autocast("cpu", dtype=kind):
        theirs = logits(model, DynamicCache(config=model.config), ids)
        cache = kvshrink.make_cache(model, METHOD)
        ours = logits(model, cache, ids)
    assert cache.report().held.payload > 0
    noise = (theirs.float() - exact).std()
    assert (ours.float() - exact).std() < 1.5 * noise
    if family != "gemma2":  # and outside again, which sliding layers of transformers cannot
        assert logits(model, cache, ids[:, :3]).isfinite().all()


@pytest.mark.parametrize("bits", [2, 4])
def test_codecs_do_not_see_autocast(model, bits):
    """Their scales are in float16, which autocast on a CPU does not know."""
    ids, model = tokens(2, 120), model.to(torch.bfloat16)
    fitted = kvshrink.fit(model, CSKV(keep=0.5, bits=bits, window=8), tokens(4, 64), progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = kvshrink.fit(model, CSKV(keep=0.5, bits=bits, window=8), tokens(4, 64), progress=False)
        for method in (RTN(bits=bits, window=8), fitted):
            cache = kvshrink.make_cache(model, method)
            assert logits(model, cache, ids).isfinite().all()
            cache.crop(-50)
    for layer, tensors in fitted.layers.items():
        assert all(torch.equal(t, again.layers[layer][name]) for name, t in tensors.items())


# --- weights that are not there ---


def test_offloaded_weights_are_refused(model, tmp_path):
    uses = [
        kvshrink.attach,
        lambda m: kvshrink.make_cache(m, METHOD),
        lambda m: kvshrink.fit(m, CSKV(keep=0.5, window=8), tokens(4, 64)),
    ]
    cpu = accelerate.cpu_offload(FAMILIES["llama"].build(), torch.device("cpu"))
    disk = accelerate.disk_offload(FAMILIES["llama"].build(), tmp_path, torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    some = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "some")
    with torch.device("meta"):
        never = hf.LlamaForCausalLM(model.config)
    for offloaded in (cpu, disk, some, never):
        for use in uses:
            with pytest.raises(UnsupportedModelError, match="weights of LlamaForCausalLM are not in memory"):
                use(offloaded)
        assert untouched(offloaded)


def test_a_dispatched_model_without_offload_is_right(model):
    ids = tokens(1, 60)
    wanted = generate(model, ids, DynamicCache(config=model.config))
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(generate(model, ids, kvshrink.make_cache(model, METHOD)), wanted)
    kvshrink.detach(model)
    assert torch.equal(generate(model, ids, DynamicCache(config=model.config)), wanted)


# --- torch.compile ---


def test_a_compiled_model_is_right():
    """Its attention, that is, since the rest knows no cache; compiled before attach, and used on after detach."""
    model, ids = FAMILIES["mistral"].build(), tokens(1, 60)
    wanted = logits(model, DynamicCache(config=model.config), ids)
    torch._dynamo.reset()
    model.model.layers[0].self_attn.compile(backend="eager")
    full = DynamicCache(config=model.config)
    torch.testing.assert_close(logits(model, full, ids[:, :50]), wanted[:, :50])
    cache = kvshrink.make_cache(torch.compile(model, backend="eager"), METHOD)
    torch.testing.assert_close(logits(model, cache, ids), wanted, atol=1e-4, rtol=0)
    assert cache.report().held.payload > 0
    kvshrink.detach(model)
    assert not hooks(model)
    torch.testing.assert_close(logits(model, full, ids[:, 50:]), wanted[:, 50:])


def test_a_graph_without_breaks_is_possible_for_other_caches_only():
    model, ids = FAMILIES["mistral"].build(), tokens(1, 60)
    cache = kvshrink.make_cache(model, METHOD)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Use fullgraph=False"):
            compiled(ids, past_key_values=cache)


# --- another attention, and other ways to run ---


def test_another_attention_chosen_after_attach(model, monkeypatch):
    ids = tokens(1, 120)
    wanted = logits(model, DynamicCache(config=model.config), ids)
    for name in ("eager", "sdpa", NAME, "eager"):
        cache = kvshrink.make_cache(model, METHOD)
        model.set_attn_implementation(name)
        torch.testing.assert_close(logits(model, cache, ids), wanted, atol=2e-4, rtol=0)
    kvshrink.detach(model)
    assert untouched(model, "eager")
    cache = kvshrink.make_cache(model, METHOD)
    torch.testing.assert_close(logits(model, cache, ids), wanted, atol=2e-4, rtol=0)
    model.set_attn_implementation("flex_attention")
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", lambda *_, **__: None)
    with pytest.raises(CacheError, match=r"'flex_attention' was chosen after attach.* Choose 'sdpa'\."):
        model(ids[:, :1], past_key_values=cache)
    kvshrink.detach(model)
    assert untouched(model, "flex_attention")


def test_our_attention_may_be_chosen_again(model):
    ids = tokens(1, 120)
    kvshrink.attach(model)
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
    cache = kvshrink.make_cache(model, StreamingLLM(window=8))
    assert logits(model, cache, ids).isfinite().all()
    kvshrink.detach(model)
    assert untouched(model)


def test_continuous_batching_says_what_to_do(model):
    kvshrink.attach(model)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=1, pad_token_id=0)
    with pytest.raises(ValueError, match=r"kvshrink\.detach\(model\)") as error:
        model.generate_batch(inputs=[tokens(1, 10)[0].tolist()], generation_config=settings, progress_bar=False)
    assert "\n" not in str(error.value)


def gradients(model, ids: Tensor, cache=None) -> Tensor:
    model.zero_grad()
    model(ids, labels=ids, past_key_values=cache).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("implementation", [NAME, "sdpa"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_gradients_are_right_or_refused(model, implementation, mode):
    """Right for a prompt, as long as attention sees what the model gave; what is stored has none."""
    model.requires_grad_(True).train()
    ids = tokens(1, 70)
    wanted = gradients(model, ids[:, :60], DynamicCache(config=model.config))
    with mode():
        cache = kvshrink.make_cache(model, METHOD)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(gradients(model, ids[:, :60], cache), wanted)
    loss = model(ids[:, 60:], labels=ids[:, 60:], past_key_values=cache).loss
    assert cache.get_seq_length() == 70, "who asks for no gradient is not disturbed"
    with pytest.raises(CacheError, match="gradients do not pass through a shrunken cache"):
        loss.backward()


@pytest.mark.parametrize("trained", [("",), ("k_proj",), ("v_proj",), ("k_proj", "lm_head")])
@pytest.mark.parametrize("window_bits", [None, 8])
def test_one_token_more_is_refused_gradients_too(model, window_bits, trained):
    """A kernel may read what the window holds: what the new token's keys and values would learn must not be lost."""
    model.set_attn_implementation(NAME)
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(part in name for part in trained))
    ids = tokens(1, 120)
    cache = kvshrink.make_cache(model, RTN(bits=8, window_bits=window_bits))
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    out = model(ids[:, -1:], past_key_values=cache)
    assert cache.get_seq_length() == 120
    with pytest.raises(CacheError, match="gradients do not pass through a shrunken cache"):
        out.logits.sum().backward()
    model.requires_grad_(False)


def test_gradient_checkpointing_refuses_our_cache_alone(model):
    model.requires_grad_(True).train()
    ids = tokens(1, 70)
    model.activation_checkpointing_enable({"use_reentrant": False})
    wanted = gradients(model, ids)
    cache = kvshrink.make_cache(model, METHOD)
    with pytest.raises(CacheError, match=r"gradient checkpointing drops the cache.*model\.eval\(\)"):
        gradients(model, ids, cache)
    torch.testing.assert_close(gradients(model, ids), wanted)
    model.eval()
    torch.testing.assert_close(gradients(model, ids, cache), wanted)


def test_a_default_device_of_the_caller_changes_nothing(model):
    """As `torch.set_default_device` sets it: what we make for a model is where the model is."""
    ids = tokens(1, 120)
    fitted = kvshrink.fit(model, CSKV(keep=1.0, bits=None, window=8), tokens(4, 64), progress=False)
    wanted = logits(model, DynamicCache(config=model.config), ids)
    for method in (METHOD, fitted):
        kvshrink.detach(model)
        with torch.device("meta"):
            cache = kvshrink.make_cache(model, method)
        torch.testing.assert_close(logits(model, cache, ids), wanted, atol=2e-4, rtol=0)


# --- a used cache ---


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_sliding"])
def test_is_initialized_says_what_a_full_cache_says(family):
    model = FAMILIES[family].build()
    caches = [kvshrink.make_cache(model, METHOD), DynamicCache(config=model.config)]
    for cache in caches:
        assert not cache.is_initialized
        logits(model, cache, tokens(1, 60))
        assert cache.is_initialized
        cache.reset()
        assert not cache.is_initialized


@pytest.mark.parametrize("count", [1, 20, 31, 50, 59])
def test_a_shorter_prompt_is_not_read_as_a_continuation(model, count):
    cache = filled(model)
    refused = rf"the cache holds 60 tokens, the prompt has {count}: make a new cache or call reset\(\)"
    with pytest.raises(CacheError, match=refused):
        generate(model, tokens(1, count, seed=3), cache)
    assert cache.get_seq_length() == 60
