"""A part of bench/peers/serve_vllm.py: prefix hits, and every record that is read against what was written there.

Requests that share prefixes of many lengths, that end before their pages are written, that meet one another in a step
and that are put back: each has the tokens of an engine that caches no prefix, or differs first where two are as likely
(steps of other lengths round otherwise, and a page that is rounded otherwise moves a probability by some hundredths).
A block that is offered before its pages are written, or given away while it is read, shows as a record that differs.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from serve_vllm import Table, closed, engine, ids, named
from vllm import LLM, SamplingParams
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from kvshrink.serve.pool import Reading
from kvshrink.serve.vllm.backend import KVShrinkImpl, Pages, Plan
from kvshrink.serve.vllm.specs import PageManager

ROUNDS, COUNT, TIE = 4, 24, 0.05
SMALL = {"max_model_len": 256, "max_num_batched_tokens": 100, "max_num_seqs": 8}


class Shadow:
    """While it is there: a copy of each record that is written, by layer and place, compared where it is read."""

    def __init__(self) -> None:
        self.written: dict[tuple[int, int, int], torch.Tensor] = {}
        self.read = self.never = self.other = 0
        self.leave, self.attend = KVShrinkImpl._leave, KVShrinkImpl._attend

    def __enter__(self) -> "Shadow":
        shadow = self

        def _leave(impl: KVShrinkImpl, plan: Plan, pages: Pages, pool: torch.Tensor) -> None:
            shadow.leave(impl, plan, pages, pool)
            for reading, _, _ in plan.parts:
                for place in zip(*(x.tolist() for x in reading.leaving_records), strict=True):
                    shadow.written[id(pages), *place] = pool[place[0], 0, place[1]].clone()

        def _attend(impl: KVShrinkImpl, query: Any, reading: Reading, places: Any, pages: Pages, pool: Any) -> Any:
            block, inner, there = reading._records
            for place in zip(block[there].tolist(), inner[there].tolist(), strict=True):
                known = shadow.written.get((id(pages), *place))
                shadow.read += 1
                shadow.never += known is None
                size = pages.records.layout.size
                shadow.other += known is not None and not torch.equal(known[:size], pool[place[0], 0, place[1], :size])
            return shadow.attend(impl, query, reading, places, pages, pool)

        KVShrinkImpl._leave, KVShrinkImpl._attend = _leave, _attend  # type: ignore[method-assign]
        return self

    def __exit__(self, *failure: object) -> None:
        KVShrinkImpl._leave, KVShrinkImpl._attend = self.leave, self.attend  # type: ignore[method-assign]


def requests(seed: int) -> list[list[list[int]]]:
    """Rounds of prompts whose beginnings are those of others, in no order."""
    draw = random.Random(seed)
    texts = [ids(200, 211 * i) for i in range(3)]
    rounds: list[list[list[int]]] = [[texts[0][:64]]]  # ends before its second page is written
    for _ in range(ROUNDS):
        prompts = []
        for _ in range(draw.randint(2, 6)):
            shared, own = draw.randint(20, 200), draw.choice([0, 0, 7, 40])
            prompts.append((draw.choice(texts)[:shared] + ids(own, draw.randint(2000, 3000)))[:200])
        rounds.append(prompts)
    return rounds


Told = list[
    dict[int, float]
]  # of each token of a request: the likeliest two, its own first, and their log probabilities


def told(llm: LLM, prompts: list[list[int]]) -> list[Told]:
    sampling = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
    out = [x.outputs[0] for x in llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)]
    return [
        [
            {t: found[t].logprob for t in (own, *(t for t in found if t != own))}
            for own, found in zip(x.token_ids, x.logprobs, strict=True)
        ]
        for x in out
    ]


def equal(one: Told, other: Told) -> str:
    """What a request's tokens are to those it should have: equal, a tie where they differ first, or other."""
    for a, b in zip(one, other, strict=True):
        if (x := next(iter(a))) != next(iter(b)):
            return "a tie" if x in b and max(b.values()) - b[x] < TIE else "other"
    return "equal"


def watched(
    settings: dict[str, Any], cached: bool, more: dict[str, Any]
) -> tuple[list[Told], Shadow, dict[str, float]]:
    """What an engine answers, what was read, and its counts."""
    llm = engine(settings, enable_prefix_caching=cached, disable_log_stats=False, **more)
    with Shadow() as shadow:
        found = [x for prompts in requests(1) for x in told(llm, prompts)]
    counts = {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    closed(llm)
    return found, shadow, counts


def prefixes(table: Table, folder: Path) -> None:
    """prefill="window", so that tokens do not depend on steps. Engines: (name, its settings, sinks, a small pool)."""
    turboquant, spectral = {"method": "turboquant:bits=4"}, named("spectral", folder)[0]
    for name, method, sinks, blocks in (
        ("turboquant 4", turboquant, 0, 90),
        ("turboquant 4", turboquant, 4, 100),
        ("spectral", spectral, 4, 270),
    ):
        want: list[Told] = []
        ways = {
            "none cached": {},
            "one step": {},
            "steps of 100, small pool": {"num_gpu_blocks_override": blocks} | SMALL,
        }
        for way, more in ways.items():
            cached = way != "none cached"
            settings = {**method, "sinks": sinks, "prefill": "window"}
            found, shadow, counts = watched(settings, cached, more)
            want = want or found
            each = Counter(equal(one, other) for one, other in zip(found, want, strict=True))
            wrong, hits = shadow.never + shadow.other, counts["prefix_cache_hits"]
            note = f"{hits:.0f} tokens hit, put back {counts['num_preemptions']:.0f} times, " if cached else ""
            note += f"{dict(each)}, {wrong} of {shadow.read} records differ"
            holds = not each["other"] and each["a tie"] < 2 and not wrong and (hits > 0) == cached
            table.add("prefixes", f"{name}, {sinks} sinks, {way}", note, "all equal, no record differs", holds)
    control(table, turboquant)


def control(table: Table, method: dict[str, Any]) -> None:
    """Pages offered as vLLM offers blocks, when their tokens are computed: the fault that all this is to show."""
    own = PageManager.cache_blocks
    PageManager.cache_blocks = FullAttentionManager.cache_blocks  # type: ignore[method-assign]
    try:
        _, shadow, _ = watched({**method, "sinks": 0, "prefill": "window"}, True, {})
    finally:
        PageManager.cache_blocks = own  # type: ignore[method-assign]
    wrong = shadow.never + shadow.other
    table.add(
        "prefixes", "offered before they are written", f"{wrong} of {shadow.read} records differ", "some", wrong > 0
    )
