"""What ranking tokens costs a prompt: time of what methods ask and compute, as a share of the prefill.

    python bench/ttft.py                                       # writes bench/results/ttft.json

One layer of Llama-3.1-8B (hidden 4,096, MLP 14,336, 32 query and 8 KV heads of 128) in bfloat16 with random weights, a
prompt of 8k tokens in one forward. scoring: projecting the queries that are asked, their attention, what a scorer
computes, less projections of all tokens, which the step then does not make again; dropping: choosing, gathering and
storing what stays; both over the whole prefill's time. A method that lets the model read the prompt again (kvzip) is
not here: it costs about two prefills more, by definition.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import setting
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink.attach import stage
from kvshrink.cache import writing
from kvshrink.eval.run.entries import parse
from kvshrink.store import files

METHODS = (
    *("snapkv", "adakv", "pyramidkv", "h2o", "a2sf", "scissorhands", "tova", "expected_attention", "knorm", "keydiff"),
    *("lagkv", "zipvl", "kvcrush", "snapkv:merge=True", "snapkv + turboquant:bits=4"),
)


class Clock:
    """Seconds inside some functions, those within one another counted once."""

    def __init__(self) -> None:
        self.seconds, self.inside = 0.0, False

    def around(self, holder: Any, name: str) -> None:
        real = getattr(holder, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return real(*args, **kwargs)
            self.inside, started = True, time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.seconds, self.inside = self.seconds + time.perf_counter() - started, False

        setattr(holder, name, timed)


class Made:
    """Seconds of projections of all tokens while scoring."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.seconds = tokens, 0.0

    def watch(self, scoring: Clock) -> None:
        real = torch.nn.Linear.forward

        def timed(module: torch.nn.Linear, given: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            out = real(module, given)
            if scoring.inside and given.shape[1] == self.tokens:
                self.seconds += time.perf_counter() - started
            return out

        torch.nn.Linear.forward = timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results/ttft.json"))
    args = parser.parse_args()
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=512,
        max_position_embeddings=2 * args.tokens,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    kvshrink.attach(model)
    ids = torch.randint(1, 512, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    scoring, dropping, made = Clock(), Clock(), Made(args.tokens)
    made.watch(scoring)
    scoring.around(stage, "probe_queries_of")
    scoring.around(writing.Leave, "rank")
    dropping.around(writing.Leave, "run")
    rows = []
    with torch.inference_mode():
        for name in METHODS:
            found = []
            for _ in range(args.rounds):
                cache = kvshrink.make_cache(model, parse(name).method)
                scoring.seconds = dropping.seconds = made.seconds = 0.0
                started = time.perf_counter()
                model(ids, past_key_values=cache, logits_to_keep=1)
                whole = time.perf_counter() - started
                found.append(((scoring.seconds - made.seconds) / whole, dropping.seconds / whole))
            best = min(found)
            rows.append({"method": name, "scoring": round(best[0], 4), "dropping": round(best[1], 4)})
            print(json.dumps(rows[-1]), flush=True)
    record = {"what": "share of a prefill's time", "command": " ".join(["python", *sys.argv]), "tokens": args.tokens}
    files.write_json(args.out, record | {"setting": setting(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
