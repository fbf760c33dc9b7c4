"""Block-GTQ: bits where the scores are, by hand; and what that is worth beside the same codes with bits everywhere."""

import itertools

import pytest
import torch

from kvshrink.methods._packing.blocks import WIDTHS, Blocks
from kvshrink.methods._quantiser import SideStats
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.quant.block_gtq import BlockGTQ, blocks_of, shared
from kvshrink.methods.quant.turboquant import TurboQuant

SHAPE = LayerShape(2, 16, torch.float32)


def test_bits_of_a_llama_layer_by_hand():
    """Codes of 3 bits, and four scales of 16 bits a token for keys and for values, whatever was learnt."""
    assert BlockGTQ().bits_per_token(LayerShape(8, 128, torch.float16), {}) == 2048 * 3 + 2 * 4 * 16


@pytest.mark.parametrize("bits", [2, 3])
def test_no_other_whole_bits_have_a_smaller_weighted_error(bits):
    """Against all ways to give four pairs 1 to 4 bits, `bits` on average."""
    blocks = blocks_of(8, (torch.arange(4), torch.arange(4, 8)))
    for seed in range(20):
        score = torch.rand(8, generator=torch.Generator().manual_seed(seed)) ** 4
        found = shared(score, blocks, bits)
        assert torch.equal(found[:4], found[4:]), "a pair has one width"
        of_pair = score[:4] + score[4:]

        def error(widths, of_pair=of_pair):
            return sum(float(e) * 4.0**-w for e, w in zip(of_pair, widths, strict=True))

        ways = [w for w in itertools.product(WIDTHS, repeat=4) if sum(w) == 4 * bits]
        assert error(found[:4].tolist()) == pytest.approx(min(error(w) for w in ways))


def test_channels_that_rope_leaves_alone_stand_for_themselves():
    blocks = blocks_of(6, (torch.tensor([0, 1]), torch.tensor([2, 3])))
    assert blocks.tolist() == [0, 1, 0, 1, 4, 5]
    widths = shared(torch.tensor([1.0, 0, 1, 0, 5, 0]), blocks, 2)
    assert widths.float().mean() <= 2
    assert widths[4] == 4


def test_scores_lose_less_than_with_the_same_bits_everywhere(stats_of):
    """Where a few frequencies carry the scores; values, which have no frequencies, lose the same."""
    stats = stats_of(SHAPE)
    first, second = stats.pairs
    weight = torch.ones(16)
    weight[first], weight[second] = (torch.logspace(0.7, -1.3, 8) for _ in range(2))
    sample = stats.sample
    rows = sample.keys_post_rope * weight
    queries = sample.queries_post_rope * weight

    def worst(method, fitted):
        key, _ = method.codecs(SHAPE, fitted)
        whole = rows[:64].transpose(0, 1)[None]
        wrong = (key.decode(key.encode(whole, None), 2) - whole)[0].transpose(0, 1)  # [m, h, d]
        of_head = queries.unflatten(1, (2, -1))[:64]
        return float(torch.einsum("mhqd,nhd->mhqn", of_head, wrong).square().mean())

    method = BlockGTQ(bits=2)
    side = SideStats(
        rows,
        torch.stack([(queries.unflatten(1, (2, -1))[:, h].flatten(0, 1).T.cov()) for h in range(2)]),
        rows.new_zeros(len(rows), 2),
        stats.pairs,
    )
    space = method._space(SHAPE, "key")
    fitted = {f"key_{k}": t for k, t in method.learn("key", side, space).items()}
    fitted |= {f"value_{k}": t for k, t in method.learn("value", SideStats.of(stats, "value", "v"), space).items()}
    assert worst(method, fitted) < 0.5 * worst(TurboQuant(bits=2), {})


def test_an_empty_run_takes_its_scale_and_nothing_else():
    packing = Blocks((0, 6, 0, 2), 32)
    rows = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0))
    stored = packing.store(rows, None)
    assert sum(t.nbytes for t in stored.values()) == 2 * packing.page_bytes() == 2 * (32 * (12 + 8) // 8 + 2 * 4 * 32)
    assert (packing.load(stored) - rows).square().mean() < 0.15
