"""Golden source: attention over a dense mask, with the tokens chosen from the rebuilt keys by the written rule."""

import math

import pytest
import torch
from torch import Tensor

from kvshrink.cache import chosen
from kvshrink.cache.attend import attend, rebuild
from kvshrink.cache.cache import KVCache
from kvshrink.cache.rope import Rope
from kvshrink.cache.view import Mask, Visibility
from kvshrink.errors import SettingError
from kvshrink.methods._codecs.basis import BasisCodec
from kvshrink.methods._packing import packing
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.lowrank.cskv import CSKV
from kvshrink.methods.lowrank.sals import SALS
from tests.cache.build import feed, make

SHAPE = LayerShape(2, 8, torch.float32)
ROPE = Rope(torch.tensor([1.0, 0.3, 0.05]), 1.3, True)
QUERIES = 4
SCALING = 0.3


@pytest.fixture
def fitted(stats_of):
    return CSKV(keep=0.75).fit_layer(stats_of(SHAPE))


def filled(method, fitted, tokens: int, real: Tensor | None = None, seed: int = 0) -> KVCache:
    """A cache that took a prompt, then a few tokens one by one, so that pages come in several runs."""
    b = 2 if real is None else len(real)
    cache = make(method, SHAPE, [fitted])
    k, v = torch.randn(2, b, 2, tokens, 8, generator=torch.Generator().manual_seed(seed))
    first = tokens - 70
    feed(cache, [k[:, :, :first]], [v[:, :, :first]], ROPE, None if real is None else real[:, :first])
    for at in range(first, tokens):
        own = None if real is None else real[:, at : at + 1]
        feed(cache, [k[:, :, at : at + 1]], [v[:, :, at : at + 1]], ROPE, own)
    return cache


def step(cache: KVCache, query: Tensor, mask: Tensor | None = None, tokens: int = 1):
    """(attention of new tokens, their handle, keys and values of all columns)."""
    b = len(query)
    k, v = torch.randn(2, b, 2, tokens, 8, generator=torch.Generator().manual_seed(5))
    [(keys, values)] = feed(cache, [k], [v], ROPE)
    out = attend(query, keys, values, mask, SCALING, None, keys._kvshrink)
    return out, keys._kvshrink, *rebuild(keys._kvshrink, keys, values)


