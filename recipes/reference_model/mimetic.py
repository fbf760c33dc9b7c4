"""A start near an induction circuit, which saves most of the steps that a small model needs to find one.

All embeddings share one direction (invisible to the softmax of the tied head), so that layer 0 can form constant
queries and keys: its heads 0 and 1 look one and two tokens back through RoPE alone, and the first KV head writes what
it saw into the stream. Later layers match like with like (W_k = W_q of the first head of each group) and copy what they
attend to (W_o = c W_v^T, "mimetic initialization", arXiv 2305.09828). With it induction appears after 0.5-0.7M tokens.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM

from recipes.reference_model.recipe import HEAD_DIM

PAIRS = 10  # the RoPE pairs of highest frequency: they tell neighbours apart
MATCH, COPY = 0.045, 0.05


@torch.no_grad()
def mimetic_init(model: LlamaForCausalLM) -> None:
    c = model.config
    group = c.num_attention_heads // c.num_key_value_heads * HEAD_DIM
    shared = F.normalize(torch.randn(c.hidden_size), dim=0)
    model.model.embed_tokens.weight += shared * (0.02 * math.sqrt(c.hidden_size))
    for i, layer in enumerate(model.model.layers):
        q, k, v, o = (getattr(layer.self_attn, f"{n}_proj").weight for n in "qkvo")
        v.normal_(std=c.hidden_size**-0.5)
        for kv in range(c.num_key_value_heads):
            rows, first = slice(kv * HEAD_DIM, (kv + 1) * HEAD_DIM), slice(kv * group, kv * group + HEAD_DIM)
            if i > 0:
                q[first].normal_(std=MATCH)
                k[rows] = q[first]
            if i > 0 or kv == 0:
                o[:, first] = COPY * v[rows].T
    _look_back(model, shared)


def _look_back(model: LlamaForCausalLM, shared: Float[Tensor, " hidden"]) -> None:
    """Layer 0: head 0 attends to the token before, head 1 to the one before that."""
    hidden, theta = model.config.hidden_size, model.config.rope_parameters["rope_theta"]
    omega = theta ** (-torch.arange(PAIRS) / (HEAD_DIM / 2))
    # length of the shared part after RMSNorm
    seen = math.sqrt(hidden / 2)

    def turned(offset: float) -> Float[Tensor, "d 1"]:
        a = torch.zeros(HEAD_DIM)
        a[:PAIRS], a[HEAD_DIM // 2 : HEAD_DIM // 2 + PAIRS] = torch.cos(offset * omega), torch.sin(offset * omega)
        return (a * math.sqrt(5.0 * 8) / seen)[:, None]

    q, k = (getattr(model.model.layers[0].self_attn, f"{n}_proj").weight for n in "qk")
    q[:HEAD_DIM] += turned(0.0) * shared
    q[HEAD_DIM : 2 * HEAD_DIM] += turned(-1.0) * shared
    k[:HEAD_DIM] += turned(1.0) * shared
