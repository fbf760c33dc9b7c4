"""At full rank, without quantisation and in float32, our cache gives the tokens that DynamicCache gives."""

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvshrink
from kvshrink import RTN, Artifact, KVCache, methods
from kvshrink.methods._roles import Method
from kvshrink.methods.evict.streaming_llm import StreamingLLM
from tests.scenarios import families, scenarios
from tests.scenarios.families import FAMILIES

WINDOW = 8
RTN_CASES = {  # with keys stored after RoPE, and one group per head
    "left_padded": ("ours", "materialised"),
    "rewinds": ("ours",),
    "prompt_lookup": ("ours",),
}
CASES_OF = {
    "rtn": RTN_CASES,
    "rope_commuting": {"left_padded": ("ours", "materialised"), "chunks_of_7": ("ours",)},
    "sals": {"left_padded": ("ours",), "beams": ("ours",)},
}
# the keys and values that another attention is given do not depend on the family beyond these kinds of layers
MATERIALISED = ("llama", "qwen2_mixed", "gemma2", "glm4", "mistral_sliding")
SETTINGS = {"sals": {"topk": 1.0}}  # chooses every token, and reads them one by one
BY_NAME = {scenario.__name__: scenario for scenario in scenarios.SCENARIOS}
CASES = [
    pytest.param(family, name, method, attention, id=f"{family}-{name}-{method}-{attention}")
    for family in FAMILIES
    for name in BY_NAME
    for method in ("cskv", *CASES_OF)
    for attention in ("ours", "materialised")
    if attention == "ours" or family in MATERIALISED
    if method == "cskv" or (attention in CASES_OF[method].get(name, ()) and FAMILIES[family].compressed)
]


@cache
def lossless(family: str, method: str) -> Method | Artifact:
    """A method that loses nothing: full rank, no quantisation."""
    if method == "rtn":
        return RTN(bits=None, window=WINDOW)
    rows = scenarios.tokens(4, 128, seed=99)
    full_rank = methods.build(method, {"keep": 1.0, "window": WINDOW} | SETTINGS.get(method, {}))
    return kvshrink.fit(families.subject(family), full_rank, rows, batch=4, progress=False)


@cache
def expected(family: str, name: str) -> list[Tensor]:
    """What the model says with transformers' own cache, untouched by us."""
    model = families.reference(family)
    return BY_NAME[name](model, lambda: DynamicCache(config=model.config))


@pytest.mark.parametrize(("family", "name", "method", "attention"), CASES)
def test_lossless(family: str, name: str, method: str, attention: str) -> None:
    wanted = expected(family, name)
    model, made = families.subject(family), []

    def make() -> KVCache:
        made.append(kvshrink.make_cache(model, lossless(family, method)))
        return made[-1]

    make()
    model.set_attn_implementation("kvshrink" if attention == "ours" else FAMILIES[family].attention)
    try:
        got = BY_NAME[name](model, make)
    finally:
        model.set_attn_implementation("kvshrink")
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.tolist() == theirs.tolist()
    assert len(made) > 1, "the scenario made no cache"
    assert all(len(c.compressed) == FAMILIES[family].compressed for c in made)
    used = [c for c in made if c.get_seq_length()]
    assert used
    for c in used:
        lengths = {layer.get_seq_length() for layer in c.layers} | ({c.table.length} if c.compressed else set())
        assert len(lengths) == 1, "layers disagree"
        rows = [row for row in c.report().rows if row.kind != "sliding"]
        assert all(row.held.payload > 0 for row in rows), "nothing was compressed"


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_depend_on_the_body(family: str) -> None:
    """The control of the test above: tokens vary, and change once the body is dropped."""
    (wanted,) = expected(family, "greedy")
    new = wanted[:, scenarios.PROMPT :]
    assert min(len(set(row)) for row in new.tolist()) >= 10
    model = families.subject(family)
    (got,) = scenarios.greedy(model, lambda: kvshrink.make_cache(model, StreamingLLM(window=WINDOW)))
    same = float((got[:, scenarios.PROMPT :] == new).float().mean())
    assert same < 0.4 if FAMILIES[family].compressed else same == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_close_along_a_chunked_prompt(family: str) -> None:
    """Closer than tokens can tell: the error that float32 rounding leaves, and no more."""
    ids = scenarios.tokens(2, 160)
    theirs = _logits(families.reference(family), DynamicCache(config=families.reference(family).config), ids)
    model = families.subject(family)
    ours = _logits(model, kvshrink.make_cache(model, lossless(family, "cskv")), ids)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@torch.no_grad()
def _logits(model, cache, ids: Tensor) -> Tensor:
    parts = ids.split(50, 1)
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], 1)
