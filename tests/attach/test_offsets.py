"""Keys with a large constant part: it is kept apart where a method would lose by it, or the method says so, once."""

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import kvshrink
from kvshrink import CSKV, RTN, methods
from kvshrink.attach.projections import swamped
from kvshrink.kernels import native
from kvshrink.methods._roles import Method
from tests.cache.build import body_keys

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97, "head_dim": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}


def biased(size: float) -> Qwen2ForCausalLM:
    """Slow channels whose keys are nearly constant."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.normal_(0, 0.3)
        bias = layer.self_attn.k_proj.bias.view(2, 64)
        bias.zero_()
        bias[:, 31], bias[:, 63], bias[:, 30] = size, -0.7 * size, 0.6 * size
    return model


def made(model, name: str, **settings):
    method = methods.build(name, settings)
    if method.needs_fit:
        method = kvshrink.fit(model, method, torch.randint(3, 97, (4, 256)), progress=False)
    return method


def error(model, method) -> float:
    """Of the first layer's keys as attention reads them, over all but the exact tokens; to those at bias 0."""
    ids = torch.randint(3, 97, (2, 200), generator=torch.Generator().manual_seed(1))
    cache, exact = kvshrink.make_cache(model, method), DynamicCache()
    model(ids, past_key_values=cache)
    model(ids, past_key_values=exact)
    model.set_attn_implementation("sdpa")  # the next step's keys are then at full width
    kept, layer = {}, cache.layers[0]
    inner = layer.update

    def update(*args, **kwargs):
        kept["keys"], values = inner(*args, **kwargs)
        return kept["keys"], values

    layer.update = update
    model(ids[:, :1], past_key_values=cache)
    model.set_attn_implementation("kvshrink")
    return float((kept["keys"][:, :, 4:160] - exact.layers[0].keys[:, :, 4:160]).norm())


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("name", ["turboquant", "saw_int4", "rtn", "kivi", "rotatekv", "oscar"])
def test_keys_are_as_exact_beside_a_large_constant_as_without(name, bits):
    more = {"window": 32, "sinks": 4} if name == "oscar" else {}
    plain, large = (biased(size) for size in (0, 400))
    assert error(large, made(large, name, bits=bits, **more)) <= 1.1 * error(
        plain, made(plain, name, bits=bits, **more)
    )


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv"])
def test_tokens_of_single_heads_are_turned_at_their_own_positions(name):
    """With all tokens kept the cache is that of plain codes; with some, each head has other ones."""
    model, ids = biased(400), torch.randint(3, 97, (2, 230), generator=torch.Generator().manual_seed(2))
    found = []
    for cache in (DynamicCache(), kvshrink.make_cache(model, made(model, name, ratio=0.5, bits=8))):
        model(ids[:, :200], past_key_values=cache)
        found.append(cache)
    layer = found[1].layers[0]
    assert layer.codecs[0].site == "k_pre"
    exact, columns = found[0].layers[0].keys, layer.pages.columns
    rope = kvshrink.attach(model).layers[0].rope
    keys = body_keys(layer.snapshot(rope))
    live = columns >= 0
    wanted = exact.gather(2, columns.clamp_min(0).long()[..., None].expand(-1, -1, -1, 64))
    assert (columns[:, 0] != columns[:, 1]).any(), "the heads keep different tokens"
    error = (keys - wanted)[live].norm() / exact.sub(exact.mean(2, keepdim=True)).norm()
    assert error < 0.05


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
def test_the_fused_kernel_reads_such_keys():
    model = biased(400)
    cache = kvshrink.make_cache(model, made(model, "turboquant", bits=4))
    model(torch.randint(3, 97, (1, 200)), past_key_values=cache)
    assert str(cache.layers[0].body.view(None)[0].kernel) == "yes"
    codec = cache.layers[0].codecs[0]
    assert codec.site == "k_post", "codes are read as they are: no key is rebuilt"
    assert codec.constant is not None


