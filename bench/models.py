"""A model of random weights whose attention has Llama-3.1-8B's shape and which is small in everything else, so that a
step's time is the cache's; and artifacts for it without a fit."""

from typing import Any

import torch
from layer import fitted
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvshrink.attach import attach
from kvshrink.attach.factory import shapes
from kvshrink.attach.identity import identity_of
from kvshrink.cli._common import load
from kvshrink.eval.run import calibration
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact

LAYERS = 4


def random_model(dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """4 layers, 32 query and 8 KV heads of 128 channels, hidden size 512. Seed 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2**18,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    model.generation_config.pad_token_id = 0
    return model


def real_model(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The model that the commands' --model names, which generates whatever comes, and its tokenizer."""
    model, tokenizer = load(name)
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model, tokenizer


def text_ids(tokenizer: Any, count: int) -> torch.Tensor:
    """So many tokens [1, count] of the calibration text."""
    ids = tokenizer("\n".join(calibration.texts(None)), return_tensors="pt").input_ids
    return ids.repeat(1, -(-count // ids.shape[1]))[:, :count]


def artifact(model: PreTrainedModel, method: Method) -> Artifact:
    """The method for all layers alike, as if fitted on random rows: speed and bytes do not depend on that."""
    attachment = attach(model)
    shape = shapes(attachment)[0]
    assert shape is not None
    method = method.resolve_auto([shape], model.device)
    if not method.needs_fit:
        return Artifact(method, {})
    learnt = dict.fromkeys(range(model.config.num_hidden_layers), fitted(method, shape))
    return Artifact(method, learnt, {"identity": identity_of(model).to_dict()})
