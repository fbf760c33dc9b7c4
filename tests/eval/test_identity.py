"""The runner's own check, on every offline task and mode: a lossless cache scores exactly as the full one, and a cache
that returns zeros scores as a guess does."""

from dataclasses import replace

import pytest

from kvshrink import RTN
from kvshrink.eval.run.catalogue import choices, gather
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.rounds import MODES, MULTI_TURN, shares_contexts
from kvshrink.eval.run.runner import Job, Runner

LENGTHS, CASES, LIMIT = (1400,), 1, 10
ENTRIES = [Entry("full", None), Entry("zeros", None), Entry("lossless", RTN(bits=None))]
CHOICES = {choice.title: choice for choice in choices()}
CAN = {"passkey/book", "needle", "longeval/generated"}  # what the reference model answers


def test_there_are_many_tasks():
    assert len(CHOICES) >= 25
    assert {"ruler/vt", "longeval/official", "scbench_like/kv", *CAN} <= set(CHOICES)


@pytest.mark.parametrize("title", CHOICES)
def test_lossless_is_full_and_zeros_are_chance(reference, title):
    model, tokenizer = reference
    found, skipped = gather([CHOICES[title]], LENGTHS, CASES, 5, tokenizer, reference=True)
    assert found, skipped
    # answers are cut short: what matters is that they are the same
    samples = [replace(s, max_new_tokens=min(LIMIT, s.max_new_tokens)) for s in found[0].samples]
    for mode in MODES:
        if mode == MULTI_TURN and not shares_contexts(samples):
            continue
        outcomes = Runner(model, tokenizer, ENTRIES).run(Job(title, mode), samples)
        full, zeros, same = ([o for o in outcomes if o.method == label] for label in ("full", "zeros", "lossless"))
        assert len(full) == len(zeros) == len(same) == len(samples)
        assert [(o.output, o.score) for o in same] == [(o.output, o.score) for o in full], mode
        assert same[0].nbytes != full[0].nbytes, "the lossless cache is another one"
        chances = [s.meta.get("chance", 0.0) for s in samples]
        spread = sum(c * (1 - c) for c in chances) ** 0.5
        assert sum(o.score for o in zeros) <= sum(chances) + 3 * spread + 0.25, mode
        if title in CAN:
            assert sum(o.score for o in full) == len(samples), "the instrument works"
