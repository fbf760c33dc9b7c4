"""A page of all layers as one record of fixed bytes: what servers keep, send and load, with no cache around it.

A record depends on the tokens of its page and on where the page begins, and on nothing else. Layers that are stored
alike go through their codec together, as rows of one batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvshrink.attach.factory import make_cache
from kvshrink.attach.families import shape_of
from kvshrink.attach.hook import attach
from kvshrink.cache.encode import encode
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.layout import before_rope
from kvshrink.cache.rope import Rope, as_stored, as_used
from kvshrink.errors import SettingError
from kvshrink.kernels.records import Layout
from kvshrink.methods import name_of
from kvshrink.methods._roles import Codec, Method
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.artifact import Artifact
from kvshrink.shapes import Float, Int, UInt8
from kvshrink.store.inference import outside_inference_mode

Rows = Mapping[int, tuple[Tensor, Tensor]]  # by layer: keys as attention uses them and values, [p, h, t, d]


@dataclass(frozen=True, eq=False)
class Alike:
    """Layers that go through the same codecs. codecs: None where rows are kept as they are; layout: of one page."""

    layers: list[int]
    shape: LayerShape
    codecs: tuple[Codec, Codec] | None
    rope: Rope | None
    layout: Layout
    page: int

    def pack(
        self,
        keys: Float[Tensor, "b h t d"],
        values: Float[Tensor, "b h t e"],
        first: Int[Tensor, " b"],
    ) -> UInt8[Tensor, "b p size"]:
        """Records of rows of whole pages, as a cache encodes them: sinks are in their page too."""
        pages = keys.shape[2] // self.page
        assert keys.shape[2] % self.page == 0, "a block is whole pages"
        if self.codecs is None:
            stored = {"k": keys.unflatten(2, (pages, -1)), "v": values.unflatten(2, (pages, -1))}
            stored = {name: x.movedim(2, 1).to(self.shape.dtype) for name, x in stored.items()}
        else:
            own = as_stored(self.codecs[0], keys, _positions(first, keys.shape[2]), self.rope)
            stored = encode(self.codecs, own, values, None, None, None)
        records = torch.zeros(len(keys), 1, pages, self.layout.size, dtype=torch.uint8, device=keys.device)
        self.layout.write(records, stored)
        return records[:, 0]

    def unpack(
        self, records: UInt8[Tensor, "b p size"], first: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t e"]]:
        """Rows as `pack` takes them."""
        stored = {name: self.layout.read(name, records[:, None]) for name in self.layout.fields}
        if self.codecs is None:
            return stored["k"].movedim(1, 2).flatten(2, 3), stored["v"].movedim(1, 2).flatten(2, 3)
        key_codec, value_codec = self.codecs
        own, other = ({n.removeprefix(p): t for n, t in stored.items() if n.startswith(p)} for p in ("k.", "v."))
        keys = key_codec.decode(own, self.shape.heads)
        values = value_codec.decode(own if value_codec.joint else other, self.shape.heads)
        return as_used(key_codec, keys, _positions(first, keys.shape[2]), self.rope), values


class PageRecords:
    """Records of a method for one model. page: tokens of a record; nbytes: bytes of one, of all layers."""

    def __init__(self, alike: list[Alike], method: Method) -> None:
        self.alike, self.method, self.page = alike, method, method.page
        self.nbytes = sum(part.layout.size * len(part.layers) for part in alike)

    @classmethod
    @outside_inference_mode
    def of(cls, model: Any, method: Method | Artifact) -> "PageRecords":
        """For a transformers model, which this attaches.

        Raises SettingError for a method whose pages do not follow from their own tokens: one that ranks or drops
        tokens, stores a layer as a delta, or lets pages grow old; and whatever `make_cache` raises.
        """
        own = method.method if isinstance(method, Artifact) else method
        cache, infos = make_cache(model, method), attach(model).layers
        found: list[Alike] = []
        for i, (layer, info) in enumerate(zip(cache.layers, infos, strict=True)):
            if not isinstance(layer, CompressedLayer):
                if not info.heads:
                    raise SettingError(f"layer {i} ({info.kind}) keeps no keys and values of tokens. It has no pages.")
                shape = shape_of(info)
                found.append(Alike([i], shape, None, None, layout_of(None, shape, own.page), own.page))
                continue
            codecs = _codecs_of(layer, own)
            turns = info.rope is not None and info.rope.long is not None
            if turns and (before_rope(codecs) or codecs[0].constant is not None):
                raise SettingError(f"the model turns long prompts otherwise (longrope), which {name_of(own)} undoes.")
            learnt = isinstance(method, Artifact) and bool(method.layers)
            known = next((p for p in found if not learnt and _same(p, layer.shape, codecs, info.rope)), None)
            if known is None:
                found.append(
                    Alike([i], layer.shape, codecs, info.rope, layout_of(codecs, layer.shape, own.page), own.page)
                )
            else:
                known.layers.append(i)
        return cls(found, own)

    def at(self, layer: int) -> Alike:
        """Of the layers that this one is among."""
        return next(part for part in self.alike if layer in part.layers)

    @outside_inference_mode
    def pack(self, rows: Rows, first: Int[Tensor, " p"]) -> UInt8[Tensor, "p n"]:
        """Records of p blocks of t tokens, t a multiple of the page: n = t / page * nbytes. first: position of each
        block's first token."""
        p, parts = len(first), []
        for part in self.alike:
            count = len(part.layers)
            keys, values = (torch.cat([rows[i][side] for i in part.layers]) for side in (0, 1))
            records = part.pack(keys, values, first.repeat(count))
            size = records.shape[1] * part.layout.size
            parts.append(records.view(count, p, size).transpose(0, 1).reshape(p, count * size))
        return torch.cat(parts, 1)

    @outside_inference_mode
    def unpack(self, records: UInt8[Tensor, "p n"], first: Int[Tensor, " p"]) -> dict[int, tuple[Tensor, Tensor]]:
        """Rows as `pack` takes them, from its records."""
        p, at = len(first), 0
        found: dict[int, tuple[Tensor, Tensor]] = {}
        pages = records.shape[1] // self.nbytes
        assert records.shape[1] == pages * self.nbytes, "records are whole"
        for part in self.alike:
            count, size = len(part.layers), pages * part.layout.size
            own = records[:, at : at + count * size].unflatten(1, (count, pages, -1)).transpose(0, 1)
            at += count * size
            keys, values = part.unpack(own.reshape(count * p, pages, part.layout.size), first.repeat(count))
            found |= {i: (keys[n * p : (n + 1) * p], values[n * p : (n + 1) * p]) for n, i in enumerate(part.layers)}
        return dict(sorted(found.items()))


