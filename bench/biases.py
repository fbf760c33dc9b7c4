"""What key biases like Qwen2's cost each quantiser: KL from the full cache on the bundled model, given such biases.

    python bench/biases.py                                    # writes bench/results/biases.json

Three slow channels of every KV head get a constant of up to 1.5 times SIZE before RoPE, by which the full cache's
predictions hardly change. What a method loses shows in the KL from them, over 100 tokens behind 1,000.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import kvshrink
from kvshrink import data, methods
from kvshrink.errors import KVShrinkError

SIZES = (0, 150, 400)
FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings"
).split()
NAMES = (
    "rtn kivi turboquant block_gtq tcq kvarn saw_int4 rotatekv oscar kvquant skvq qserve kitty gear zipcache mikv saq "
    "roste edgeqat accllm vidkv fp8 nvfp4 block_float xquant a2ats"
).split()


def biased(model, size: float) -> Qwen2ForCausalLM:
    config = {name: copy.deepcopy(getattr(model.config, name)) for name in FIELDS}
    found = Qwen2ForCausalLM(Qwen2Config(**config)).eval()
    known = model.state_dict()
    found.load_state_dict({k: known.get(k, torch.zeros_like(v)) for k, v in found.state_dict().items()})
    found.tie_weights()
    with torch.no_grad():
        for layer in found.model.layers:
            bias = layer.self_attn.k_proj.bias.view(model.config.num_key_value_heads, -1)
            for h in range(len(bias)):
                more = size * (1 + h / 2)
                bias[h, 31], bias[h, 63], bias[h, 30] = more, -0.7 * size, 0.6 * size
    return found


def read(model, cache, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        model(ids[:, :1000], past_key_values=cache, logits_to_keep=1)
        return model(ids[:, 1000:], past_key_values=cache).logits[0].float().log_softmax(-1)


def variants(names: list[str]) -> list[tuple[str, object]]:
    """Each quantiser at 4 and 2 bits, where it has such a setting."""
    found = []
    for name in names:
        for bits in (4, 2):
            try:
                found.append((f"{name} {bits}", methods.build(name, {"bits": bits})))
            except KVShrinkError:  # no such width, or no setting `bits`
                if bits == 4:
                    found.append((name, methods.build(name, {})))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=NAMES)
    parser.add_argument("--out", type=Path, default=Path("bench/results/biases.json"))
    args = parser.parse_args()
    model, tokenizer = kvshrink.reference_model("float32")
    ids = tokenizer(data.path("heldout.txt").read_text()[20_000:26_000], return_tensors="pt").input_ids[:, :1100]
    text = data.path("calibration.txt").read_text()[:14_000]
    rows: dict[str, dict] = {}
    for size in SIZES:
        own = biased(model, size)
        full = read(own, DynamicCache(), ids)
        for label, method in variants(args.methods):
            made = method
            if method.needs_fit:
                made = kvshrink.fit(own, method, text, tokenizer=tokenizer, progress=False)
            found = read(own, kvshrink.make_cache(own, made), ids)
            kl = float((full.exp() * (full - found)).sum(-1).mean())
            rows.setdefault(label, {"method": label})[f"kl at {size}"] = round(kl, 5)
    for row in rows.values():
        row["worst ratio"] = round(max(row[f"kl at {s}"] for s in SIZES[1:]) / max(row["kl at 0"], 1e-5), 2)
        print(row, flush=True)
    record = {"command": "python bench/biases.py", "sizes": SIZES, "tokens": [1000, 100], "rows": list(rows.values())}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
