"""Which methods are more than what their codecs do to rows, and that plans and simulations know it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvshrink
from kvshrink import CSKV, methods
from kvshrink.attach.look import layers_of
from kvshrink.errors import EvalError, SettingError
from kvshrink.eval.run.simulated import simulate
from kvshrink.fit import recall as probes
from kvshrink.fit.job import fit_all
from kvshrink.fit.probe import Recall
from kvshrink.methods._stats import LayerShape
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.quant.rtn import RTN
from kvshrink.plan.judge import Judge

SETTINGS = {
    "leank": {"keep": 0.5},
    "sals": {"keep": 0.5, "topk": 2},
    "a2ats": {"topk": 2},
    "saq": {"ages": (32, 64)},
    "accllm": {"recent": 64},
    "xquant": {"mode": "latent"},
    "duo_attention": {"recent": 40, "steps": 2},
    "locret": {"steps": 2},
}
ALL = [
    *[(name, SETTINGS.get(name, {})) for name in methods.names()],
    ("sals", {"keep": 0.5, "topk": 1.0}),
    ("xquant", {"mode": "input"}),
    ("cskv", {"keep": 0.5, "codec": "saq"}),
    ("cskv", {"keep": 0.5, "codec": "zipcache"}),
    ("cskv", {"keep": 0.5, "codec": "mikv"}),
]


@pytest.fixture(scope="module")
def model():
    """As many KV heads as query heads, so that inputs can be stored; its attention is peaked."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    config = LlamaConfig(num_hidden_layers=2, intermediate_size=48, vocab_size=97, max_position_embeddings=256, **shape)
    net = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in net.named_parameters():
        weight.data.mul_(12.0 if "proj" in name else 1.0)
    yield net
    kvshrink.detach(net)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(3, 97, (4, 256), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ready(model, rows):
    """Each of ALL as a cache takes it; those that must be fitted, in one pass over the text."""
    made = {i: methods.build(name, {"window": 32, "sinks": 4, **settings}) for i, (name, settings) in enumerate(ALL)}
    wanted = [i for i, method in made.items() if method.needs_fit]
    fitted = fit_all(model, [made[i] for i in wanted], rows, progress=False)
    return made | dict(zip(wanted, fitted, strict=True))


@pytest.fixture(scope="module")
def recall(model, rows):
    """Whose repetitions are read in one forward: no page leaves the window meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "ROWS", 1)
        return Recall(model, layers_of(model), rows, RTN(window=32), progress=False)


@pytest.fixture(scope="module")
def judge(recall):
    return Judge(recall, recall.tail)


@pytest.mark.parametrize("i", range(len(ALL)), ids=lambda i: f"{ALL[i][0]}-{i}")
def test_a_method_is_its_codecs_or_says_that_it_is_more(model, ready, recall, judge, i):
    entry = ready[i]
    artifact = entry if isinstance(entry, Artifact) else Artifact(entry, {0: {}, 1: {}})
    method, shape = artifact.method, LayerShape(4, 8, torch.float32)
    tiers = [method.tiers(shape, fitted) for fitted in artifact.layers.values()]
    codecs = [codec for tier in tiers for codec in tier[0].codecs or ()]
    more = any(len(tier) > 1 or tier[0].codecs is None for tier in tiers) or any(
        codec.needs_importance or codec.joint or (codec.reads(1000) or 1000) < 1000 for codec in codecs
    )
    more = more or method.policy(shape, {}).budget is not None
    assert bool(artifact.apart) == (more or any(map(method.stores_delta, artifact.layers.values())))
    assert artifact.apart is None or method.apart({}), "what may be is said before a fit"
    ids = recall.made[:1, :100]
    if artifact.apart:
        with pytest.raises(EvalError, match=rf"^x: {type(method).__name__} {artifact.apart}, [^\n]*mode='decode'"):
            simulate(model, {"x": entry}, ids, 50)
        return
    simulate(model, {"x": entry}, ids, 50)
    pairs = {i: tier[0].codecs for i, tier in enumerate(tiers)}
    assert recall.seen_by(method).kl(pairs) == pytest.approx(judge.kl(entry), rel=0.02, abs=1e-6)


@pytest.mark.parametrize("codec", ["saq", "zipcache", "mikv"])
@pytest.mark.parametrize("settings", [{"steps": 3}, {"key_share": "auto"}], ids=str)
def test_what_codecs_alone_would_decide_is_refused(codec, settings):
    with pytest.raises(SettingError, match=rf"^codec='{codec}' with (steps|key_share='auto') is not possible\. It "):
        CSKV(codec=codec, **settings)
