"""What wraps a packing or a codec hands on the importance of tokens."""

import dataclasses

import pytest
import torch

from kvshrink import methods
from kvshrink.methods._packing import Affine, Packing, Salient, Separable
from kvshrink.methods._packing.base import Around
from kvshrink.methods._packing.by_channel import ByChannel, Rotated
from kvshrink.methods._packing.parts import Parts
from kvshrink.methods._packing.residual import Residual
from kvshrink.methods._packing.sinkhorn import Sinkhorn
from kvshrink.methods._packing.sparse import Sparse
from kvshrink.methods._roles import Codec
from kvshrink.methods._stats import LayerShape


def salient(width: int) -> Salient:
    high, low = (Affine(1, width, page, bits, "token", width) for page, bits in ((8, 8), (24, 2)))
    return Salient(2, width, high, low)


WRAPPERS: dict[type, Packing] = {
    Separable: Separable(salient(8)),
    Sparse: Sparse(salient(8), "token", 2, "far"),
    Parts: Parts(salient(8), 2),
    Residual: Residual(salient(8), 1),
    Sinkhorn: Sinkhorn(salient(8)),
    Rotated: Rotated(salient(8), torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q),
    ByChannel: ByChannel(salient(4), salient(4), "size"),
}


def test_every_wrapper_is_here():
    assert {*Around.__subclasses__(), ByChannel} == set(WRAPPERS)


@pytest.mark.parametrize("packing", WRAPPERS.values(), ids=lambda p: type(p).__name__)
def test_a_wrapper_hands_on_the_importance_of_tokens(packing):
    assert packing.needs_importance
    rows = torch.randn(1, 2, 64, 8)
    importance = torch.zeros(1, 2, 64)
    importance[:, :, 20:24] = 1.0
    plain, told = (packing.load(s) for s in (packing.store(rows, None), packing.store(rows, None, importance)))
    error = [(x - rows)[:, :, 20:24].norm() for x in (plain, told)]
    assert error[1] < 0.7 * error[0], "important tokens are stored in more bits"
    alike = packing.store(rows, None, torch.zeros(1, 2, 64))
    assert all(torch.equal(t, alike[k]) for k, t in packing.store(rows, None).items())


@pytest.mark.parametrize("packing", [Separable, Sparse, Residual])
def test_a_wrapper_of_what_does_not_ask_does_not_ask(packing):
    inner = Affine(2, 8, 32, 4, "token", 8)
    assert not dataclasses.replace(WRAPPERS[packing], inner=inner).needs_importance


@pytest.mark.parametrize("name", methods.names())
def test_a_codec_around_another_one_asks_as_that_one_does(name, stats_of):
    shape = LayerShape(2, 16, torch.float32)
    method = methods.build(name, {"keep": 0.5} if "keep" in methods.get(name).__dataclass_fields__ else {})
    fitted = method.fit_layer(stats_of(shape)) if method.needs_fit else {}
    for codec in method.codecs(shape, fitted) or ():
        for field in dataclasses.fields(codec):
            inner = getattr(codec, field.name)
            assert not isinstance(inner, Codec) or inner.needs_importance == codec.needs_importance
