"""A plain LlamaForCausalLM, its loss, and a causal attention without a mask tensor for training it.

Nothing of this is needed to use the model: the exported folder is an ordinary Llama. Training calls the layers
directly, because position ids with gaps would make the library build a mask of [t, t] per row.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.reference_model.mimetic import mimetic_init
from recipes.reference_model.recipe import HEAD_DIM, Recipe

ROPE_THETA = 500_000.0
ATTENTION = "causal_training"


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model. The vocabulary is the tokenizer's, which few books can leave below recipe.vocab."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=HEAD_DIM,
            intermediate_size=recipe.ff,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * recipe.layers))
    mimetic_init(model)
    return model


def for_training(model: LlamaForCausalLM, compiled: bool) -> LlamaForCausalLM:
    """Switch to the attention below, and compile the layers."""
    AttentionInterface.register(ATTENTION, causal_attention)
    model.config._attn_implementation = ATTENTION
    if compiled:
        # one program per row length and per measured length
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model


def causal_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "b q t d"],
    key: Float[Tensor, "b h t d"],
    value: Float[Tensor, "b h t d"],
    mask: None,
    scaling: float | None = None,
    **_,
) -> tuple[Float[Tensor, "b t q d"], None]:
    if query.device.type == "cpu":
        # the fp32 flash kernel is faster than the bf16 one on a CPU
        n = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(n, 1), value.repeat_interleave(n, 1)
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), is_causal=True, scale=scaling
            )
    else:
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def hidden_states(
    model: LlamaForCausalLM, ids: Int[Tensor, "b t"], positions: Int[Tensor, "b t"]
) -> Float[Tensor, "b t hidden"]:
    """Output of the last norm, before the head, in bf16 autocast."""
    base = model.model
    with torch.autocast(ids.device.type, torch.bfloat16):
        h = base.embed_tokens(ids)
        rope = base.rotary_emb(h, positions)
        for layer in base.layers:
            h = layer(h, attention_mask=None, position_ids=positions, position_embeddings=rope)
        return base.norm(h)


def weighted_loss(
    h: Float[Tensor, "n hidden"], head: Float[Tensor, "vocab hidden"], ids: Int[Tensor, " n"], w: Float[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Cross-entropy averaged with the weights of the tokens to be predicted."""
    with torch.autocast(h.device.type, torch.bfloat16):
        losses = F.cross_entropy(F.linear(h, head).float(), ids, reduction="none")
        return (losses * w).sum() / w.sum().clamp_min(1.0)
