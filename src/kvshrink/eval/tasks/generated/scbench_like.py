"""SCBench-like: several questions on one context, of four kinds. What one question keeps, another may need.

Source: SCBench (arXiv 2412.10319; microsoft/MInference, scbench/), string tasks and math find, in its multi-request
mode: every question is asked of the same context by itself. The scores are the official ones. The official questions
stand only in the data set: kv has InfiniteBench's, the other kinds are in own words, so compare no scores with it.

  kv             a JSON object of identifiers, the value of a key (the prompt of InfiniteBench)
  prefix_suffix  a list of strings, the one with a given start and end; others share one of the two
  vt             chains of variables in noise, all that hold a value (the prompt of RULER's vt, without its example)
  mf             a list of numbers, the largest, smallest, second largest ...
"""

import json
import string
from collections.abc import Callable
from functools import partial
from random import Random

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _words
from kvshrink.eval.tasks._common import check_count, check_known, depth, fill, places, rng
from kvshrink.eval.tasks.generated import kv_retrieval
from kvshrink.eval.tasks.generated.passkey import NOISE

VARIANTS: dict[str, dict] = {kind: {"kind": kind} for kind in ("kv", "prefix_suffix", "vt", "mf")}
EDGE, MIDDLE = 5, 10  # letters of a prefix or suffix, and between them
VARIABLES = 5  # of a chain
RANKS = ("largest", "smallest", "second largest", "second smallest", "third largest", "third smallest")
# (context, questions); a question is (text, answer prefix, answers, place of the answer from 0 to 1)
Question = tuple[str, str, tuple[str, ...], float]
Made = tuple[str, list[Question]]


def samples(n: int, seed: int, *, tokens: int = 4000, count: Count, kind: str = "kv", turns: int = 5) -> list[Sample]:
    """n contexts with `turns` questions each: n * turns samples, those of one context side by side.

    Every question by itself fits into `tokens` with the context; the answers of a context are spread over it.
    """
    check_count("scbench_like", n)
    check_known("scbench_like", "kind", kind, list(VARIANTS))
    if turns < 1 or (kind == "mf" and turns > len(RANKS)):
        raise EvalError(f"scbench_like: turns={turns}. Use at least 1, and for mf at most {len(RANKS)}.")
    _, _, _, unit, least = KINDS[kind]
    made = []
    for i in range(n):
        make = partial(_context, kind, seed, i, turns)
        made += fill("scbench_like", make, max(2, least * turns), tokens, unit, tokens, count)
    return made


def _context(kind: str, seed: int, index: int, turns: int, size: int) -> list[Sample]:
    build, metric, limit, unit, _ = KINDS[kind]
    random = rng(f"scbench_like/{kind}", seed, index)
    context, questions = build(random, size, [depth(index * turns + i) for i in range(turns)])
    made = []
    for i, (question, prefix, answers, share) in enumerate(questions):
        meta = {"index": index * turns + i, "depth": share, "context": index, "turn": i, unit: size}
        made.append(Sample(context, question, prefix, answers, metric, limit, meta))
    return made


def _kv(random: Random, size: int, depths: list[float]) -> Made:
    keys, values = _words.uuids(random, size), _words.uuids(random, size)
    body = json.dumps(dict(zip(keys, values, strict=True)))
    questions: list[Question] = [
        (kv_retrieval.OFFICIAL_QUESTION.format(key=keys[at]), "", (values[at],), at / (size - 1))
        for at in places(size, depths)
    ]
    return f"{kv_retrieval.OFFICIAL_INTRO}JSON data:\n{body}\n\n", questions


def _prefix_suffix(random: Random, size: int, depths: list[float]) -> Made:
    starts = _letters(random, size, EDGE)
    ends = _letters(random, size, EDGE)
    asked = places(size, depths)
    free = random.sample([i for i in range(size) if i not in asked], 2 * len(asked))
    for i, at in enumerate(asked):
        # two strings that share one end each, so that neither end is enough
        starts[free[2 * i]], ends[free[2 * i + 1]] = starts[at], ends[at]
    items = [a + b + c for a, b, c in zip(starts, _letters(random, size, MIDDLE), ends, strict=True)]
    questions: list[Question] = []
    for at in asked:
        text = f"Which string of the list begins with {starts[at]} and ends with {ends[at]}? Answer with the string.\n"
        questions.append((text, "The string is:", (items[at],), at / (size - 1)))
    return "Below is a list of strings. Memorize them.\n\n" + "\n".join(items) + "\n\n", questions


def _vt(random: Random, size: int, depths: list[float]) -> Made:
    names = _letters(random, VARIABLES * len(depths), VARIABLES)
    values = random.sample(range(10_000, 100_000), len(depths))
    statements: list[tuple[float, str]] = []
    questions: list[Question] = []
    for i, (share, value) in enumerate(zip(depths, values, strict=True)):
        chain = [name.upper() for name in names[VARIABLES * i : VARIABLES * (i + 1)]]
        held = [str(value), *(f"VAR {name}" for name in chain)]
        # the first at the depth, the others anywhere behind it
        at = sorted([share, *(random.uniform(share, 1) for _ in chain[1:])])
        statements += [(p, f"VAR {name} = {what}") for p, name, what in zip(at, chain, held, strict=False)]
        asked = f"all variables that are assigned the value {value}"
        text = f"Question: Find {asked} in the text above."
        prefix = (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{VARIABLES} variables are assigned the value {value}, they are: "
        )
        questions.append((text, prefix, tuple(chain), share))
    lines = [(i / size, NOISE) for i in range(size)]
    # sorting by place alone keeps a chain in its order where places are equal
    body = "\n".join(line for _, line in sorted(statements + lines, key=lambda item: item[0]))
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    return f"{intro}{body}\n", questions


def _mf(random: Random, size: int, depths: list[float]) -> Made:
    numbers = sorted(random.sample(range(100_000, 1_000_000), size))
    asked = places(size, depths)
    ranks = [i // 2 if i % 2 else size - 1 - i // 2 for i in range(len(asked))]
    rest = [number for i, number in enumerate(numbers) if i not in ranks]
    random.shuffle(rest)
    wanted = {at: numbers[rank] for at, rank in zip(asked, ranks, strict=True)}
    array = [wanted[at] if at in wanted else rest.pop() for at in range(size)]
    questions: list[Question] = []
    for rank, at in zip(RANKS, asked, strict=False):
        prefix = f"The {rank} number of the list is:"
        questions.append((f"What is the {rank} number of the list?\n\n", prefix, (str(array[at]),), at / (size - 1)))
    return f"Below is a list of numbers. Find the ones that you are asked for.\n\n{array}\n\n", questions


def _letters(random: Random, n: int, length: int) -> list[str]:
    """n distinct strings of lower-case letters."""
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(random.choices(string.ascii_lowercase, k=length))] = None
    return list(found)


# kind: (build, metric, max_new_tokens, what a size counts, the fewest of them for a turn)
KINDS: dict[str, tuple[Callable[[Random, int, list[float]], Made], str, int, str, int]] = {
    "kv": (_kv, "text_contains", 50, "pairs", 1),
    "prefix_suffix": (_prefix_suffix, "text_contains", 40, "strings", 3),
    "vt": (_vt, "string_match_all", 50, "lines", 1),
    "mf": (_mf, "first_number", 10, "numbers", 1),
}
