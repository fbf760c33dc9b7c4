"""Masks and positions as users make them, and as nobody should."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LOWEST = (torch.finfo(torch.float32).min, -float("inf"), -1e4, -1e9, -65504.0)
FAINT = -1000.0  # a query that sees nothing above this reads rounding errors


class Drawn(NamedTuple):
    """A mask for some new tokens.

    real: which new columns any new query sees. read: new tokens whose logits mean something; both [b, s].
    """

    kind: str
    mask: Tensor | None
    real: np.ndarray
    read: np.ndarray


def draw(rng: np.random.Generator, pads: np.ndarray, s: int, heads: int) -> Drawn:
    """A random mask of the columns so far, of which `pads` [b, seen] are none, and of s new ones."""
    kind = str(rng.choice(["none", "2-D", "2-D", "2-D", "4-D", "4-D", "4-D", "nonsense"]))
    if kind == "none" or (kind == "2-D" and rng.random() < 0.2):
        # without a mask, though there may be pads, which is refused
        everything = np.ones((len(pads), s), bool)
        return Drawn("none", None, everything, everything)
    if kind == "nonsense":
        return _nonsense(rng, pads, s)
    return _columns(rng, pads, s) if kind == "2-D" else _entries(rng, pads, s, heads)


def _columns(rng: np.random.Generator, pads: np.ndarray, s: int) -> Drawn:
    b, seen = pads.shape
    real = np.ones((b, s), bool)
    where = rng.choice(["left", "right", "middle", "nowhere"])
    for row in range(b):
        count = int(rng.integers(0, s)) if rng.random() < 0.7 else 0
        if where == "left":
            real[row, :count] = False
        elif where == "right" and count:
            real[row, -count:] = False
        elif where == "middle":
            real[row] = rng.random(s) > 0.3
            real[row, -1] |= s > 1  # a single new token may be hidden, itself
    old = ~pads
    if rng.random() < 0.2:  # a turn that hides some of what is kept
        old &= rng.random(old.shape) > 0.3
        old[:, -1:] |= ~pads[:, -1:]
    if rng.random() < 0.05 and pads.any():  # or shows what was not kept
        old |= rng.random(old.shape) < 0.5
    mask = np.concatenate([old, real], 1)
    causal = np.arange(seen + s) <= np.arange(seen, seen + s)[:, None]
    read = (mask[:, None] & causal).any(-1)
    kinds = (torch.long, torch.bool, torch.float32, torch.int32)
    return Drawn("2-D", torch.from_numpy(mask).to(kinds[rng.integers(len(kinds))]), real, read & real)


def _entries(rng: np.random.Generator, pads: np.ndarray, s: int, heads: int) -> Drawn:
    """A mask of its own for every new token: trees, packed documents, holes, by head, as bool or added to scores."""
    b, seen = pads.shape
    new, t = np.tril(np.ones((s, s), bool)), seen + s
    shape = rng.choice(["causal", "tree", "packed", "holes", "both ways"])
    if shape == "tree":
        new = _tree(rng, s)
    elif shape == "packed":
        part = np.sort(rng.integers(0, 3, s))
        new &= part == part[:, None]
    elif shape == "both ways":
        new |= True
    by_head = heads if rng.random() < 0.3 else 1
    mask = np.broadcast_to(new, (b, by_head, s, s)).copy()
    if shape == "holes":
        mask &= (rng.random((b, by_head, s, s)) > 0.3) | np.eye(s, dtype=bool)
    hidden = rng.random((b, s)) < (0.2 if s > 2 and rng.random() < 0.5 else 0.0)  # from every query: pads
    mask &= ~hidden[:, None, None]
    old = np.broadcast_to(~pads[:, None, None], (b, by_head, s, seen)).copy()
    if rng.random() < 0.3:
        old &= rng.random(old.shape) > 0.3
    full = np.concatenate([old, mask], 3)
    read = full.any(-1).all(1) & ~hidden
    if rng.random() < 0.2 and len(set(map(bytes, full))) == 1:  # alike in all rows: one is enough
        full = full[:1]
    return Drawn(f"4-D {shape}", *_as_tensor(rng, full, t), ~hidden, read)


def _as_tensor(rng: np.random.Generator, full: np.ndarray, t: int) -> tuple[Tensor]:
    mask = torch.from_numpy(full.copy())
    form = rng.choice(["bool", "lowest", "bias"])
    if form == "bool":
        return (mask,)
    low = LOWEST[rng.integers(2 if form == "bias" else len(LOWEST))]
    added = torch.zeros(mask.shape)
    if form == "bias":  # as ALiBi's, and steeper ones
        slope = torch.from_numpy(rng.random(full.shape[1])).float()[:, None, None]
        s = full.shape[2]
        distance = torch.arange(t) - torch.arange(t - s, t)[:, None]
        added = (slope * distance).expand(mask.shape).contiguous()
    return (added.masked_fill(~mask, low),)


def _tree(rng: np.random.Generator, s: int) -> np.ndarray:
    seen = np.eye(s, dtype=bool)
    for i in range(1, s):
        seen[i] |= seen[int(rng.integers(max(0, i - 4), i))]
    return seen


def _nonsense(rng: np.random.Generator, pads: np.ndarray, s: int) -> Drawn:
    """What DynamicCache would misread, or end in an error of torch: ours must refuse it in one line."""
    b, seen = pads.shape
    t = seen + s
    causal = torch.ones(s, t, dtype=torch.bool).tril(seen)[None, None]
    added = torch.zeros(1, 1, s, t).masked_fill(~causal, -torch.inf)
    wrong = [
        torch.ones(b, t + 1, dtype=torch.long),
        torch.ones(b + 1, t),
        torch.ones(b, s, t),
        torch.ones(t),
        causal.long(),
        causal[..., :-1],
        causal.expand(b + 1, 1, s, t),
        added.masked_fill(causal, torch.nan),
        added.masked_fill(causal, torch.inf),
    ]
    if seen:
        wrong += [torch.ones(b, s, dtype=torch.long), causal[..., seen:]]
    everything = np.ones((b, s), bool)
    return Drawn("nonsense", wrong[rng.integers(len(wrong))], everything, everything)


def positions(rng: np.random.Generator, following: np.ndarray, real: np.ndarray) -> tuple[Tensor | None, np.ndarray]:
    """(position ids of the new tokens or None, each row's next position)."""
    b, s = real.shape
    kind = rng.choice(
        ["counted", "counted", "none", "jump", "repeat", "back", "one row", "wrong"],
        p=[0.3, 0.2, *[0.1] * 3, 0.05, 0.1, 0.05],
    )
    if kind == "none":
        return None, following + s
    ids = following[:, None] + real.cumsum(1) - 1
    if kind == "jump":
        ids = ids + rng.integers(0, 200)
    elif kind == "repeat":
        ids = ids // 2
    elif kind == "back":
        ids = ids[:, ::-1].copy()
    elif kind == "one row":
        ids = ids[:1]
    ended = np.broadcast_to(ids.max(1) + 1, (b,)).copy()
    ids = np.where(np.broadcast_to(real, ids.shape) if len(ids) == b else True, ids, rng.integers(-1, 2))
    if kind == "wrong":
        at = rng.integers(4)
        ids = [-ids - 1, ids + 2**31, ids[:, None], ids + 0.5][at]
    return torch.from_numpy(np.ascontiguousarray(ids)), ended
