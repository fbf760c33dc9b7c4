"""Fisher information of the key and value projections: how much a loss changes with them.

The empirical diagonal, summed over a projection's weights: Palu (arXiv 2407.21118) shares ranks by it. One row at a
time; its graph is gone before the next.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kvshrink.attach.families import LayerInfo
from kvshrink.attach.projections import key_value_parts
from kvshrink.errors import DataError, UnsupportedModelError
from kvshrink.shapes import Int


def squared_gradients(
    model: nn.Module, infos: Mapping[int, LayerInfo], rows: Int[Tensor, "rows length"], tail: int
) -> dict[int, tuple[float, float]]:
    """{layer: (key, value)}: squares of the gradient of the mean loss of a row's last `tail` tokens, summed over the
    weights of each projection and over the rows.

    Raises DataError if a gradient is not finite or the weights are no floats.
    """
    parts = {}
    for i, info in infos.items():
        known = key_value_parts(info.module)
        if known is None:
            raise UnsupportedModelError(
                f"the key and value weights of {type(info.module).__name__} are not known, and this method asks for "
                "their gradient. Use allocation by KL, such as spectral or CSKV(budget=)."
            )
        parts[i] = known
    weights = list({id(w): w for pair in parts.values() for w, _ in pair}.values())  # a fused one makes both
    if other := [w.dtype for w in weights if not w.is_floating_point()]:
        raise DataError(f"weights stored as {other[0]} have no gradient. Load the model in a float dtype.")
    totals = {i: [0.0, 0.0] for i in parts}
    with only(model, weights), torch.enable_grad():
        for row in rows[:, None]:
            logits = model(input_ids=row, use_cache=False, logits_to_keep=tail + 1).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits.float(), row[0, -tail:])
            gradient = dict(zip(map(id, weights), torch.autograd.grad(loss, weights), strict=True))
            for i, pair in parts.items():
                for kv, (weight, channels) in enumerate(pair):
                    totals[i][kv] += float(gradient[id(weight)][channels].float().square().sum())
            del logits, loss, gradient
    if not all(torch.tensor(pair).isfinite().all() for pair in totals.values()):
        raise DataError("the loss has a gradient that is NaN or infinite on the calibration text. Check the weights.")
    return {i: (key, value) for i, (key, value) in totals.items()}


@contextmanager
def only(model: nn.Module, wanted: Sequence[Tensor]) -> Iterator[None]:
    """Only these parameters get gradients: a graph of all would keep every layer's input."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for weight in wanted:
            weight.requires_grad_(True)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