def dense(query: Tensor, keys: Tensor, values: Tensor, shown: Tensor) -> Tensor:
    """Attention of one token to the columns that are shown [b, columns], or [b, q, 1, columns] head by head."""
    keys, values = (x.double().repeat_interleave(QUERIES // 2, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * SCALING
    shown = shown if shown.dim() == 4 else shown[:, None, None]
    return (scores.masked_fill(~shown, -torch.inf).softmax(-1) @ values).float()


def by_the_rule(method: SALS, fitted, query: Tensor, keys: Tensor, body: Tensor) -> Tensor:
    """Which columns of the body [b, columns] are chosen: queries and keys before RoPE, projected, summed over heads."""
    positions = torch.arange(keys.shape[2])[None].expand(len(keys), -1)
    plain = ROPE.undo(keys, positions).double() - fitted["key_mean"].double().view(1, 2, 1, 8)
    asked = ROPE.undo(query, positions[:, -1:]).double().unflatten(1, (2, -1)).sum(2)  # [b, h, s, d]
    leading = fitted["key_up"][0, : int(method.score_rank * fitted["key_up"].shape[1])].double()
    latent = plain.transpose(1, 2).flatten(2) @ leading.T
    scores = (latent @ (asked.transpose(1, 2).flatten(2) @ leading.T).transpose(1, 2))[..., 0]
    found = torch.zeros_like(body)
    for row, (s, there) in enumerate(zip(scores, body, strict=True)):
        n = int(there.sum())
        k = min(n, math.ceil(method.topk * n) if isinstance(method.topk, float) else method.topk)
        found[row, s.masked_fill(~there, -torch.inf).argsort(descending=True)[:k]] = True
    return found


def columns(handle, keys: Tensor) -> Tensor:
    """Columns of body pages that are tokens and no sinks, bool [b, columns], worked out from the pages."""
    found = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.bool)
    (tier,) = handle.tiers
    for first, used in zip(tier.pages.first[0], tier.pages.used[0, 0], strict=True):
        found[:, first : first + used] = True
    for row, sinks in enumerate(handle.sinks.columns.tolist()):
        found[row, [c for c in sinks if c >= 0]] = False
    return found & (handle.positions >= 0)


def exact(handle, keys: Tensor) -> Tensor:
    shown = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.bool)
    shown[:, handle.first :] = True
    for row, sinks in enumerate(handle.sinks.columns.tolist()):
        shown[row, [c for c in sinks if c >= 0]] = True
    return shown & (handle.positions >= 0)


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"bits": 3, "score_rank": 1.0}, {"bits": 2}], ids=str)
@pytest.mark.parametrize("topk", [7, 40, 0.2])
@pytest.mark.parametrize("cut", [0, 60], ids=["whole", "cropped"])
@pytest.mark.parametrize("small", [False, True], ids=["one block", "many blocks"])
def test_attention_is_that_over_the_chosen_tokens(fitted, settings, topk, cut, small, monkeypatch):
    """With left pads, columns that the mask hides, a page that a crop cut short, and rows that choose differently."""
    if small:
        monkeypatch.setattr("kvshrink.cache.attend.BLOCK_ELEMENTS", 32)
        monkeypatch.setattr(chosen, "WIDER", 2)
    method = SALS(keep=0.75, topk=topk, window=8, **settings)
    real = torch.arange(300) >= torch.tensor([[0], [50], [200]])
    cache = filled(method, fitted, 300, real)
    if cut:
        cache.crop(-cut)
        k, v = torch.randn(2, 3, 2, 50, 8)
        feed(cache, [k], [v], ROPE)
    query = torch.randn(3, QUERIES, 1, 8) * 2
    mask = torch.ones(3, 1, 1, cache.get_seq_length() + 1, dtype=torch.bool)
    mask[..., 100:130] = False
    mask[1:, ..., :200] = real[1:, None, None, :200] & mask[1:, ..., :200]
    got, handle, keys, values = step(cache, query, mask)
    assert cut == 0 or (cache.layers[0].pages.used < 32).any()
    body, seen = columns(handle, keys), mask[:, 0, 0]
    assert int(body.sum(1).min()) > 10
    picked = by_the_rule(method, fitted, query, keys, body & seen)
    assert not bool((picked[0] == picked[1]).all())
    want = dense(query, keys, values, picked | (exact(handle, keys) & seen))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_mask_that_differs_from_head_to_head(fitted):
    """A token that one head sees may be chosen; the heads that do not see it still do not."""
    method = SALS(keep=0.75, topk=20)
    cache = filled(method, fitted, 300)
    query, mask = torch.randn(2, QUERIES, 1, 8), torch.rand(2, QUERIES, 1, 301) > 0.7
    got, handle, keys, values = step(cache, query, mask)
    picked = by_the_rule(method, fitted, query, keys, columns(handle, keys) & mask.any(1)[:, 0])
    shown = (picked | exact(handle, keys))[:, None, None] & mask
    torch.testing.assert_close(got, dense(query, keys, values, shown), atol=1e-4, rtol=0)


def test_reading_all_tokens_is_cskv(fitted):
    """Bit for bit where topk exceeds the body; a share of 1.0 picks every token, in another order."""
    query, outputs = torch.randn(2, QUERIES, 1, 8), []
    for method in (CSKV(keep=0.75), SALS(keep=0.75, topk=1000), SALS(keep=0.75, topk=1.0), SALS(keep=0.75, topk=5)):
        outputs.append(step(filled(method, fitted, 300), query)[0])
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-5, rtol=0)
    assert (outputs[3] - outputs[0]).abs().max() > 1e-2


def test_several_new_tokens_read_all(fitted):
    query, outputs = torch.randn(2, QUERIES, 3, 8), []
    for method in (CSKV(keep=0.75), SALS(keep=0.75, topk=5)):
        outputs.append(step(filled(method, fitted, 300), query, tokens=3)[0])
    assert torch.equal(*outputs)


def test_a_needle_is_read(fitted):
    """The one token whose key answers the query, whatever its place."""
    basis = torch.linalg.qr(fitted["key_up"][0, :4].T).Q.T  # leading components, kept by the latents
    direction = basis[0].view(2, 1, 8)
    for place in (10, 111, 200):
        method, tokens = SALS(keep=0.75, topk=1), 300
        keys, values = 0.1 * torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)
        keys[:, :, place] = 20 * direction[:, 0]
        positions = torch.arange(tokens)[None]
        cache = make(method, SHAPE, [fitted | {"key_mean": torch.zeros(1, 16)}])
        feed(cache, [ROPE.apply(keys, positions)], [values], ROPE)
        query = direction[None].expand(-1, -1, 2, -1) * 20  # [b, h, x, d]
        layer = cache.layers[0]
        best, _ = chosen._best(query, Visibility(Mask(None, None), 1, 0, 1, 2, layer.snapshot(ROPE)), 10**6)
        assert best.tolist() == [[place - int(layer.pages.first[0, 0])]]