def _positions(first: Int[Tensor, " b"], tokens: int) -> Int[Tensor, "b t"]:
    return (first[:, None] + torch.arange(tokens, device=first.device)).to(torch.int32)


def _codecs_of(layer: CompressedLayer, method: Method) -> tuple[Codec, Codec]:
    """Raises SettingError for what is no function of a page's own tokens."""
    name, policy, codecs = name_of(method), layer.policy, layer.codecs
    if policy.budget is not None or policy.scorer is not None or codecs is None:
        raise SettingError(
            f"{name} ranks or drops tokens, so that pages depend on what else there is. Take a quantiser."
        )
    if len(layer.tiers) > 1 or layer.base is not None or any(codec.needs_importance for codec in codecs):
        raise SettingError(
            f"{name} as it is set stores pages by their age, their layer or their importance. Turn that off."
        )
    return codecs


def _same(part: Alike, shape: LayerShape, codecs: tuple[Codec, Codec], rope: Rope | None) -> bool:
    """Whether a layer of a method that learns nothing is stored as these are; what keys have in common is its own."""
    plain = part.codecs is not None and part.codecs[0].constant is None and codecs[0].constant is None
    return plain and part.shape == shape and _turned_alike(part.rope, rope)


def _turned_alike(one: Rope | None, other: Rope | None) -> bool:
    if one is None or other is None:
        return one is other
    plain = one.long is None and other.long is None
    same = (one.scaling, one.interleaved) == (other.scaling, other.interleaved)
    return plain and same and torch.equal(one.inv_freq, other.inv_freq)


def layout_of(codecs: tuple[Codec, Codec] | None, shape: LayerShape, page: int) -> Layout:
    """How a layer's record lies, seen on a page of zeros."""
    keys = torch.zeros(1, shape.heads, page, shape.head_dim, dtype=shape.dtype, device="cpu")
    values = torch.zeros(1, shape.heads, page, shape.value_dim, dtype=shape.dtype, device="cpu")
    if codecs is None:
        return Layout.of({"k": keys[:, None], "v": values[:, None]})
    return Layout.of(encode(codecs, keys, values, None, None, None))
