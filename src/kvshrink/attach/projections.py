"""The weights that make keys and values, where a module names them as most do. Who needs them asks for them."""

from typing import Any

import torch
from torch import Tensor

from kvshrink.shapes import Float
from kvshrink.store.plain import is_plain

SWAMPS = 30  # a key bias to what varies, from which on 8 bits of a token would be for the bias
Part = tuple[Any, slice]  # a linear module, and which rows of its weight


def key_value_linears(module: Any) -> tuple[Part, Part] | None:
    """The linear modules of keys and of values; None: they have other names, or one of them is missing."""
    joint = getattr(module, "qkv_proj", None)
    if joint is not None and getattr(joint, "weight", None) is not None:
        n = module.config.num_key_value_heads * module.head_dim
        total = joint.weight.shape[0]
        if total != (module.config.num_attention_heads + 2 * module.config.num_key_value_heads) * module.head_dim:
            return None
        return (joint, slice(total - 2 * n, total - n)), (joint, slice(total - n, total))
    pair = getattr(module, "k_proj", None), getattr(module, "v_proj", None)
    if any(getattr(part, "weight", None) is None for part in pair):
        return None
    return (pair[0], slice(None)), (pair[1], slice(None))


def key_value_parts(module: Any) -> tuple[tuple[Tensor, slice], tuple[Tensor, slice]] | None:
    """(weight, rows of it that make keys), and the same of values; None: they are not known."""
    found = key_value_linears(module)
    if found is None or not all(map(is_plain, (part.weight for part, _ in found))):
        return None
    (key, key_rows), (value, value_rows) = found
    return (key.weight, key_rows), (value.weight, value_rows)


def key_value_weights(module: Any) -> tuple[Tensor, Tensor] | None:
    """Weights [n, hidden] of the key and value projections."""
    found = key_value_parts(module)
    return None if found is None else (found[0][0][found[0][1]], found[1][0][found[1][1]])


def key_value_biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Biases [n] of the key and value projections; None: they have none, or are not known."""
    found = key_value_linears(module)
    if found is None:
        return None, None
    key, value = (None if part.bias is None else part.bias[rows].detach() for part, rows in found)
    return key, value


def output_weight(module: Any, dim: int) -> Float[Tensor, "hidden q d"] | None:
    """Weight of the output projection by query head of `dim` channels; None: it is not known."""
    names = ("o_proj", "out_proj", "dense")
    part = next((p for n in names if (p := getattr(module, n, None)) is not None), None)
    weight = getattr(part, "weight", None)
    if weight is None or not is_plain(weight) or weight.dim() != 2 or weight.shape[1] % dim:
        return None
    found: Tensor = weight.unflatten(-1, (-1, dim))
    return found


def key_constant(module: Any, dim: int) -> tuple[Float[Tensor, "h d"], Float[Tensor, "h d"]] | None:
    """(bias of the key projection, what varies beside it); None: there is no bias, or nothing to tell by."""
    known = _bias_and_weight(module)
    if known is None or not known[1].is_floating_point():
        return None
    bias, weight = known
    # of inputs with a variance of one, as norms leave them
    spread = weight.detach().float().norm(dim=1).view(-1, dim)
    return bias.detach().float().view_as(spread), spread


def swamped(module: Any) -> bool:
    """By some rows of the weight, since it is asked for every cache; of weights stored as codes nothing is known."""
    found = _bias_and_weight(module)
    if found is None:
        return False
    bias, weight = found
    known = weight.is_floating_point() and weight.dtype.itemsize > 1
    spread = float(weight.detach()[:: max(1, len(weight) // 64)].float().norm(dim=1).mean()) if known else 1.0
    return float(bias.detach().abs().max()) >= SWAMPS * spread


@torch.no_grad()
def _bias_and_weight(module: Any) -> tuple[Tensor, Tensor] | None:
    bias, found = key_value_biases(module)[0], key_value_linears(module)
    if bias is None or bias.is_meta or found is None:
        return None
    part, rows = found[0]
    return bias, part.weight[rows] if is_plain(part.weight) else part.weight