@pytest.mark.parametrize("topk", [9, 0.1])
def test_a_padded_batch_gives_what_its_rows_give_alone(fitted, topk):
    """Pads in whole pages, so that the same tokens are in the body; positions are counted on from the columns."""
    method, pads = SALS(keep=0.75, topk=topk), (0, 64)
    k, v = torch.randn(2, 2, 2, 300, 8)
    query = torch.randn(2, QUERIES, 1, 8)
    real = torch.arange(300) >= torch.tensor(pads)[:, None]
    batch = make(method, SHAPE, [fitted])
    feed(batch, [k], [v], None, real)

    def ask(cache, row: slice, mask):
        [(keys, values)] = feed(cache, [k[row, :, :1]], [v[row, :, :1]], None)
        return attend(query[row], keys, values, mask, SCALING, None, keys._kvshrink)

    mask = torch.cat([real, torch.ones(2, 1, dtype=torch.bool)], 1)[:, None, None]
    got = ask(batch, slice(0, 2), mask)
    for row, pad in enumerate(pads):
        one = slice(row, row + 1)
        alone = make(method, SHAPE, [fitted])
        feed(alone, [k[one, :, pad:]], [v[one, :, pad:]], None)
        torch.testing.assert_close(got[one], ask(alone, one, None), atol=1e-5, rtol=0)


def test_only_chosen_keys_are_rebuilt(fitted, monkeypatch):
    method, rebuilt = SALS(keep=0.75, topk=11), []
    cache = filled(method, fitted, 300)
    expand = BasisCodec.expand

    def watched(self, latent, heads):
        rebuilt.append((self.site, latent.shape[2]))
        return expand(self, latent, heads)

    def refuse(self, stored):
        raise AssertionError("everything was unpacked")

    query = torch.randn(1, QUERIES, 1, 8).expand(2, -1, -1, -1)
    k, v = torch.randn(2, 2, 2, 1, 8)
    [(keys, values)] = feed(cache, [k], [v], ROPE)
    monkeypatch.setattr(BasisCodec, "expand", watched)
    monkeypatch.setattr(BasisCodec, "unpack", refuse)
    attend(query, keys, values, None, SCALING, None, keys._kvshrink)
    assert 11 <= sum(n for site, n in rebuilt if site == "k_pre") <= 22  # rows choose by themselves, a block is shared


def test_scores_are_query_times_key_before_rope(stats_of):
    method = SALS(keep=0.75, score_rank=1.0)
    codec = method.codecs(SHAPE, method.fit_layer(stats_of(SHAPE)))[0]
    stored, query = codec.encode(torch.randn(2, 2, 64, 8), None), torch.randn(2, 2, 3, 8)
    want = (query @ codec.decode(stored, 2).transpose(2, 3)).sum((1, 2))
    got = codec.scores(query, stored)
    torch.testing.assert_close(got - got[:, :1], want - want[:, :1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("width", [1, 5, 9])
def test_leading_channels_are_those_of_the_whole(bits, axis, width):
    stored_as = packing(2, 9, 32, bits, axis, 4, torch.float32)
    stored = stored_as.store(torch.randn(3, 2, 96, 9), None)
    assert torch.equal(stored_as.lead(stored, width), stored_as.load(stored)[..., :width])


def test_it_holds_what_cskv_holds(fitted):
    for bits in (None, 4):
        ours, theirs = (
            filled(m, fitted, 300).nbytes for m in (SALS(keep=0.75, bits=bits, topk=3), CSKV(keep=0.75, bits=bits))
        )
        assert ours == theirs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep=0\.0 is not possible\. Use a share of channels above 0, up to 1\."),
        ({"bits": 5}, r"bits=5 is not possible\. Use None or one of \(8, 4, 3, 2\)\."),
        ({"topk": 0}, r"topk=0 is not possible\. Use a number of tokens from 1, or a share above 0, up to 1\.0\."),
        ({"topk": 1.5}, r"topk=1\.5 is not possible\. Use a number of tokens from 1, or a share above 0, up to 1\.0\."),
        ({"score_rank": 0.0}, r"score_rank=0\.0 is not possible\. Use a share above 0, up to 1\."),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=f"^{message}$"):
        SALS(**settings)
