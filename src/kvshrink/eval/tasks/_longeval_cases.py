"""LongEval records: read from official files, generated in their form, and cut to fewer lines."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import final

from kvshrink import data
from kvshrink.data.text import read_text
from kvshrink.errors import EvalError
from kvshrink.eval.tasks import _words
from kvshrink.eval.tasks._common import depth, rng

LINE = re.compile(r"^line (.+): REGISTER_CONTENT is <([0-9]+)>$", re.MULTILINE)
RECORD_END = "Now the record is over."
LARGEST = 50_000  # upstream draws randint(1, 50000)
SMALLEST_REFERENCE = 10_000  # the reference model was trained on numbers of five digits
LETTERS, LETTERS_A_KEY = "ABCDEF", 6


def _letters(random: Random, n: int) -> list[str]:
    """n distinct words of six letters from A to F: the digits of a number in base 6."""
    codes = random.sample(range(len(LETTERS) ** LETTERS_A_KEY), n)
    places = [len(LETTERS) ** i for i in range(LETTERS_A_KEY)]
    return ["".join(LETTERS[code // place % len(LETTERS)] for place in places) for code in codes]


# keys of each style: how many there are, and n distinct ones
STYLES: dict[str, tuple[int, Callable[[Random, int], list[str]]]] = {
    "noun": (_words.LIMIT, _words.keys),
    "numeric": (LARGEST, lambda random, n: [str(i + 1) for i in range(n)]),
    "abc": (len(LETTERS) ** LETTERS_A_KEY, _letters),
    "uuid": (LARGEST, _words.uuids),
}


@final
@dataclass(frozen=True)
class Case:
    """A record as (key, number) pairs, the position of the asked line from 0, and the official question."""

    lines: tuple[tuple[str, str], ...]
    asked: int
    question: str


def official(n: int, path: str | Path | None) -> list[Case]:
    """The first n cases of an official file (the bundled one if None). Raises EvalError if it does not hold them."""
    source = data.path("longeval/200_lines.jsonl") if path is None else Path(path)
    text = read_text(source, "Cannot read LongEval cases from", EvalError)
    rows = [row for row in text.splitlines() if row.strip()]
    if not rows:
        raise EvalError(f"{source} holds no LongEval cases. Give an official JSONL file as path=.")
    if n > len(rows):
        raise EvalError(
            f"{n} LongEval cases asked, {source.name} has {len(rows)}. Ask for fewer, or use official=False."
        )
    return [_parse(row, f"{source.name}, case {i}") for i, row in enumerate(rows[:n])]


def generated(seed: int, index: int, style: str, smallest: int, lines: int) -> Case:
    """Record `index`: `lines` lines with numbers from `smallest` to LARGEST; the asked positions are evenly spread.

    Raises EvalError for more lines than there are keys or numbers.
    """
    if lines > limit(style, smallest):
        raise EvalError(f"longeval: lines={lines} of style={style}. Use 1 to {limit(style, smallest)}.")
    random = rng("longeval", seed, index)
    numbers = random.sample(range(smallest, LARGEST + 1), lines)
    record = tuple(zip(STYLES[style][1](random, lines), map(str, numbers), strict=True))
    asked = round(depth(index) * (lines - 1))
    question = f"{RECORD_END} Tell me what is the <REGISTER_CONTENT> in line {record[asked][0]}? I need the number."
    return Case(record, asked, question)


def limit(style: str, smallest: int) -> int:
    """The most lines that a generated record can have."""
    return min(STYLES[style][0], LARGEST + 1 - smallest)


def cut(case: Case, lines: int) -> Case:
    """The window of `lines` lines in which the asked line has the depth it had in the record, rounded."""
    whole = len(case.lines)
    if lines > whole:
        raise EvalError(f"longeval: lines={lines}, the record has {whole}. Use at most {whole}, or a larger file.")
    asked = round(case.asked * (lines - 1) / max(1, whole - 1))
    start = case.asked - asked
    return replace(case, lines=case.lines[start : start + lines], asked=asked)


def _parse(row: str, where: str) -> Case:
    try:
        case = json.loads(row)
        record, mark, question = case["prompt"].partition(RECORD_END)
        lines = tuple(LINE.findall(record))
        asked = [key for key, _ in lines].index(case["random_idx"][0])
        if not mark or lines[asked][1] != str(case["expected_number"]):
            raise ValueError("the answer is not on the asked line")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise EvalError(f"{where} is not a LongEval line case ({error}). Give an official JSONL file.") from error
    return Case(lines, asked, mark + question)
