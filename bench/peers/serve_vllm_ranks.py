"""A part of bench/peers/serve_vllm.py: three tensor-parallel ranks, each with one of SmolLM2's KV heads.

Float32, prompts in one step: the tokens of one rank. An artifact that is fitted with shards=3, and what needs no fit.
"""

from pathlib import Path

from serve_vllm import FITTED, Table, closed, engine, generate, ids, named, same

import kvshrink

RANKS, COUNT = 3, 24
SHARDED = {
    "cskv 4, 3 shards": kvshrink.CSKV(keep=0.25, bits=4, window_bits=None, shards=RANKS),
    "spectral, 3 shards": kvshrink.Spectral(
        budget=0.125, speed="fast", allocation="energy", window_bits=None, shards=RANKS
    ),
}


def ranks(table: Table, folder: Path) -> None:
    FITTED.update(SHARDED)
    prompts = [ids(200 + 17 * i, 300 * i) for i in range(3)]
    for name in ("turboquant:bits=4", *SHARDED):
        settings = {**named(name, folder)[0], "prefill": "window"}
        found = []
        for count in (1, RANKS):
            own = {} if count == 1 else {"distributed_executor_backend": "mp"}  # each a process of its own
            llm = engine(settings, tensor_parallel_size=count, **own)
            found.append(generate(llm, prompts, COUNT))
            closed(llm)
        equal = same(*found)
        wanted = f"3 x {COUNT} tokens of one rank"
        table.add("ranks", f"{name}, {RANKS} ranks", equal, wanted, min(equal) == COUNT)