def test_a_method_without_such_a_form_says_so_once(monkeypatch):
    model, method = biased(400), methods.build("turboquant", {"bits": 4})
    monkeypatch.setattr(type(method), "without_constant", Method.without_constant)
    with pytest.warns(UserWarning, match=r"key biases of 2 layers .layer 0 first. are so large that turboquant"):
        kvshrink.make_cache(model, method)
    cache = kvshrink.make_cache(model, method)  # a warning is an error in tests
    assert torch.isfinite(model(torch.randint(3, 97, (1, 90)), past_key_values=cache).logits).all()


@pytest.mark.parametrize(
    "method", [RTN(bits=4), methods.build("kivi", {}), methods.build("kvquant", {}), CSKV(keep=0.5)]
)
def test_one_that_scales_each_channel_is_as_it_was(method):
    model = biased(400)
    if method.needs_fit:
        method = kvshrink.fit(model, method, torch.randint(3, 97, (4, 256)), progress=False)
    own = method.method if isinstance(method, kvshrink.Artifact) else method
    cache = kvshrink.make_cache(model, method)  # a warning is an error in tests
    if not own.needs_fit:
        assert cache.layers[0].codecs[0].site == "k_post"


@pytest.mark.parametrize("name", ["spectral", "cskv"])
def test_a_window_that_eight_bits_would_spoil_is_exact_by_itself(name):
    plain, large = (kvshrink.make_cache(m, made(m, name, budget=0.2)) for m in (biased(0), biased(400)))
    assert [c.layers[0].rounded.bits for c in (plain, large)] == [8, None]  # and a warning is an error in tests


def test_of_weights_stored_as_codes_large_biases_alone_say_it():
    model = biased(400)
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight
        layer.self_attn.k_proj.weight = torch.nn.Parameter(weight.mul(40).to(torch.int8), requires_grad=False)
    assert swamped(model.model.layers[0].self_attn)
    assert not swamped(biased(2).model.layers[0].self_attn)


def test_a_window_at_eight_bits_that_was_asked_for_says_what_it_loses():
    with pytest.warns(UserWarning, match=r"2 layers .layer 0 first. .* a window at 8 bits loses .* window_bits=None\."):
        kvshrink.make_cache(biased(400), RTN(bits=4, window_bits=8))
    kvshrink.make_cache(biased(2), RTN(bits=4, window_bits=8))


@pytest.mark.parametrize("name", ["rtn", "snapkv"])
def test_what_stores_the_dtype_of_the_model_stays_lossless(name):
    model = biased(400).to(torch.bfloat16)
    cache = kvshrink.make_cache(model, methods.build(name, {"bits": None}))
    assert cache.layers[0].codecs[0].site == "k_post"


def test_constants_are_those_of_the_weights_and_the_dtype_at_hand():
    model, method = biased(400), methods.build("turboquant", {"bits": 4})
    first = kvshrink.make_cache(model, method)
    assert kvshrink.make_cache(model, method).layers[0].tiers is first.layers[0].tiers, "tried once"
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.mul_(2)
    second = kvshrink.make_cache(model, method)
    assert second.layers[0].codecs[0].mean.equal(2 * first.layers[0].codecs[0].mean)
    model.to(torch.bfloat16)
    third = kvshrink.make_cache(model, method)
    assert torch.isfinite(model(torch.randint(3, 97, (1, 90)), past_key_values=third).logits).all()


def test_small_biases_are_no_matter():
    cache = kvshrink.make_cache(biased(1), methods.build("turboquant", {"bits": 4}))
    assert cache.layers[0].codecs[0].site == "k_post"


def test_a_saved_cache_is_read_by_another_one(tmp_path):
    model, ids = biased(400), torch.randint(3, 97, (1, 200))
    cache = kvshrink.make_cache(model, methods.build("turboquant", {"bits": 2}))
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "c")
    again = kvshrink.make_cache(model, methods.build("turboquant", {"bits": 2}))
    again.load(tmp_path / "c")
    assert model(ids[:, :3], past_key_values=again).logits.equal(model(ids[:, :3], past_key_values=cache).logits)
    plain = kvshrink.make_cache(biased(0), methods.build("turboquant", {"bits": 2}))
    assert plain.fitted != cache.fitted, "codes before RoPE are not read as codes after it"
