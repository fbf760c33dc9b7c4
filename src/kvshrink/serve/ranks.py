"""Records of a rank of a tensor-parallel server: the same pages, of its share of the KV heads alone.

What stores each head, or each group of neighbouring heads, by itself is shared out; one basis of all heads is not. A
fit with `shards` has a basis for each rank's heads.
"""

from dataclasses import fields, replace
from typing import Any

import torch

from kvshrink.errors import SettingError
from kvshrink.methods import name_of
from kvshrink.methods._codec import Codec
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._codecs.headwise import HeadwiseCodec
from kvshrink.methods._packing import Packing
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import LayerShape
from kvshrink.serve.records import Alike, layout_of

SAME = 1e-3  # share of a row's norm by which a rank's rows may differ: codes are rounded after sums in another order


def of_rank(part: Alike, rank: int, ranks: int, method: Method) -> Alike:
    """Records of layers of one of so many ranks, each of which has as many neighbouring KV heads.

    Raises SettingError where they cannot be shared out, or where a head's rows would not be what they are on one rank.
    """
    if ranks == 1:
        return part
    heads = part.shape.heads
    if heads % ranks:
        raise SettingError(f"{heads} KV heads cannot be shared out to {ranks} ranks. Use a divisor of the heads.")
    shape, codecs = replace(part.shape, heads=heads // ranks), None
    if part.codecs is not None:
        key, value = (_codec(codec, rank, ranks) for codec in part.codecs)
        if key is None or value is None:
            raise SettingError(f"{name_of(method)} stores heads of several ranks together. {_remedy(method, ranks)}")
        codecs = key, value
    found = replace(part, shape=shape, codecs=codecs, layout=layout_of(codecs, shape, part.page))
    if not _agree(part, found, slice(rank * shape.heads, (rank + 1) * shape.heads)):
        raise SettingError(f"{name_of(method)} stores a head otherwise beside other heads. {_remedy(method, ranks)}")
    return found


def _remedy(method: Method, ranks: int) -> str:
    own = hasattr(method, "shards")
    return f"Fit it with shards={ranks}." if own else "Take a quantiser, such as turboquant, or spectral with shards."


def _codec(codec: Codec, rank: int, ranks: int) -> Codec | None:
    """Of a rank's heads; None: there is none."""
    if not isinstance(codec, HeadwiseCodec | BasisCodec):
        return None
    packing = _packing(codec.packing, ranks)
    if packing is None:
        return None
    changed: dict[str, Any] = {"packing": packing}
    if codec.constant is not None:
        changed["constant"] = codec.constant.chunk(ranks)[rank]
    if isinstance(codec, BasisCodec):
        if len(codec.mean) % ranks:
            return None
        changed |= {name: getattr(codec, name).chunk(ranks)[rank] for name in ("down", "up", "mean")}
    return replace(codec, **changed)


def _packing(packing: Any, ranks: int) -> Packing | None:
    """Of a share of the groups, all of which it stores alike; None: it cannot be shared out."""
    changed: dict[str, Any] = {}
    for own in fields(packing):
        given = getattr(packing, own.name)
        if own.name in ("groups", "bases"):
            if given % ranks:
                return None
            changed[own.name] = given // ranks
        elif isinstance(given, Packing):
            changed[own.name] = _packing(given, ranks)
    return replace(packing, **changed) if changed and None not in changed.values() else None


def _agree(whole: Alike, found: Alike, heads: slice) -> bool:
    """Whether a page's rows of these heads come back alike from both."""
    rows = [
        _page(whole.shape, n, seed, whole.page) for seed, n in ((0, whole.shape.head_dim), (1, whole.shape.value_dim))
    ]
    first = torch.zeros(1, dtype=torch.long)
    want = whole.unpack(whole.pack(rows[0], rows[1], first), first)
    keys, values = (x[:, heads] for x in rows)
    got = found.unpack(found.pack(keys, values, first), first)
    pairs = ((x[:, heads].float(), y.float()) for x, y in zip(want, got, strict=True))
    return all(float((x - y).norm()) <= SAME * float(x.norm()) for x, y in pairs)


def _page(shape: LayerShape, width: int, seed: int, page: int) -> torch.Tensor:
    """Rows whose heads differ in size, as a model's do."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, shape.heads, page, width, generator=draw)
    return (rows * torch.linspace(0.5, 2, shape.heads)[:, None, None]).to(shape.dtype)
