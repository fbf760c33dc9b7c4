"""How many ends of a closed trellis path must be tried, and what giving up early costs.

    python bench/closed_paths.py                  # writes bench/results/closed_paths.json

A path of 32 unit normal numbers begins in the state where it ends. Ends are tried in the order of a lower bound, until
the next one cannot be better (`searches`): the bound from the best way to a state, or from that
and the best way on from it. `error`: squared error over the best closed path's, where the first end alone is tried, or
where the end comes from a second turn around the page (wrap-around Viterbi), as decoders of tail-biting codes do.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from kvshrink.kernels.trellis_levels import BITS, STATES, SUBSETS, levels, subset_of
from kvshrink.store import files

NEVER, LANES = 1e30, 32
STATE = torch.arange(STATES)
BEFORE = torch.stack([STATE >> 1, (STATE >> 1) + STATES // 2])  # the two states that may come before each
NEXT = torch.stack([2 * STATE % STATES, 2 * STATE % STATES + 1])


def forward(cost: Tensor, start: Tensor) -> Tensor:
    """Costs of the best way to each state [n, 16], from these at the start; cost [n, page, subset]."""
    subsets, total = subset_of(torch.stack([STATE, STATE + STATES])), start
    for t in range(cost.shape[1]):
        total = torch.minimum(*(total[:, b] + cost[:, t, s] for b, s in zip(BEFORE, subsets, strict=True)))
    return total


def backward(cost: Tensor, end: Tensor) -> Tensor:
    """Costs of the best way on from each state."""
    upper, total = STATES * (STATE >= STATES // 2), end
    for t in reversed(range(cost.shape[1])):
        total = torch.minimum(*(total[:, n] + cost[:, t, subset_of(n + upper)] for n in NEXT))
    return total


def closed(cost: Tensor) -> Tensor:
    """[n, 16]: of the best path that begins and ends in each state."""
    found = []
    for s in range(STATES):
        start = torch.full((len(cost), STATES), NEVER)
        start[:, s] = 0
        found.append(forward(cost, start)[:, s])
    return torch.stack(found, 1)


def searches(bound: Tensor, own: Tensor) -> dict:
    """Ends that are tried: the mean over paths, and over 32 of them that are searched together."""
    low, order = bound.sort(1)
    best = own.gather(1, order).cummin(1).values
    done = best[:, :-1] <= low[:, 1:] + 1e-6
    count = torch.where(done.any(1), done.int().argmax(1) + 1, STATES)
    together = count.view(-1, LANES).amax(1)
    return {"a path": round(float(count.float().mean()), 2), "a register": round(float(together.float().mean()), 2)}


def measure(bits: int, paths: int) -> dict:
    x = torch.randn(paths, 32, generator=torch.Generator().manual_seed(0))
    cost = (x[..., None] - levels(bits).float()).square().unflatten(-1, (-1, SUBSETS)).min(-2).values
    free = torch.zeros(paths, STATES)
    to, on, own = forward(cost, free), backward(cost, free), closed(cost)
    best = own.min(1).values.mean()

    def error(by: Tensor) -> float:
        return round(float(own.gather(1, by.argmin(1, keepdim=True)).mean() / best), 4)

    again = forward(cost, to - to.min(1, keepdim=True).values)
    both = torch.maximum(to, on)
    return {
        "bits": bits,
        "searches": {"way to it": searches(to, own), "and on from it": searches(both, own)},
        "error": {"first end alone": error(to), "first of both bounds": error(both), "second turn": error(again)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("bench/results/closed_paths.json"))
    args = parser.parse_args()
    rows = [measure(bits, args.paths) for bits in BITS]
    files.write_json(args.out, {"command": f"python bench/closed_paths.py --paths {args.paths}", "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
