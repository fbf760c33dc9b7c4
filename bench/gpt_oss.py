"""gpt-oss with strong sinks in bfloat16: a lossless cache of ours and DynamicCache, both beside float32.

    python bench/gpt_oss.py --out bench/results/gpt_oss.json

A tiny random model, sinks drawn from N(3, 1), 24 prompts of 120 tokens, 20 greedy tokens of each. float32: prompts
whose tokens are DynamicCache's. bfloat16: prompts whose tokens are those of DynamicCache in bfloat16, and, of each
cache, those that are float32's; and the mean largest difference of the next token's log-probabilities from float32's.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from tiny_models import build
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN
from kvshrink.store import files

PROMPTS, TOKENS, NEW = 24, 120, 20


def answers(model: Any, ours: bool) -> tuple[list[list[int]], torch.Tensor]:
    """(new tokens of each prompt, log-probabilities behind the prompt and one token more [prompts, vocabulary])."""
    found, after = [], []
    for seed in range(PROMPTS):
        ids = torch.randint(3, 110, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
        cache = kvshrink.make_cache(model, RTN(bits=None, window=8)) if ours else DynamicCache(config=model.config)
        found.append(model.generate(ids, past_key_values=cache, **given)[0, TOKENS:].tolist())
        cache = kvshrink.make_cache(model, RTN(bits=None, window=8)) if ours else DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
            after.append(model(ids[:, -1:], past_key_values=cache).logits[0, -1].float().log_softmax(-1))
    return found, torch.stack(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpt_oss.json"))
    args = parser.parse_args()
    model = build("text", "gpt_oss")
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.data.copy_(3 + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        own = copy.deepcopy(model).to(dtype)
        for ours in (False, True):
            found[dtype, ours] = answers(own, ours)
    exact, logs = found[torch.float32, False]

    def same(one: list[list[int]], other: list[list[int]]) -> int:
        return sum(a == b for a, b in zip(one, other, strict=True))

    def error(dtype: torch.dtype, ours: bool) -> float:
        return round(float((found[dtype, ours][1] - logs).abs().amax(1).mean()), 4)

    bf16 = torch.bfloat16
    rows = {
        "prompts": PROMPTS,
        "float32: as DynamicCache": same(found[torch.float32, True][0], exact),
        "bfloat16: as DynamicCache": same(found[bf16, True][0], found[bf16, False][0]),
        "bfloat16 as float32": {name: same(found[bf16, o][0], exact) for name, o in (("full", False), ("ours", True))},
        "bfloat16, error": {name: error(bf16, o) for name, o in (("full", False), ("ours", True))},
    }
    files.write_json(args.out, {"command": "python bench/gpt_oss.py", **rows})
    print(rows)


if __name__ == "__main__":
    main()
