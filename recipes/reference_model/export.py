"""The folder that from_pretrained loads: bf16 weights, tokenizer, greedy generation settings, card, measurements.

bf16 halves the download and costs nothing measurable, but what is measured must be what is shipped: `rounded` gives
the evaluation fp32 arithmetic on exactly the bf16 weights.
"""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.reference_model import checkpoint
from recipes.reference_model.card import card
from recipes.reference_model.model import build
from recipes.reference_model.recipe import Recipe


def rounded(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """The trained model in fp32, its weights rounded to bf16 values.

    Rounding the tensors and not the module keeps the RoPE frequencies, which are not stored, in full precision.
    """
    model = build(recipe, tokenizer)
    saved = checkpoint.read(folder)["model"]
    model.load_state_dict({name: t.bfloat16().float() for name, t in saved.items()})
    return model.eval()


def export(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path, report: dict) -> Path:
    model = rounded(recipe, tokenizer, folder).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=32,
    )
    to = folder / "model"
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    (to / "eval.json").write_text(json.dumps(report, indent=1) + "\n")
    (to / "README.md").write_text(card(recipe, model, report))
    return to
