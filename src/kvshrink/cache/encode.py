"""Exact tokens as stored pages: each side through its codec, in the way that the layer asks for."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvshrink.methods._roles import Codec, Stored
from kvshrink.shapes import Bool, Float


def encode(
    codecs: tuple[Codec, Codec],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t d"],
    valid: Bool[Tensor, "b t"] | None,
    worth: Float[Tensor, "b h t"] | None,
    base: Callable[[str], Stored] | None,
) -> dict[str, Tensor]:
    """Tensors of both sides under "k." and "v."; joint codecs store both under "k.".

    worth: what tokens are worth, where codecs ask. base: pages of a side in the layer that this one follows.
    """
    key_codec, value_codec = codecs
    rows = torch.cat([keys, values], 1) if key_codec.joint else keys
    sides = [("k.", key_codec, rows), ("v.", value_codec, values)][: 1 if key_codec.joint else 2]
    stored: dict[str, Tensor] = {}
    for side, codec, x in sides:
        if base is not None:
            own = codec.encode_after(base(side), x, valid)
        elif worth is not None:
            own = codec.encode_by_worth(x, valid, worth)
        else:
            own = codec.encode(x, valid)
        stored |= {f"{side}{k}": t for k, t in own.items()}
    return stored
