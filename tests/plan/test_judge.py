"""What a plan reports is what the method's cache does: which tokens it reads, and how they grow old."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import CSKV
from kvshrink.attach.budget import CacheBudget
from kvshrink.fit import recall as probes
from kvshrink.methods.lowrank.sals import SALS
from kvshrink.methods.quant.rtn import RTN
from kvshrink.methods.quant.zipcache import ZipCache
from kvshrink.plan import bench as benches
from kvshrink.plan.bench import Bench
from kvshrink.plan.judge import Judge
from kvshrink.store.log import Log


def small(dropout: float = 0.0) -> LlamaForCausalLM:
    """A model whose attention is peaked."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(
        num_hidden_layers=2,
        intermediate_size=48,
        vocab_size=97,
        max_position_embeddings=1024,
        attention_dropout=dropout,
        **shape,
    )
    net = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in net.named_parameters():
        weight.data.mul_(12.0 if "proj" in name else 1.0)
    return net


def bench_of(net: LlamaForCausalLM) -> Bench:
    rows = torch.randint(3, 97, (5, 420), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "ROWS", 1)
        patch.setattr(benches, "widest", lambda tokens: RTN(window=32))
        bench = Bench(net, rows, CacheBudget.of(net, 1024), Log(None), progress=False)
        assert bench.cached.step == 32
        assert bench.judge.tail > 100
    return bench


@pytest.fixture(scope="module")
def bench():
    bench = bench_of(small())
    yield bench
    kvshrink.detach(bench.model)


def test_reading_fewer_tokens_costs_something(bench):
    assert bench.point(SALS(keep=1.0, topk=1)).kl > 1.5 * bench.point(SALS(keep=1.0, topk=1.0)).kl


def test_growing_old_costs_something(bench):
    young = CSKV(keep=1.0, codec="rtn", bits=8, window=8)
    old = CSKV(keep=1.0, codec="saq", window=8)
    assert bench.point(old).kl > 5 * bench.point(young).kl


def test_what_tokens_are_worth_is_asked_for(bench):
    method = ZipCache(window=8, high=8, low=1, share=0.25)
    layers = {i: method.codecs(shape, {}) for i, shape in bench.shapes.items()}
    by_place = bench.judge.seen_by(method).kl(layers)  # the first tokens of each page count as the most important
    assert bench.point(method).kl == bench.cached.kl(method)
    assert bench.point(method).kl != pytest.approx(by_place, rel=0.01)


def test_a_cache_is_made_only_where_it_must_be(bench, monkeypatch):
    monkeypatch.setattr(Judge, "kl", None)
    plain = bench.point(RTN(bits=2, window=16)).kl
    monkeypatch.undo()
    assert plain == pytest.approx(bench.cached.kl(RTN(bits=2, window=16)), rel=0.02)


def test_a_model_in_training_is_planned_as_in_use(bench, monkeypatch):
    net = small(dropout=0.5).train()
    net.model.layers[1].mlp.eval()
    monkeypatch.setattr(benches, "model_key", lambda model: "x")
    other = bench_of(net)
    for method in (RTN(bits=2), CSKV(keep=0.5)):
        assert other.point(method).kl == pytest.approx(bench.point(method).kl, rel=1e-4)
    assert net.training
    assert net.model.layers[1].self_attn.training
    assert not net.model.layers[1].mlp.training
    kvshrink.detach(net)
