"""The bundled reference model: a 3.7M-parameter Llama that retrieves from 4096 tokens. With it all runs offline.

Its card (README.md beside this file) has what it can and cannot do; `recipes/reference_model` is how it was trained.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def reference_model(dtype: str | None = None):
    """(model, tokenizer). dtype: "float32", "bfloat16" (as stored, the default) or "float16"."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvshrink.half_linear import in_float32_where_faster

    kind = torch.bfloat16 if dtype is None else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=kind).eval()
    return in_float32_where_faster(model), AutoTokenizer.from_pretrained(FOLDER)
