"""How a layer's codecs lay out a page: names, dtypes and shapes, found by encoding one page of nothing but pads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvshrink.cache.body import truncated
from kvshrink.cache.encode import encode
from kvshrink.cache.snapshot import kernel_of
from kvshrink.kernels.decode import Choice
from kvshrink.kernels.records import recorded
from kvshrink.methods._roles import Codec, Stored
from kvshrink.methods._stats import LayerShape
from kvshrink.methods._tier import Tier
from kvshrink.store.inference import outside_inference_mode
from kvshrink.store.names import under


@outside_inference_mode
def empty_pages(
    tiers: Sequence[Tier], shape: LayerShape, page: int, device: torch.device, base: Stored | None = None
) -> list[dict[str, Tensor]]:
    """One page of pads as each tier stores it, none where tokens are dropped. base: of the layer that this follows.

    Pads are used because any codec stores them, whatever range its numbers were fitted to.
    """
    sizes = (1, shape.heads, page, shape.head_dim), (1, shape.heads, page, shape.value_dim)
    keys, values = (torch.zeros(size, dtype=shape.dtype, device=device) for size in sizes)
    pads = torch.zeros(1, page, dtype=torch.bool, device=device)
    found: list[dict[str, Tensor]] = []
    for tier in tiers:
        if tier.codecs is None:
            found.append({})
        elif found and not tier.beside:
            found.append(dict(truncated(found[-1], tier.codecs)))
        else:
            found.append(encode(tier.codecs, keys, values, pads, None, None if base is None else _side_of(base)))
    return found


def before_rope(codecs: tuple[Codec, Codec]) -> bool:
    """Whether keys are stored before RoPE."""
    return codecs[0].site == "k_pre"


def kernel_for(codecs: tuple[Codec, Codec], shape: LayerShape, page: int, device: torch.device) -> Choice:
    """The fused kernel for pages of a layer that holds none yet, or why there is none."""
    empty = empty_pages([Tier(codecs)], shape, page, device)[0]
    records = recorded(empty)
    keys = records.under("k.")
    values = keys if codecs[1].joint else records.under("v.")
    return kernel_of(codecs, (codecs[0].packed(keys), codecs[1].packed(values)), device)


def try_out(tiers: Sequence[Tier], shape: LayerShape, page: int, device: torch.device, base: Stored | None) -> Stored:
    """The youngest tier's empty page, after every tier's was read. Raises whatever codecs of a foreign shape do."""
    found = empty_pages(tiers, shape, page, device, base)
    for tier, stored in zip(tiers, found, strict=True):
        if tier.codecs is not None:
            beside = {} if base is None else {f"{k[:2]}base.{k[2:]}": t for k, t in base.items()}
            keys = _side_of({**stored, **beside})("k.")
            values = keys if tier.codecs[1].joint else _side_of({**stored, **beside})("v.")
            for codec, own in zip(tier.codecs, (keys, values), strict=True):
                _read(codec, own, shape, page)
    return found[0]


def _read(codec: Codec, stored: Stored, shape: LayerShape, page: int) -> None:
    """Ask a codec once for all that attention asks. Raises ValueError, or whatever else, if an answer does not fit."""
    latent = codec.unpack(stored)
    by_head = latent.repeat_interleave(shape.heads // latent.shape[1], 1)
    width = shape.value_dim if codec.site == "v" else shape.head_dim
    query = latent.new_zeros(1, shape.heads, 1, width)
    rows = [(codec.expand(latent, shape.heads), page)]
    if codec.site == "v":
        rows.append((codec.expand(by_head[:, :, :1], shape.heads), 1))
    elif (absorbed := codec.absorb(query)) is not None:
        _ = absorbed @ by_head.mT
    for found, tokens in rows:
        if found.dtype != torch.float32 or found.shape != (1, shape.heads, tokens, width):
            raise ValueError(f"rows are {found.dtype} of shape {list(found.shape)}")
    if codec.site != "v" and codec.reads(page * page) is not None:
        codec.scores(query, stored)
        codec.pick(stored, torch.zeros(1, 1, dtype=torch.int64, device=latent.device))


def _side_of(stored: Stored) -> Callable[[str], Stored]:
    return lambda kv: under(stored, kv)
