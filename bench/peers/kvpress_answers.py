"""Answers of NVIDIA's kvpress on given prompts, with its own pipeline: run in its own environment, without kvshrink.

    python="$(bench/peers/make.sh kvpress)" && $python bench/peers/kvpress_answers.py PROMPTS OUT

PROMPTS is what bench/kvpress.py writes: a model folder, presses by name, ratios of what is kept, and prompts as ids.
Each line of OUT is one press, ratio and prompt: the answer, bytes of the live keys and values after the context, and
seconds of a decode step beside those of an uncompressed cache, in turn. Lines that are there are not made again.
"""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVPressTextGenerationPipeline,
    KVzipPress,
    LagKVPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "snapkv": lambda c: SnapKVPress(compression_ratio=c),
    "pyramidkv": lambda c: PyramidKVPress(compression_ratio=c),
    "tova": lambda c: TOVAPress(compression_ratio=c),
    "knorm": lambda c: KnormPress(compression_ratio=c),
    "keydiff": lambda c: KeyDiffPress(compression_ratio=c),
    "lagkv": lambda c: LagKVPress(compression_ratio=c),
    "streaming_llm": lambda c: StreamingLLMPress(compression_ratio=c),
    "expected_attention": lambda c: ExpectedAttentionPress(compression_ratio=c),
    "adakv snapkv": lambda c: AdaKVPress(SnapKVPress(compression_ratio=c)),
    "adakv expected_attention": lambda c: AdaKVPress(ExpectedAttentionPress(compression_ratio=c, epsilon=1e-2)),
    "kvzip": lambda c: KVzipPress(compression_ratio=c),
}
STEPS = 8  # decode steps that are timed


def held(cache) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def step(model, cache, length: int) -> float:
    """Seconds of a decode step behind a context of this length, the median of some."""
    found = []
    for i in range(STEPS):
        started = time.perf_counter()
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, position_ids=torch.tensor([[length + i]]))
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def prefilled(pipe, ids, press):
    """The cache after a context, and the seconds that it took."""
    cache = DynamicCache()
    started = time.perf_counter()
    with press(pipe.model) if press else contextlib.nullcontext():
        pipe.model.model(input_ids=ids, past_key_values=cache)
    return cache, time.perf_counter() - started


def main() -> None:
    given, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(given["threads"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"])).eval()
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(given["model"]))
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["press"], row["kept"], row["prompt"]) for row in known}
    jobs = [("full", 1.0), *((name, kept) for kept in given["kept"] for name in given["presses"])]
    with torch.inference_mode(), out.open("a") as file:
        for prompt in given["prompts"]:
            ids, asked = (torch.tensor([prompt[name]]) for name in ("context", "question"))
            for name, kept in jobs:
                if (name, kept, prompt["id"]) in done:
                    continue
                press = None if name == "full" else PRESSES[name](1 - kept)
                cache, seconds = prefilled(pipe, ids, press)
                row = {"press": name, "kept": kept, "prompt": prompt["id"], "prefill": seconds, "nbytes": held(cache)}
                try:
                    row["answer"] = pipe.generate_answer(asked, cache, ids.shape[1], prompt["new"])
                    if prompt["id"] == given["prompts"][0]["id"]:
                        row["step"] = step(model, cache, ids.shape[1] + 64)
                except RuntimeError as error:  # a press may leave what its own pipeline cannot read
                    row["error"] = str(error)[:200]
                file.write(json.dumps(row) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
