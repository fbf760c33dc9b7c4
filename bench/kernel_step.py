"""Time of the fused CPU kernel alone, of a source tree: to compare two of them in turn, and a processor's paths.

    python bench/kernel_step.py .            # and in turn of another checkout, before

One layer of Llama-3.1-8B's shape, 2,048 tokens, one thread, the best of seven calls, in seconds.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def best(call: Callable[[], Any]) -> float:
    call()
    found = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return round(min(found), 5)


def main(tree: str) -> dict[str, float]:
    sys.path[:0] = [f"{tree}/src", tree]
    import torch

    from kvshrink.kernels.decode import cpu
    from tests.kernels.samples import basis_of, packed, turn_of

    torch.manual_seed(0)
    torch.set_num_threads(1)
    bf16, query, turn = torch.bfloat16, torch.randn(1, 8, 4, 128) / 11, turn_of(2048, 128)
    jobs = {
        "CSKV 0.2 int4 joint": (("channel", 4), ("token", 4), 1, 204),
        "spectral": ("normal", "normal", 1, 96),
        "RTN int4": (("channel", 4), ("token", 4), 8, 128),
    }
    found = {}
    for name, (keys, values, groups, rank) in jobs.items():
        k, v = packed(keys, groups, rank, 64, 1, bf16), packed(values, groups, rank, 64, 1, bf16)
        how = (basis_of(1, rank, 8, 128), turn) if groups == 1 else (None, None)
        found[name] = best(lambda k=k, v=v, how=how: cpu.decode(query, k, *how, v, None, None, bf16))
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
