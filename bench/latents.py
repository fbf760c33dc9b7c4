"""MLA latents under quantisers: bytes, KL and a step's time, beside DynamicCache, which expands all at each step.

    python bench/latents.py --out bench/results/latents.json

Few layers with the widths of the released models (512 and 64 channels a token, 128-wide heads), small in all else,
random, bfloat16. KL in nats, of 64 tokens behind the prompt, of a random model.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import config_of, randomise
from transformers import DynamicCache

import kvshrink
from kvshrink import methods
from kvshrink.store import files

WIDTHS = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "num_attention_heads": 16,
    "num_key_value_heads": 16, "qk_head_dim": 192, "head_dim": 64, "max_position_embeddings": 2**15,
}  # fmt: skip
LIKE = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
}
ASKED = [("turboquant", b) for b in (4, 3, 2)] + [("rtn", b) for b in (8, 4, 2)] + [("tcq", b) for b in (4, 3, 2)]


def model_of(name: str) -> Any:
    config = config_of(name, **WIDTHS)
    torch.manual_seed(0)
    model = getattr(transformers, LIKE[name])._from_config(config)
    randomise(model)
    return model.eval().to(torch.bfloat16).requires_grad_(False)


@torch.inference_mode()
def step(model: Any, cache: Any, count: int = 12) -> float:
    """Seconds of a step, the median."""
    token, taken = torch.full((1, 1), 5), []
    for _ in range(count):
        started = time.perf_counter()
        model(token, past_key_values=cache)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


@torch.inference_mode()
def rows(name: str, tokens: int) -> list[dict[str, Any]]:
    model = model_of(name)
    ids = torch.randint(3, 110, (1, tokens + 64), generator=torch.Generator().manual_seed(7))
    full = DynamicCache(config=model.config)
    model(ids[:, :tokens], past_key_values=full, logits_to_keep=1)
    wanted = model(ids[:, tokens:], past_key_values=full).logits.float().log_softmax(-1)
    seconds, found = step(model, full), []
    for label, bits in ASKED:
        cache = kvshrink.make_cache(model, methods.build(label, {"bits": bits}))
        model(ids[:, :tokens], past_key_values=cache, logits_to_keep=1)
        got = model(ids[:, tokens:], past_key_values=cache).logits.float().log_softmax(-1)
        report = cache.report()
        own = [r for r in report.rows if r.kind == label]
        found.append(
            {
                "like": name,
                "method": f"{label}:bits={bits}",
                "tokens": tokens,
                "of_dense_latents": round(sum(r.held.total for r in own) / sum(r.full for r in own), 4),
                "kl": float(f"{float((wanted.exp() * (wanted - got)).sum(-1).mean()):.2e}"),
                "step_over_dynamic_cache": round(step(model, cache) / seconds, 3),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/latents.json"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = [row for name in LIKE for row in rows(name, args.tokens)]
    command = f"python bench/latents.py --tokens {args.tokens} --threads {args.threads}"
    files.write_json(args.out, {"command": command, "rows": found})
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
