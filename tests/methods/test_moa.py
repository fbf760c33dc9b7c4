import itertools

import numpy as np
import pytest
import torch

from kvshrink.errors import SettingError
from kvshrink.methods._token_probe import Rule
from kvshrink.methods.evict.moa import RULES, MoA, solve
from tests.methods.evicting import (
    NEWEST_FIRST,
    SHAPE,
    Steps,
    check_generate,
    fitted_to_reference,
    probe_of,
    refused,
)

LENGTHS = [256, 512, 1024]


def spans(*rules: tuple[int, float]) -> dict[str, torch.Tensor]:
    return {"spans": torch.tensor(rules)}


def of(method: MoA, *rules: tuple[int, float], pads: int = 0) -> Steps:
    """Steps whose heads hold the newest tokens, as many as the cache does."""

    def counts(row: int, candidates: list, pages: int) -> list[int]:
        return steps.cache.compressed[0].body.youngest.tokens[row].tolist()

    steps = Steps(method, pads=pads, rule=NEWEST_FIRST, counts=counts, fitted=spans(*rules))
    return steps


@pytest.mark.parametrize("pads", [0, 45])
@pytest.mark.parametrize("rules", [((64, 0.0), (0, 1.0)), ((128, 0.25), (64, 0.5)), ((32, 0.0), (256, 0.125))], ids=str)
def test_each_head_sees_the_first_tokens_and_a_span_of_the_newest_ones(rules, pads):
    steps = of(MoA(sinks=8), *rules, pads=pads)
    for tokens in (300, 70, *[1] * 70, 200):
        steps.run(tokens)
        for row, head in np.ndindex(2, 2):
            text = np.nonzero(steps.real(row))[0].tolist()
            seen = steps.dense(row, head)
            assert seen[:8] == text[:8]
            assert seen[8:] == text[8 - len(seen) :], "without a gap"


@pytest.mark.parametrize("rule", [(64, 0.0), (64, 0.5), (128, 0.25), (0, 1.0)], ids=str)
def test_a_span_is_at_least_what_the_rule_says_and_little_more(rule):
    for tokens in range(288, 430, 4):
        steps = of(MoA(sinks=4), rule, rule).run(tokens)
        recent = len(steps.kept()[0][0]) + tokens - steps.left(tokens)
        wanted = Rule(*rule).span(tokens)
        assert min(wanted, tokens - 4) <= recent <= wanted + 64, f"{tokens} tokens"


@pytest.mark.parametrize("seed", range(6))
def test_rules_are_those_that_an_exhaustive_search_finds(seed):
    """The least cost in all within the share of tokens at every length."""
    draw = np.random.default_rng(seed)
    rules = [Rule(64, 0.0), Rule(64, 0.25), Rule(128, 0.5), Rule(0, 1.0)]
    cost = np.sort(draw.normal(size=(4, 5)), 0)[::-1]  # below 0 is noise
    ratio = [0.4, 0.5, 0.7][seed % 3]

    def seen(chosen) -> list[float]:
        return [np.mean([rules[r].span(n) / n for r in chosen]) for n in LENGTHS]

    def total(chosen) -> float:
        return sum(max(0.0, cost[r, head]) for head, r in enumerate(chosen))

    possible = [c for c in itertools.product(range(4), repeat=5) if max(seen(c)) <= ratio + 1e-9]
    got = solve(cost, rules, LENGTHS, ratio)
    assert max(seen(got)) <= ratio + 1e-6
    assert total(got) == pytest.approx(min(map(total, possible)), rel=1e-4)


def test_where_nothing_costs_anything_heads_see_as_much_as_they_may():
    assert [RULES[r] for r in solve(np.zeros((len(RULES), 3)), RULES, LENGTHS, 1.0)] == [Rule(0, 1.0)] * 3


def test_a_ratio_that_no_rule_keeps_is_refused():
    with pytest.raises(
        SettingError, match=r"\Aratio=0.1 is less than any rule sees of 256 tokens. Use 0.25 or more.\Z"
    ):
        solve(np.ones((len(RULES), 3)), RULES, LENGTHS, 0.1)


def test_a_fit_gives_each_head_the_rule_of_its_cost():
    """Two heads that lose by any span, and two that lose by none, of which half may see all."""
    cost = torch.ones(3, len(RULES), 2) * torch.tensor([10.0, 0.0])
    cost[:, RULES.index(Rule(0, 1.0))] = 0
    found, record = MoA(ratio=0.65).finish({1: {}, 4: {}}, {}, probe_of(spans=(LENGTHS, {1: cost, 4: cost.flip(2)})))
    assert found[1]["spans"][0].tolist() == found[4]["spans"][1].tolist() == [0, 1]
    assert max(found[1]["spans"][1, 1], found[4]["spans"][0, 1]) < 1
    assert record["lengths"] == LENGTHS


@pytest.mark.parametrize("rules", [((64, 0.0), (0, 1.0)), ((64, 0.5), (64, 0.5))], ids=str)
def test_bytes_of_the_body_are_those_promised(rules):
    method = MoA(sinks=4)
    steps = of(method, *rules).run(700)
    held = steps.cache.compressed[0].held()
    assert held.payload + held.metadata == 2 * method.body_bytes(SHAPE, spans(*rules), 20)


@pytest.mark.parametrize("sinks", [4, 64])
def test_a_fit_finds_rules_and_a_model_answers(sinks):
    artifact = fitted_to_reference(MoA(ratio=0.5, sinks=sinks))
    rules = [Rule(int(a), float(b)) for i in range(4) for a, b in artifact.layers[i]["spans"].tolist()]
    assert all(np.mean([r.span(n) / n for r in rules]) <= 0.5 + 1e-6 for n in artifact.provenance["lengths"])
    assert set(rules) <= set(RULES)
    check_generate(artifact, 0.8)


def test_settings():
    refused(MoA, {"ratio": 0.0}, {"most": 64}, {"floor": 0.2}, {"visual_ratio": 0.5}, {"bits": 3}, {"sinks": -1})
