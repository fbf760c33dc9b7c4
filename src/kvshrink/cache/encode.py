"""Exact tokens as stored pages: keys and values each through their codec, in the way that the layer asks for."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvshrink.methods._roles import Codec, Stored
from kvshrink.shapes import Bool, Float

ENCODE_TOKENS = 2048  # encoded at a time in a prefill, so that float32 copies stay small


def encode(
    codecs: tuple[Codec, Codec],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    valid: Bool[Tensor, "b t"] | None,
    importance: Float[Tensor, "b h t"] | None,
    base: Callable[[str], Stored] | None,
) -> dict[str, Tensor]:
    """Tensors of keys and values under "k." and "v."; joint codecs store both under "k.".

    importance: of tokens, where codecs need it. base: keys or values in the layer that this one is a delta of.
    """
    key_codec, value_codec = codecs
    rows = torch.cat([keys, values], 1) if key_codec.joint else keys
    parts = [("k.", key_codec, rows), ("v.", value_codec, values)][: 1 if key_codec.joint else 2]
    stored: dict[str, Tensor] = {}
    for prefix, codec, x in parts:
        own = codec.encode(x, valid, importance, None if base is None else base(prefix))
        stored |= {f"{prefix}{k}": t for k, t in own.items()}
    return stored
