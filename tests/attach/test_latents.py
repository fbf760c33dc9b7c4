"""MLA: latents are stored, and read as they are; no head's key or value of what left the window is made."""

import copy

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

import kvshrink
from kvshrink import RTN, methods
from kvshrink.attach import check, stage
from kvshrink.cache import latents
from kvshrink.cache.latents import Maker, Pending, hand_over, maker_of, taken
from kvshrink.errors import CacheError, SettingError
from kvshrink.methods.quant.turboquant import TurboQuant
from tests.tiny import build, randomise

LOSSLESS = RTN(bits=None, window=8)


def ids_of(s, seed=7):
    return torch.randint(3, 110, (1, s), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, cache, ids):
    return model(ids, past_key_values=cache).logits


def test_only_exact_tokens_are_expanded(monkeypatch):
    model, seen = build("text", "deepseek_v3"), []
    module = type(model.model.layers[0].self_attn)
    real = module.expand_kv
    monkeypatch.setattr(module, "expand_kv", lambda self, c, k: seen.append(c.shape[2]) or real(self, c, k))
    cache = kvshrink.make_cache(model, LOSSLESS)
    full = DynamicCache(config=model.config)
    read(model, cache, ids_of(300)), read(model, full, ids_of(300))
    seen.clear()
    got = read(model, cache, ids_of(3, 1))
    assert max(seen) <= LOSSLESS.window + LOSSLESS.page + 3
    torch.testing.assert_close(got, read(model, full, ids_of(3, 1)), atol=1e-4, rtol=1e-4)


def test_without_matrices_at_hand_all_is_given_back(monkeypatch):
    """As of weights that are stored as codes."""
    for room in (check, stage):
        monkeypatch.setattr(room, "maker_of", lambda module: None)
    model = build("text", "deepseek_v3")
    cache, full = kvshrink.make_cache(model, LOSSLESS), DynamicCache(config=model.config)
    for ids in (ids_of(200), ids_of(5, 1), ids_of(1, 2)):
        torch.testing.assert_close(read(model, cache, ids), read(model, full, ids), atol=1e-4, rtol=1e-4)


def test_matrices_are_those_that_expand():
    module = build("text", "deepseek_v3").model.layers[0].self_attn
    up = maker_of(module).up
    c, k = torch.randn(1, 1, 5, 32), torch.randn(1, 1, 5, 16)
    keys, values = module.expand_kv(c, k)
    torch.testing.assert_close(torch.einsum("bxtr,qnr->bqtn", c, up.keys), keys[..., :16])
    torch.testing.assert_close(torch.einsum("bxtr,qvr->bqtv", c, up.values), values)
    module.kv_b_proj.weight = torch.nn.Parameter(module.kv_b_proj.weight.mul(9).to(torch.int8), requires_grad=False)
    assert maker_of(module) is None
    assert maker_of(torch.nn.Linear(2, 2)) is None


def test_by_hand():
    """Each head's keys and values made of the latents, and a softmax over all of them."""
    draw = torch.Generator().manual_seed(0)
    model = build("text", "deepseek_v3")
    cache = kvshrink.make_cache(model, RTN(bits=None, window=1, sinks=0))
    read(model, cache, ids_of(64))
    snapshot = cache.layers[0].snapshot(None)
    c, k = cache.layers[0].window.view()
    from kvshrink.cache.attend import rebuild

    latent, key = (x[0, 0] for x in rebuild(snapshot, c, k))
    maker = maker_of(model.model.layers[0].self_attn)
    up = maker.up
    query = torch.randn(1, 4, 1, up.keys.shape[1] + 16, generator=draw)
    got = latents.attend_latents(query, Pending(maker, c, k, snapshot), None, 0.3, None)
    for head in range(4):
        keys = torch.cat([latent @ up.keys[head].T, key], 1)
        weights = (keys @ query[0, head, 0] * 0.3).softmax(0)
        torch.testing.assert_close(got[0, head, 0], weights @ (latent @ up.values[head].T), atol=1e-5, rtol=1e-4)


def test_what_is_left_is_for_one_module_and_once():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    pending = Pending(Maker(a, None), *[torch.zeros(1)] * 2, None)
    hand_over(pending)
    assert taken(b) is None
    assert taken(a) is None, "another module asked in between: the step was interrupted"
    hand_over(pending)
    assert taken(a) is pending
    assert taken(a) is None


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_bytes_of_the_released_widths(bits):
    """512 and 64 channels: at 4 bits at most 30 % of the dense latents."""
    config = DeepseekV3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, first_k_dense_replace=1, max_position_embeddings=8192, pad_token_id=0,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM._from_config(config).eval().requires_grad_(False)
    randomise(model)
    model = model.to(torch.bfloat16)
    cache = kvshrink.make_cache(model, TurboQuant(bits=bits))
    read(model, cache, ids_of(4096))
    report = cache.report()
    assert report.full == 4096 * 1152
    assert report.byte_ratio < {4: 0.30, 3: 0.24, 2: 0.18}[bits]
    assert copy.deepcopy(cache).nbytes == cache.nbytes
    assert "latents of all heads" in str(report)


def test_what_changes_the_projection_is_honoured():
    """A hook, as an adapter: keys are then made by the module, of all latents."""
    model = build("text", "deepseek_v3")
    cache, full = kvshrink.make_cache(model, LOSSLESS), DynamicCache(config=model.config)
    hooks = [
        layer.self_attn.kv_b_proj.register_forward_hook(lambda m, a, out: out * 1.3) for layer in model.model.layers
    ]
    for ids in (ids_of(200), ids_of(3, 1), ids_of(1, 2)):
        torch.testing.assert_close(read(model, cache, ids), read(model, full, ids), atol=1e-4, rtol=1e-4)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(read(model, cache, ids_of(2, 4)), read(model, full, ids_of(2, 4)), atol=1e-4, rtol=1e-4)


def test_no_gradient_is_lost_in_silence():
    model = build("text", "deepseek_v3")
    cache = kvshrink.make_cache(model, LOSSLESS)
    read(model, cache, ids_of(200))
    model.requires_grad_(True)
    loss = model(ids_of(3, 1), past_key_values=cache).logits.sum()
    with pytest.raises(CacheError, match="gradients do not pass through a shrunken cache"):
        loss.backward()


def test_the_full_cache_holds_latents_too():
    model = build("text", "deepseek_v3")
    cache, full = kvshrink.make_cache(model, kvshrink.Full()), DynamicCache(config=model.config)
    for ids in (ids_of(200), ids_of(3, 1)):
        torch.testing.assert_close(read(model, cache, ids), read(model, full, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "streaming_llm", "kvquant", "oscar"])
@pytest.mark.parametrize("type_", ["deepseek_v3", "jetmoe"])
def test_what_asks_for_queries_is_refused_at_once(name, type_):
    model, method = build("text", type_), methods.build(name, {})
    rows = torch.randint(3, 110, (4, 128), generator=torch.Generator().manual_seed(1))
    with pytest.raises(SettingError, match=r"layer 0.*(Use a quantiser|two widths)"):
        kvshrink.fit(model, method, rows, progress=False) if method.needs_fit else kvshrink.make_cache(model, method)
