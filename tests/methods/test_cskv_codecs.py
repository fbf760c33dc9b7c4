"""CSKV's latents as every quantiser stores them: the same bytes as promised, and no more lost than what is rounded."""

import dataclasses

import pytest
import torch

from kvshrink import CSKV, methods
from kvshrink.attach.fitted import moved
from kvshrink.errors import SettingError
from kvshrink.methods._quantiser import Quantiser
from kvshrink.methods._roles import Codec
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.saw_int4 import SAWInt4

SHAPE = LayerShape(4, 20, torch.float32)
QUANTISERS = [n for n in methods.names() if issubclass(c := methods.get(n), Quantiser) and c.of_latents]


def offered(name: str) -> list:
    """Bits of a quantiser that CSKV may ask for."""
    cls = methods.get(name)
    if "bits" not in {f.name for f in dataclasses.fields(cls)}:
        return [None]
    found = []
    for bits in (None, 8, 4, 3, 2, 1.5, 1):
        try:
            cls(bits=bits)
        except (SettingError, TypeError):
            continue
        found.append(bits)
    return found


@pytest.mark.parametrize(("name", "bits"), [(n, b) for n in QUANTISERS for b in offered(n)])
@pytest.mark.parametrize("group_heads", [None, 1])
def test_latents_are_stored_in_the_bytes_promised_and_come_back(name, bits, group_heads, stats_of):
    method = CSKV(keep=0.7, bits=bits, codec=name, group_heads=group_heads)
    stats = stats_of(SHAPE)
    fitted, plain = method.fit_layer(stats), CSKV(keep=0.7, group_heads=group_heads)
    rows = stats.sample.keys_pre_rope[:64].transpose(0, 1)[None], stats.sample.values[:64].transpose(0, 1)[None]
    promised = 0
    for codec, exact, x in zip(
        method.codecs(SHAPE, fitted), plain.codecs(SHAPE, plain.fit_layer(stats)), rows, strict=True
    ):
        stored = codec.encode(x, None)
        assert sum(t.nbytes for t in stored.values()) == 2 * codec.page_bytes()
        promised += codec.page_bytes()
        want, got = exact.smooth(x), codec.decode(stored, SHAPE.heads)
        # what one bit between minimum and maximum loses is more than there is
        most = 0.66 if bits != 1 else 2.5
        assert (got - want).square().sum() < most * (want - want.mean(2, keepdim=True)).square().sum()
    assert method.bits_per_token(SHAPE, fitted) == promised * 8 / method.page == method.bits_per_token(SHAPE, {})


def test_a_codec_that_is_none_is_refused():
    with pytest.raises(SettingError, match="does not store latents"):
        CSKV(codec="streaming_llm")
    with pytest.raises(SettingError, match="Did you mean 'rtn'"):
        CSKV(codec="rtm")
    with pytest.raises(SettingError, match="bits=5"):
        CSKV(codec="kivi", bits=5)


def test_a_basis_follows_the_model_to_its_device(stats_of):
    """A rotation that no fit has made is made on the CPU."""
    for method in (SAWInt4(), CSKV(keep=0.5, bits=4, codec="turboquant")):
        fitted = method.fit_layer(stats_of(SHAPE)) if method.needs_fit else {}
        for tier in method.tiers(SHAPE, fitted):
            for codec in moved(tier, torch.device("meta")).codecs:
                assert {t.device.type for t in (codec.up, codec.down, codec.mean)} == {"meta"}


@pytest.mark.parametrize("name", sorted(methods.names()))
def test_every_codec_follows_the_model_to_its_device(name, stats_of):
    """All tensors that it holds itself, in codecs inside it too; what a packing holds is small and goes by itself."""
    method, shape = methods.build(name, {}), LayerShape(4, 64, torch.float32)
    fitted = method.fit_layer(stats_of(shape))
    pair = method.codecs(shape, method.finish({0: fitted}, {0: shape}, None)[0][0] if not method.probes else fitted)
    for codec in pair or ():
        assert {t.device.type for t in tensors(codec.to(torch.device("meta")))} <= {"meta"}
        assert not any(t.is_meta for t in tensors(codec)), "it is another object that moved"


def tensors(codec: Codec) -> list[torch.Tensor]:
    """Of a codec's fields, and of those of codecs among them."""
    found = []
    for f in dataclasses.fields(codec):
        value = getattr(codec, f.name)
        found += [value] if isinstance(value, torch.Tensor) else tensors(value) if isinstance(value, Codec) else []
    return found
