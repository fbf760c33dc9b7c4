"""Triplets of normal numbers as a direction on the octahedron and a length (OCTOPUS, arXiv 2605.21226), beside one
Lloyd-Max code a number, at the same bits.

    python bench/octahedral.py      # writes bench/results/octahedral.json

A direction is mapped to a square, whose two coordinates and the triplet's length have tables of their own: fitted to
the square's numbers weighted by what an error in them costs, then by `--rounds` rounds in which the best of nine
neighbouring directions is taken and all tables move to where the squared error falls. Bits of a triplet are three times
a number's.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from kvshrink.kernels.normal.reference import levels
from kvshrink.methods._packing.codebook import nearest
from kvshrink.methods.quant._tables import fitted
from kvshrink.store import files

STEP = 1e-3  # of a derivative by difference


def to_square(rows: Tensor) -> Tensor:
    """Directions of [n, 3] on the octahedron, its lower half folded outwards: [n, 2] in -1 to 1."""
    flat = rows / rows.abs().sum(-1, keepdim=True)
    xy, z = flat[:, :2], flat[:, 2:]
    sign = torch.where(xy >= 0, 1.0, -1.0)
    return torch.where(z >= 0, xy, (1 - xy.flip(-1).abs()) * sign)


def to_sphere(square: Tensor) -> Tensor:
    """The unit directions again."""
    z = 1 - square.abs().sum(-1, keepdim=True)
    xy = square - torch.where(square >= 0, 1.0, -1.0) * (-z).clamp_min(0)
    rows = torch.cat([xy, z], -1)
    return rows / rows.norm(dim=-1, keepdim=True)


def slope(square: Tensor, axis: int) -> Tensor:
    """How a direction moves with a coordinate: [n, 3]."""
    step = STEP * torch.eye(2)[axis]
    return (to_sphere(square + step) - to_sphere(square - step)) / (2 * STEP)


class Code:
    """Tables of the two coordinates and of the length, fitted to rows [n, 3]."""

    def __init__(self, rows: Tensor, bits: tuple[int, int, int]) -> None:
        self.rows, square, size = rows, to_square(rows), rows.norm(dim=-1)
        cost = [(slope(square, axis).square().sum(-1) * size.square()).clamp(max=1e3) for axis in (0, 1)]
        self.axes = [fitted(square[:, a], cost[a], 2 ** bits[a]) for a in (0, 1)]
        self.sizes = fitted(size, torch.ones_like(size), 2 ** bits[2]) if bits[2] else size.mean()[None]
        self.base = square

    def choose(self) -> tuple[float, list[Tensor]]:
        """(mean squared error of a number, the codes): the best of nine directions about the nearest."""
        near = [nearest(self.base[:, a], self.axes[a]).long() for a in (0, 1)]
        best, codes = torch.full((len(self.rows),), torch.inf), [*near, torch.zeros_like(near[0])]
        for move in torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)):
            at = [(near[a] + move[a]).clamp(0, len(self.axes[a]) - 1) for a in (0, 1)]
            way = to_sphere(torch.stack([self.axes[a][at[a]] for a in (0, 1)], -1))
            size = nearest((self.rows * way).sum(-1), self.sizes).long()
            error = (self.sizes[size][:, None] * way - self.rows).square().sum(-1)
            better = error < best
            best = error.where(better, best)
            codes = [new.where(better, old) for new, old in zip([*at, size], codes, strict=True)]
        return float(best.mean() / 3), codes

    def improve(self, codes: list[Tensor]) -> None:
        """Lengths to their means, coordinates by a damped Gauss-Newton step each."""
        square = torch.stack([self.axes[a][codes[a]] for a in (0, 1)], -1)
        along = (self.rows * to_sphere(square)).sum(-1)
        self.sizes = _means(along, codes[2], self.sizes)
        size = self.sizes[codes[2]][:, None]
        wrong = self.rows - size * to_sphere(square)
        for axis in (0, 1):
            turn = slope(square, axis) * size
            up, down = (torch.zeros_like(self.axes[axis]) for _ in range(2))
            up.index_add_(0, codes[axis], (turn * wrong).sum(-1))
            down.index_add_(0, codes[axis], turn.square().sum(-1))
            self.axes[axis] = (self.axes[axis] + 0.7 * up / down.clamp_min(1e-9)).clamp(-1, 1).sort().values


def _means(numbers: Tensor, codes: Tensor, before: Tensor) -> Tensor:
    total, count = torch.zeros_like(before), torch.zeros_like(before)
    total.index_add_(0, codes, numbers)
    count.index_add_(0, codes, torch.ones_like(numbers))
    return torch.where(count > 0, total / count.clamp_min(1), before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--triplets", type=int, default=2**17)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    rows = torch.randn(args.triplets, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for bits in (1, 2, 3, 4):
        table = levels(bits).float()
        scalar = float((table[nearest(rows, table).long()] - rows).square().mean())
        for split in ((bits + 1, bits, bits - 1), (bits, bits, bits)):
            code, errors = Code(rows, split), []
            for _ in range(args.rounds):
                error, codes = code.choose()
                errors.append(error)
                code.improve(codes)
            row = {"bits": bits, "split": split, "of_lloyd_max": round(min(errors) / scalar, 4)}
            found.append(row | {"lloyd_max": round(scalar, 5)})
            print(found[-1])
    command = f"python bench/octahedral.py --triplets {args.triplets} --rounds {args.rounds}"
    files.write_json(args.out / "octahedral.json", {"command": command, "rows": found})


if __name__ == "__main__":
    main()
