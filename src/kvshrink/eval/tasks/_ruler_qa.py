"""RULER's question answering: a question's documents among many others, from a local file that is not shipped.

qa_1 is SQuAD v2's development set, its unanswerable questions left out; qa_2 is HotpotQA's (distractor setting).
As upstream, sample i asks question i of the file, and SQuAD's first distractors are of the same article.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, final

from kvshrink.data.text import read_text
from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Sample
from kvshrink.eval.tasks._ruler_draft import Draft

LONGEST_TOKEN = 8  # more characters than a token of such text has on average, with any tokenizer
MAX_NEW_TOKENS = 32
ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@final
@dataclass(frozen=True)
class Question:
    """needed: the documents that always stand in the prompt; related: those that come first among the others."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    related: tuple[str, ...]


@final
@dataclass(frozen=True)
class Source:
    """A file's name upstream, its layout in words, and how its JSON is read."""

    name: str
    layout: str
    read: Callable[[Any], tuple[list[Question], list[str]]]


def load(task: str, path: str | Path | None) -> tuple[list[Question], list[str]]:
    """(questions, all documents) of a file. Raises EvalError, with the layout, if there is none or it has another."""
    source = TASKS[task]
    remedy = f"Give path= a copy of {source.name}, JSON with {source.layout}."
    if path is None:
        raise EvalError(f"ruler {task}: its data is not shipped. {remedy}")
    text = read_text(path, f"ruler {task}: cannot read", EvalError, remedy)
    try:
        questions, documents = source.read(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise EvalError(
            f"ruler {task}: {path} has another layout ({type(error).__name__} {error}). {remedy}"
        ) from error
    if not questions:
        raise EvalError(f"ruler {task}: {path} has no question. {remedy}")
    return questions, documents


def draft(question: Question, documents: Sequence[str], random: Random, tokens: int) -> Draft:
    """A sample whose units are documents, the needed ones among them."""
    first = dict.fromkeys([*question.needed, *random.sample(question.related, len(question.related))])
    pool, chars = list(first), sum(map(len, first))
    for document in random.sample(documents, len(documents)):
        if chars > LONGEST_TOKEN * tokens:
            break
        if document not in first:
            pool.append(document)
            chars += len(document)
    order = random.random()

    def make(n: int) -> Sample:
        shown = Random(order).sample(pool[:n], n)
        return Sample(*prompt(shown, question.text), question.answers, "string_match_part", MAX_NEW_TOKENS, {})

    return Draft("documents", len(question.needed), len(pool), make)


def prompt(documents: Sequence[str], question: str) -> tuple[str, str, str]:
    """(context, question, answer prefix)."""
    numbered = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
    return (
        f"{ASK}\n\nThe following are given documents.\n\n{numbered}\n\n",
        f"{ASK}\n\nQuestion: {question}",
        " Answer:",
    )


def _squad(data: Any) -> tuple[list[Question], list[str]]:
    questions: list[Question] = []
    documents: set[str] = set()
    for article in data["data"]:
        contexts = list(dict.fromkeys(p["context"] for p in article["paragraphs"]))
        documents.update(contexts)
        for paragraph in article["paragraphs"]:
            others = tuple(c for c in contexts if c != paragraph["context"])
            for qa in paragraph["qas"]:
                if not qa["is_impossible"]:
                    answers = tuple(a["text"] for a in qa["answers"])
                    questions.append(Question(qa["question"], answers, (paragraph["context"],), others))
    return questions, sorted(documents)


def _hotpot(data: Any) -> tuple[list[Question], list[str]]:
    questions: list[Question] = []
    documents: set[str] = set()
    for case in data:
        contexts = tuple(f"{title}\n{''.join(lines)}" for title, lines in case["context"])
        documents.update(contexts)
        questions.append(Question(case["question"], (case["answer"],), contexts, ()))
    return questions, sorted(documents)


TASKS = {
    "qa_1": Source(
        "SQuAD's dev-v2.0.json",
        'data[].paragraphs[] of "context" and qas[] of "question", "is_impossible" and answers[] of "text"',
        _squad,
    ),
    "qa_2": Source(
        "HotpotQA's hotpot_dev_distractor_v1.json",
        'a list of "question", "answer" and "context", a list of [title, [sentence, ...]]',
        _hotpot,
    ),
}
