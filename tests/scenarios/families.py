"""Tiny models with random weights, one per way in which a family's attention differs.

Weights are drawn so that tokens depend on the whole context: attention is peaked, its output is not drowned by the
residual stream, and the head is not tied to the embedding. Biases and norm weights are random as well, since a
forgotten bias or norm must show.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
import transformers as hf
from torch import nn

VOCAB = 97
WINDOW = 16  # of sliding attention: crossed early in every scenario
ORIGINAL = 64  # context that a scaled RoPE stretches: crossed in every prompt


@dataclass(frozen=True)
class Family:
    """How to build one tiny model. `attention` is the implementation that the model has before we attach."""

    name: str  # as in transformers' class names
    settings: dict = field(default_factory=dict)
    attention: str = "sdpa"
    compressed: int = 2  # layers that a method shrinks; the others slide
    config: str | None = None
    seed: int = 3  # one with which the model does not repeat itself

    def build(self, seed: int | None = None) -> hf.PreTrainedModel:
        """A fresh model in eval mode, the same for the same seed."""
        config = getattr(hf, self.config or f"{self.name}Config")(**{**_COMMON, **self.settings})
        with torch.random.fork_rng():
            torch.manual_seed(self.seed if seed is None else seed)
            model = getattr(hf, f"{self.name}ForCausalLM")._from_config(config, attn_implementation=self.attention)
            _randomise(model)
        return model.eval().requires_grad_(False)


_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4 * ORIGINAL,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "dtype": torch.float32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
_HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_SLIDING = {"sliding_window": WINDOW}
_ONE = {"num_hidden_layers": 1}  # where another family shows how layers work together

FAMILIES = {
    "llama": Family("Llama"),
    "llama_yarn": Family("Llama", {**_ONE, "rope_parameters": _YARN}, compressed=1),
    "llama_llama3": Family("Llama", {**_ONE, "rope_parameters": _LLAMA3}, compressed=1),
    "mistral": Family("Mistral", {**_ONE, "sliding_window": None}, compressed=1),
    "mistral_sliding": Family("Mistral", _SLIDING, compressed=0),
    "qwen2": Family("Qwen2", _ONE, compressed=1),
    # full, full, sliding
    "qwen2_mixed": Family(
        "Qwen2", {**_SLIDING, "num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 2}, seed=9
    ),
    "qwen3": Family("Qwen3", {"head_dim": 16}),
    "phi3": Family("Phi3"),
    "phi3_partial": Family("Phi3", {**_ONE, "rope_parameters": _HALF}, compressed=1),
    # sliding, full; a softcap low enough to bend the scores
    "gemma2": Family(
        "Gemma2",
        {**_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
        attention="eager",
        compressed=1,
        seed=4,
    ),
    "gemma3": Family(
        "Gemma3",
        {
            **_SLIDING,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        config="Gemma3TextConfig",
        compressed=1,
        seed=4,
    ),
    "olmo": Family("Olmo", {**_ONE, "clip_qkv": 1.0}, compressed=1, seed=6),
    "olmo2": Family("Olmo2", seed=7),
    "glm4": Family("Glm4", {"head_dim": 8}),
    "cohere": Family("Cohere", {**_ONE, "logit_scale": 1.0}, compressed=1),
    "cohere_qk_norm": Family("Cohere", {"logit_scale": 1.0, "use_qk_norm": True}, seed=8),
    # the fourth layer has no RoPE
    "smollm3": Family("SmolLM3", {"num_hidden_layers": 4}, compressed=4),
}


@cache
def reference(family: str) -> hf.PreTrainedModel:
    """The family's model, never attached: the oracle."""
    return _named(family)


@cache
def subject(family: str) -> hf.PreTrainedModel:
    """The family's model again, for us to attach."""
    return _named(family)


@cache
def assistant(family: str) -> hf.PreTrainedModel:
    """A draft model that is sometimes right and sometimes wrong: the family's weights with some noise."""
    model = _named(family)
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05 * float(weight.abs().mean()))
    config = model.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 6, "constant"
    config.assistant_confidence_threshold = 0.0
    return model


def _named(family: str) -> hf.PreTrainedModel:
    model = FAMILIES[family].build()
    model.name_or_path = family  # by which a scenario finds the assistant
    return model


def _randomise(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        noise, fan_in = torch.randn(weight.shape), weight.shape[-1]
        if "norm" in name:  # they start at 0 (Gemma) or at 1
            drawn = weight + 0.2 * noise
        elif "bias" in name or "embed_tokens" in name:
            drawn = 0.5 * noise
        elif "lm_head" in name:
            drawn = noise
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj", "qkv_proj"))
            drawn = (1.4 if sharp else 1.0) * noise / fan_in**0.5
        weight.data.copy_(drawn)
