"""kernels/rope against the functions that transformers itself rotates keys with."""

import pytest
import torch
from transformers import CohereConfig, Glm4Config, LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama

from kvshrink.cache.rope import Rope
from kvshrink.kernels.rope import rotate

COMMON = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA, LLAMA_YARN = LlamaConfig(**COMMON), LlamaConfig(**COMMON, rope_parameters=YARN)
COHERE, GLM4 = CohereConfig(**COMMON), Glm4Config(**COMMON, head_dim=16, partial_rotary_factor=0.5)
CASES = {  # module, rotary embedding, interleaved
    "llama": (modeling_llama, modeling_llama.LlamaRotaryEmbedding(LLAMA), False),
    "llama_yarn": (modeling_llama, modeling_llama.LlamaRotaryEmbedding(LLAMA_YARN), False),
    "cohere": (modeling_cohere, modeling_cohere.CohereRotaryEmbedding(COHERE), True),
    "glm4_partial": (modeling_glm4, modeling_glm4.Glm4RotaryEmbedding(GLM4), True),
}


@pytest.fixture(params=CASES)
def case(request):
    """(the module's apply function, its cos and sin, Rope of the same frequencies, keys, positions)"""
    module, rotary, interleaved = CASES[request.param]
    rope = Rope(rotary.inv_freq, float(rotary.attention_scaling), interleaved)
    positions = torch.tensor([[0, 1, 2, 40, 41, 499, 500], [0, 0, 7, 8, 9, 10, 300]])
    return module, rotary, rope, torch.randn(2, 2, 7, 16), positions


def test_agrees_with_transformers(case):
    module, rotary, rope, keys, positions = case
    cos, sin = rotary(keys, positions)
    _, wanted = module.apply_rotary_pos_emb(keys, keys, cos, sin)
    torch.testing.assert_close(rope.apply(keys, positions.int()), wanted, atol=2e-6, rtol=0)


def test_inverse_undoes_what_transformers_did(case):
    module, rotary, rope, keys, positions = case
    _, turned = module.apply_rotary_pos_emb(keys, keys, *rotary(keys, positions))
    torch.testing.assert_close(rope.undo(turned, positions.int()), keys, atol=2e-6, rtol=0)


def test_yarn_scales_and_the_inverse_takes_it_away():
    rotary = CASES["llama_yarn"][1]
    assert rotary.attention_scaling > 1.1
    rope = Rope(rotary.inv_freq, float(rotary.attention_scaling), False)
    keys, positions = torch.randn(1, 2, 5, 16), torch.arange(5, dtype=torch.int32)[None]
    turned = rope.apply(keys, positions)
    torch.testing.assert_close(turned.norm(), keys.norm() * rotary.attention_scaling)
    torch.testing.assert_close(rope.undo(turned, positions), keys, atol=2e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_only_the_first_channels_turn(interleaved, pairs):
    x = torch.randn(1, 2, 3, 16)
    angle = torch.rand(1, 3, pairs)
    out = rotate(x, angle.cos(), angle.sin(), interleaved, inverse=False)
    assert torch.equal(out[..., 2 * pairs :], x[..., 2 * pairs :])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))  # a rotation keeps lengths
    i, j = (0, 1) if interleaved else (0, pairs)
    first = x[0, 1, 2, i] * angle[0, 2, 0].cos() - x[0, 1, 2, j] * angle[0, 2, 0].sin()
    torch.testing.assert_close(out[0, 1, 2, i], first)


def test_turns_add_up_and_scores_depend_on_the_distance_alone():
    rope = Rope(torch.tensor([1.0, 0.1, 0.01]), 1.0, False)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rope.apply(x, torch.full((1, 1), position, dtype=torch.int32))

    q, k = torch.randn(2, 1, 1, 1, 6)
    torch.testing.assert_close(at(at(k, 3), 4), at(k, 7))
    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 105) * at(k, 100)).sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_dtypes_turn_in_float32_and_stay_as_they_are(dtype):
    rope = Rope(torch.tensor([1.0, 0.1]), 1.0, True)
    x, positions = torch.randn(1, 1, 4, 6).to(dtype), torch.arange(4, dtype=torch.int32)[None]
    before = x.clone()
    out = rope.apply(x, positions)
    assert out.dtype == torch.float32
    assert torch.equal(out, rope.apply(x.float(), positions))
    assert torch.equal(x, before)


def test_a_gradient_passes_as_through_a_rotation(case):
    """The values are those without one, and the gradient is turned back, times the scaling squared."""
    _, _, rope, keys, positions = case
    wanted = rope.apply(keys, positions.int())
    given = keys.clone().requires_grad_()
    found = rope.apply(given, positions.int())
    torch.testing.assert_close(found.detach(), wanted, atol=1e-6, rtol=0)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    turned = 2 * len(rope.inv_freq)
    back = rope.undo(weight, positions.int())
    back[..., :turned] *= rope.scaling**2
    torch.testing.assert_close(given.grad, back, atol=1e-5, rtol=0)
