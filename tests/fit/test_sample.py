"""The sample that quantisers learn from: the model's own rows, evenly over the text, never more than its limit."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvshrink.fit import collector
from kvshrink.fit.collector import Sampler
from kvshrink.fit.gather import gather


def test_a_sample_is_every_nth_token_however_long_the_text(monkeypatch):
    monkeypatch.setattr(collector, "SAMPLED", 10)
    sampler, seen = Sampler(), []
    for call in range(7):
        rows = torch.arange(2 * 5.0).view(2, 1, 5, 1) + 10 * call
        sampler.add(rows, rows, rows)
        seen += rows.flatten().tolist()
    kept = sampler.done(None).keys_pre_rope.flatten().tolist()
    assert kept == seen[:: sampler.step]
    assert 5 <= len(kept) <= 10


@pytest.fixture(scope="module")
def net():
    """GQA, and a norm on queries and keys."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_the_rows_are_those_that_attention_reads(net, batch):
    """Keys after RoPE as the model's own cache has them."""
    rows = torch.randint(3, 60, (3, 40), generator=torch.Generator().manual_seed(0))
    stats = gather(net, rows, batch, False, sample=True)
    cache = net(rows, use_cache=True).past_key_values
    for i, fact in stats.items():
        sample, layer = fact.sample, cache.layers[i]
        for mine, theirs in ((sample.keys_post_rope, layer.keys), (sample.values, layer.values)):
            torch.testing.assert_close(mine, theirs.transpose(1, 2).flatten(0, 1).float(), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(sample.keys_pre_rope, sample.keys_post_rope)
        assert sample.queries_post_rope.shape == (120, net.config.num_attention_heads, net.config.head_dim)
