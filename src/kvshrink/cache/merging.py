"""What a dropped token has is not lost at once: its value joins that of the most similar token that stays."""

import torch
from torch import Tensor

from kvshrink.shapes import Bool, Float

TOKENS = 1024  # dropped tokens compared with those that stay at a time


def merged(
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    stays: Bool[Tensor, "b L t"],
    there: Bool[Tensor, "b L t"],
) -> Float[Tensor, "b h t e"]:
    """Values in which each token that stays has the mean of its own and of those of dropped tokens whose keys are
    nearest to its key by cosine. Keys stay as they are. there: which are tokens at all."""
    m = keys.shape[1] // stays.shape[1]  # heads of a lane
    found = values.clone()
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    for row, head in ((r, n) for r in range(len(keys)) for n in range(keys.shape[1])):
        own, real = stays[row, head // m], there[row, head // m]
        kept, gone = (x.nonzero()[:, 0] for x in (own, real & ~own))
        if not len(kept) or not len(gone):
            continue
        sums, counts = values[row, head, kept].float(), torch.ones(len(kept), 1, device=keys.device)
        for part in gone.split(TOKENS):
            nearest = (unit[row, head, part] @ unit[row, head, kept].T).argmax(1)
            sums.index_add_(0, nearest, values[row, head, part].float())
            counts.index_add_(0, nearest, torch.ones(len(part), 1, device=keys.device))
        found[row, head, kept] = (sums / counts).to(values.dtype)
    return found
