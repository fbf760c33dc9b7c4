"""LongEval topic retrieval: which topic did a record of several conversations begin with?

Source: github.com/DachengLi1/LongChat@4b5faa52, longeval/. Generated records join the 30 official conversations, drawn
without repetition, as the official files do, in the official prompt.
Differs from upstream: scored by the words of the topic (metric `topic`), not by gpt-3.5-turbo.
The answer always stands at the start, which some methods keep exact: read it beside a task of all depths.
"""

import json
from pathlib import Path
from typing import Any

from kvshrink import data
from kvshrink.data.text import read_text
from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample
from kvshrink.eval.tasks._common import check_count, fill, fits, rng

HEADER = (
    "Below is a record of our previous conversation on {topics} different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record start. "
)
RECORD_END = "Now the record ends."
QUESTION = " What is the first topic we discussed? Only give me the topic name. Do not summarize yourself."


def samples(n: int, seed: int, *, tokens: int = 4000, count: Count, path: str | Path | None = None) -> list[Sample]:
    """n generated records of as many topics as fit into `tokens`, or the first n of the official file `path`.

    Raises EvalError if not one topic or not the official record fits, or 30 topics are too few.
    """
    check_count("longeval_topics", n)
    if path is not None:
        return _official(n, Path(path), tokens, count)
    source = data.path("longeval/conversations.jsonl").read_text(encoding="utf-8")
    talks = [json.loads(row) for row in source.splitlines()]
    return [_generated(seed, i, talks, tokens, count) for i in range(n)]


def _generated(seed: int, index: int, talks: list[dict[str, Any]], tokens: int, count: Count) -> Sample:
    order = rng("longeval_topics", seed, index).sample(talks, len(talks))

    def make(size: int) -> list[Sample]:
        record = HEADER.format(topics=size) + "".join(talk["conversation"] for talk in order[:size]) + " "
        return [_sample(index, record, RECORD_END + QUESTION, [talk["topic"] for talk in order[:size]])]

    remedy = " or give a larger official file as path="
    return fill("longeval_topics", make, 1, len(talks), "topics", tokens, count, remedy)[0]


def _official(n: int, path: Path, tokens: int, count: Count) -> list[Sample]:
    text = read_text(path, "Cannot read LongEval topics from", EvalError)
    rows = [row for row in text.splitlines() if row.strip()]
    if n > len(rows):
        raise EvalError(f"{n} LongEval topic cases asked, {path.name} has {len(rows)}. Ask for fewer, or drop path=.")
    found = [_parse(i, row, f"{path.name}, case {i}") for i, row in enumerate(rows[:n])]
    for i, sample in enumerate(found):
        if not fits([sample], tokens, count):
            raise EvalError(f"{path.name}, case {i} does not fit into tokens={tokens}. Raise tokens or drop path=.")
    return found


def _parse(index: int, row: str, where: str) -> Sample:
    try:
        case = json.loads(row)
        record, mark, question = case["prompt"].rpartition(RECORD_END)
        if not mark:
            raise ValueError(f"no {RECORD_END!r}")
        return _sample(index, record, mark + question, [str(topic) for topic in case["topics"]])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise EvalError(f"{where} is not a LongEval topic case ({error}). Give an official JSONL file.") from error


def _sample(index: int, record: str, question: str, topics: list[str]) -> Sample:
    meta = {"index": index, "depth": 0.0, "topics": len(topics), "others": topics[1:]}
    return Sample(record, question, "", (topics[0],), "topic", 50, meta)
