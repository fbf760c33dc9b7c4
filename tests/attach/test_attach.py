"""What attach changes in a model, what it leaves alone, and what is refused before it could give wrong tokens."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvshrink
from kvshrink import CSKV, RTN, KVCache
from kvshrink.attach import attention, look
from kvshrink.attach.asking import ask
from kvshrink.attach.attention import NAME
from kvshrink.attach.projections import output_weight
from kvshrink.errors import ArtifactError, CacheError, SettingError, UnsupportedModelError
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from kvshrink.methods.quant.turboquant import TurboQuant
from tests.scenarios.families import FAMILIES
from tests.scenarios.scenarios import feed, generate, padded_tokens, tokens

METHOD = RTN(bits=None, window=8)


@pytest.fixture
def model() -> hf.PreTrainedModel:
    return FAMILIES["llama"].build()


def filled(model: hf.PreTrainedModel, rows: int = 1, count: int = 60) -> KVCache:
    """A cache that holds tokens, some of them in the body."""
    cache = kvshrink.make_cache(model, METHOD)
    feed(model, tokens(rows, count), cache)
    return cache


def logits(model: hf.PreTrainedModel, cache, ids: Tensor, **settings) -> Tensor:
    """Of a prompt in three parts, so that the cache is read."""
    with torch.no_grad():
        return torch.cat([model(p, past_key_values=cache, **settings).logits for p in ids.split(50, 1)], 1)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def untouched(model: nn.Module, implementation: str = "sdpa") -> bool:
    """No hook, no attribute, and the attention that the model had."""
    marks = [name for m in model.modules() for name in vars(m) if "kvshrink" in name]
    return not hooks(model) and not marks and model.config._attn_implementation == implementation


# --- attach and detach ---


def test_attach_twice_is_attach_once(model):
    first = kvshrink.attach(model)
    count = hooks(model)
    assert kvshrink.attach(model) is first
    kvshrink.make_cache(model, METHOD)
    assert hooks(model) == count > 0
    kvshrink.detach(model)
    assert untouched(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_detach_restores_the_model(model, implementation):
    model.set_attn_implementation(implementation)
    ids = tokens(2, 120)
    before = logits(model, DynamicCache(config=model.config), ids)
    kvshrink.attach(model)
    assert model.config._attn_implementation == NAME
    kvshrink.detach(model)
    assert untouched(model, implementation)
    assert torch.equal(logits(model, DynamicCache(config=model.config), ids), before)


def test_detach_keeps_an_implementation_chosen_meanwhile(model):
    kvshrink.attach(model)
    model.set_attn_implementation("eager")
    kvshrink.detach(model)
    assert untouched(model, "eager")


def test_detach_without_attach_does_nothing(model):
    kvshrink.detach(model)
    assert untouched(model)


def test_attach_again_after_detach(model):
    ids = tokens(2, 120)
    wanted = logits(model, DynamicCache(config=model.config), ids)
    for _ in range(2):
        got = logits(model, kvshrink.make_cache(model, METHOD), ids)
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=0)
        kvshrink.detach(model)
    assert untouched(model)


def test_attached_undoes_itself(model):
    with kvshrink.attached(model) as same:
        assert same is model
        assert not untouched(model)
    assert untouched(model)
    with pytest.raises(RuntimeError, match="from the block"), kvshrink.attached(model):
        raise RuntimeError("from the block")
    assert untouched(model)


def test_attached_leaves_an_attached_model_attached(model):
    attachment = kvshrink.attach(model)
    with kvshrink.attached(model):
        pass
    assert kvshrink.attach(model) is attachment
    assert model.config._attn_implementation == NAME


def test_attention_and_mask_are_both_registered(model):
    """Without the mask function transformers passes no mask, and left padding is ignored."""
    kvshrink.attach(model)
    assert NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert NAME in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    ids, mask = padded_tokens(0, 37)
    together = generate(model, ids, kvshrink.make_cache(model, METHOD), attention_mask=mask)
    alone = generate(model, ids[1:, 37:], kvshrink.make_cache(model, METHOD))
    assert together[1, 37:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2_mixed", "gemma2", "gemma3"])
def test_other_caches_are_not_touched(family):
    model = FAMILIES[family].build()
    ids, mask = padded_tokens(0, 37)

    def run() -> list[Tensor]:
        with torch.no_grad():
            cached = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask)
            return [model(ids, attention_mask=mask, use_cache=False).logits, model(ids).logits, cached]

    before = run()
    kvshrink.attach(model)
    for now, was in zip(run(), before, strict=True):
        assert torch.equal(now, was)


# --- copies, training, dtypes, inputs ---


def test_a_copy_of_an_attached_model_stands_alone(model):
    ids = tokens(1, 100)
    wanted = generate(model, ids, kvshrink.make_cache(model, METHOD))
    count = hooks(model)
    twin = copy.deepcopy(model)
    assert hooks(twin) == count
    assert torch.equal(generate(twin, ids, kvshrink.make_cache(twin, METHOD)), wanted)
    kvshrink.detach(model)
    assert untouched(model)
    assert torch.equal(generate(twin, ids, kvshrink.make_cache(twin, METHOD)), wanted)
    kvshrink.detach(twin)
    assert untouched(twin)


def test_a_copied_cache_holds_no_model(model):
    """Forks are cheap only if the copy drags no weights with it."""
    twin = copy.deepcopy(filled(model))
    ref = weakref.ref(model.model.layers[0].self_attn)
    kvshrink.detach(model)
    model.model.layers[0].self_attn = None
    gc.collect()
    assert twin.nbytes > 0
    assert ref() is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_unaffected(model, checkpointing):
    model.requires_grad_(True).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids, mask = padded_tokens(0, 37)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    assert any(bool(g.any()) for g in before)
    kvshrink.attach(model)
    for now, was in zip(gradients(), before, strict=True):
        assert torch.equal(now, was)


def test_a_model_that_trains_with_dropout_can_be_attached():
    """What attach tries on the model must not be blurred by dropout, nor change the mode or the random numbers."""
    llama = FAMILIES["llama"]
    model = dataclasses.replace(llama, settings={"attention_dropout": 0.3}).build().train()
    state = torch.get_rng_state()
    kvshrink.attach(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model = FAMILIES["qwen3"].build().to(dtype)
    ids = tokens(2, 120)
    theirs = logits(model, DynamicCache(config=model.config), ids)
    cache = kvshrink.make_cache(model, METHOD)
    ours = logits(model, cache, ids)
    assert ours.dtype == dtype
    assert cache.report().held.payload > 0
    # as far apart as rounding the model's own activations to this dtype puts it from float32
    exact = logits(FAMILIES["qwen3"].build(), None, ids[:, :50])
    noise = (theirs[:, :50].float() - exact).std()
    assert (ours.float() - theirs.float()).std() < 2 * noise


def test_a_model_moved_to_another_dtype_needs_a_new_cache(model):
    cache = kvshrink.make_cache(model, METHOD)
    model.to(torch.bfloat16)
    with pytest.raises(CacheError, match=r"made for torch\.float32, the model gives torch\.bfloat16"):
        model(tokens(1, 60), past_key_values=cache)


def test_inputs_embeds_work_as_ids_do(model):
    ids, mask = padded_tokens(0, 37)
    embeds = model.get_input_embeddings()(ids)
    wanted = generate(model, ids, kvshrink.make_cache(model, METHOD), attention_mask=mask)[:, ids.shape[1] :]
    cache = kvshrink.make_cache(model, METHOD)
    got = model.generate(
        inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False
    )
    assert torch.equal(got, wanted)
    assert cache.report().held.payload > 0


@pytest.mark.parametrize("count", [1, 3, 8, 9, 40, 41])
def test_short_prompts(model, count):
    """One token, fewer than sinks or window, and either side of the first page."""
    ids = tokens(2, count)
    wanted = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=6)
    assert torch.equal(generate(model, ids, kvshrink.make_cache(model, METHOD), max_new_tokens=6), wanted)


# --- refused before anything runs ---

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MLA = {
    **TINY,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
}
RECURRENT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "expand": 1}
NO_ROPE = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
BART = {"vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}

INDEXED = {**MLA, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}
REFUSED = [
    pytest.param("MambaForCausalLM", "MambaConfig", RECURRENT, "no attention that caches tokens", id="mamba"),
    pytest.param(
        "DeepseekV32ForCausalLM", "DeepseekV32Config", INDEXED, "which choose what they attend to", id="sparse"
    ),
    pytest.param("BartForCausalLM", "BartConfig", BART, "has cross-attention", id="bart"),
    pytest.param(
        "CodeGenForCausalLM", "CodeGenConfig", {**NO_ROPE, "rotary_dim": 4}, "unknown kind", id="own_attention"
    ),
]


@pytest.mark.parametrize(("model_class", "config_class", "settings", "reason"), REFUSED)
def test_unsupported_models_are_refused_with_a_reason(model_class, config_class, settings, reason):
    model = getattr(hf, model_class)(getattr(hf, config_class)(**settings)).eval()
    before = model.config._attn_implementation
    for use in (kvshrink.attach, lambda m: kvshrink.make_cache(m, METHOD)):
        with pytest.raises(UnsupportedModelError, match=reason):
            use(model)
    assert untouched(model, before)


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|sdpa"])
def test_attention_implementations_that_cannot_be_replaced_are_refused(model, implementation):
    model.config._attn_implementation_internal = implementation
    with pytest.raises(UnsupportedModelError, match=r"is not supported\. Load the model with 'sdpa'"):
        kvshrink.attach(model)
    assert untouched(model, implementation)


# --- refused before it gives wrong tokens ---


def test_a_method_that_needs_a_fit_is_refused_without(model):
    with pytest.raises(SettingError, match="CSKV must be fitted first"):
        kvshrink.make_cache(model, CSKV())


def test_the_artifact_of_another_model_is_refused(model):
    other = FAMILIES["llama"].build(seed=1)
    artifact = kvshrink.fit(other, CSKV(keep=0.5, window=8), tokens(4, 64), progress=False)
    with pytest.raises(ArtifactError, match="Fit one for this model"):
        kvshrink.make_cache(model, artifact)
    assert kvshrink.make_cache(other, artifact).get_seq_length() == 0


def test_the_cache_of_another_model_is_refused(model):
    other = FAMILIES["llama"].build(seed=1)
    kvshrink.attach(other)
    for cache in (kvshrink.make_cache(model, METHOD), filled(model)):
        with pytest.raises(CacheError, match="this cache was made for another model: of this one"):
            other(tokens(1, 4), past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_is_refused_after_detach(family):
    model = FAMILIES[family].build()
    caches = [kvshrink.make_cache(model, METHOD), filled(model)]
    kvshrink.detach(model)
    for cache in caches:
        with pytest.raises(CacheError, match=r"not attached\. Call kvshrink\.attach"):
            model(tokens(1, 4), past_key_values=cache)


def test_empty_input_is_refused(model):
    for cache in (kvshrink.make_cache(model, METHOD), filled(model)):
        seen = cache.get_seq_length()
        with pytest.raises(CacheError, match=f"the input is empty .* while the cache holds {seen}"):
            model(tokens(1, 4)[:, :0], past_key_values=cache)
        with pytest.raises(CacheError, match=r"the input is empty \(0 x 4 tokens\)"):
            model(tokens(1, 4)[:0], past_key_values=cache)
        assert cache.get_seq_length() == seen


def test_new_ids_without_a_mask_are_refused_in_a_later_turn(model):
    """`generate` takes them for all ids so far, and cuts off what the cache seems to hold already."""
    with pytest.raises(CacheError, match="the cache holds 60 tokens, the prompt has 10: make a new cache or"):
        model.generate(tokens(1, 10), past_key_values=filled(model), max_new_tokens=2)


@pytest.mark.parametrize("columns", [5, 60, 64, 66])
def test_a_mask_of_wrong_width_is_refused(model, columns):
    """The cache holds 60 tokens and the input 5: 65 is the one right width."""
    cache = filled(model)
    with pytest.raises(CacheError, match=r"it must be \(1, 65\), one column for every token so far"):
        model(tokens(1, 5), attention_mask=torch.ones(1, columns), past_key_values=cache)
    assert cache.get_seq_length() == 60


def test_a_prepared_mask_of_wrong_width_is_refused(model):
    cache = filled(model)
    mask = torch.ones(1, 1, 5, 60, dtype=torch.bool)
    with pytest.raises(CacheError, match=r"has shape \(1, 1, 5, 60\), but the cache holds 60 tokens"):
        model(tokens(1, 5), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_batch_size_is_refused(model, rows):
    cache = filled(model, rows=2)
    with pytest.raises(CacheError, match=f"the cache holds 2 sequences, the input has {rows}"):
        model(tokens(rows, 5), past_key_values=cache)
    assert cache.get_seq_length() == 60


def test_attention_weights_are_refused_over_a_shrunken_cache(model):
    cache = filled(model)
    with pytest.raises(CacheError, match="Use output_attentions=False"):
        model(tokens(1, 5), past_key_values=cache, output_attentions=True)


def test_a_method_that_drops_tokens_needs_our_attention(model):
    cache = kvshrink.make_cache(model, StreamingLLM(window=8))
    model.set_attn_implementation("sdpa")
    feed(model, tokens(1, 60), cache)
    with pytest.raises(CacheError, match="StreamingLLM drops tokens"):
        feed(model, tokens(1, 65), cache)


def test_a_step_that_broke_off_is_noticed(model):
    """Layers would disagree about the length; the next step says so, and reset makes the cache usable again."""
    cache, ids = filled(model), tokens(1, 100)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[0].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1, 3), past_key_values=cache)
    handle.remove()
    with pytest.raises(CacheError, match=r"a step was interrupted\. Call reset\(\)"):
        model(tokens(1, 1), past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(model, ids, cache), generate(model, ids, kvshrink.make_cache(model, METHOD)))


# --- what fitting reads ---


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "llama_eager"])
def test_queries_and_output_weight_are_those_of_the_module(name, monkeypatch):
    """Queries recomputed and turned are those that attention gets; the output weight gives the module's output."""
    model, seen = FAMILIES[name].build(), {}
    attachment = kvshrink.attach(model)
    dense = attention._dense

    def spy(module, query, *args):
        out = dense(module, query, *args)
        seen[module.layer_idx] = (query, out[0])
        return out

    def after(module, args, kwargs, output):
        seen[module.layer_idx] += (kwargs["hidden_states"], output[0])

    monkeypatch.setattr(attention, "_dense", spy)
    for info in attachment.layers:
        info.module.register_forward_hook(after, with_kwargs=True)
    with torch.no_grad():
        model(tokens(1, 12))
    assert len(seen) == len(attachment.layers)
    for info in attachment.layers:
        query, out, hidden, output = seen[info.module.layer_idx]
        given = look.keywords(model, info.module, info.kind, hidden, torch.arange(12)[None])
        for turned in (True, False) if info.compressed else (True,):
            ours = ask(info.module, given, turned=turned).query
            ours = ours if turned or info.rope is None else info.rope.apply(ours, torch.arange(12)[None])
            torch.testing.assert_close(ours, query, atol=1e-4, rtol=1e-4)
        if info.module.o_proj.bias is None:
            made = torch.einsum("bsqd,xqd->bsx", out, output_weight(info.module, info.value_dim))
            torch.testing.assert_close(made, output, atol=1e-4, rtol=1e-4)


def test_caches_of_one_method_share_codecs_and_let_go_of_them(model):
    method = TurboQuant()
    caches = [kvshrink.make_cache(model, m) for m in (method, method, TurboQuant())]
    codecs = [cache.layers[0].codecs[0] for cache in caches]
    assert codecs[0] is codecs[1] is codecs[2]
    kept = weakref.ref(codecs[0])
    del method, caches, codecs
    gc.collect()
    assert kept() is None
