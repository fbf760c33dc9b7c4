"""LooGLE: questions, clozes and summaries of documents of more than 24k tokens, several questions on one document.

Source: github.com/bigai-nlco/LooGLE@67343822 (config/task2prompt.json, task2maxlen.json), arXiv 2311.04939; data: hub
bigai-nlco/LooGLE (CC BY-SA 4.0). The prompt is the official one. Both layouts of the data are read: the repository's,
one row a document (input, qa_pairs, output), and the hub's, one row a question (context, question, answer).
Differs from upstream: no repetition penalty of 2. A too long document loses its middle, the same for all its questions:
see `_prompt.cut_context`. METEOR, BERTScore and GPT-4 as a judge need a model or a word net and are not here.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from kvshrink.data.text import literal
from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _files
from kvshrink.eval.tasks.stored import _prompt

_QA = "Please answer the question based on the long texts below. \n{context}\nQuestion: {question}\nAnswer: "
# prompt, tokens of the answer
SUBSETS = {
    "shortdep_qa": (_QA, 300),
    "longdep_qa": (_QA, 500),
    "longdep_summarization": ("Please generate a summary of the below paper. \n{context}\n Summarization: ", 500),
    "shortdep_cloze": (
        "Please fill in the clozes based on the given long texts below. Each of the placeholder '<mask-n>' in the "
        "question could be an entity of Person, Location or Organiocation. The same masks represent the same entity. "
        "Output a json format answer, for example: {{'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine',"
        "'<mask-2>': 'Bethel Horizon'}}\n{context}\n Question: {question} What are the masked entities? \nAnswer:",
        50,
    ),
}
TEXT_METRICS = ("rouge_l_recall", "rouge_1_recall", "rouge_2_recall", "bleu_1", "bleu_4")
CLOZE_METRICS = ("cloze_exact", "cloze_partial")
NEED_MODELS = ("meteor", "bertscore", "gpt4_score")
ROW_REPOSITORY = {"input": "A long text", "qa_pairs": [{"Q": "Who wrote it?", "A": "Ada"}], "output": "none"}
ROW_HUB = {"context": "A long text", "question": "Who wrote it?", "answer": "Ada"}


def samples(
    n: int | None,
    seed: int,
    *,
    path: str | Path | None = None,
    hub: bool = False,
    subset: str = "shortdep_qa",
    metric: str | None = None,
    tokens: int | None = None,
    count: Count | None = None,
) -> list[Sample]:
    """All questions on the first n documents (`seed` has no effect), on all if None.

    metric: rouge_l_recall (the default), rouge_1_recall, rouge_2_recall, bleu_1, bleu_4; shortdep_cloze: cloze_exact
            (the default), cloze_partial.
    path:   a file, or a folder with <subset>.jsonl.
    """
    _files.choice("loogle", "subset", subset, SUBSETS)
    metrics = CLOZE_METRICS if subset == "shortdep_cloze" else TEXT_METRICS
    metric = metric or metrics[0]
    if metric in NEED_MODELS:
        raise EvalError(f"loogle: {metric} needs a model or a word net. Offline: {', '.join(metrics)}.")
    _files.choice("loogle", f"metric for {subset}", metric, metrics)
    documents = _documents(subset, path, hub)
    if n is not None and not 1 <= n <= len(documents):
        raise EvalError(f"loogle: {n} documents asked, the data has {len(documents)}. Ask for 1 to {len(documents)}.")
    return [s for i, d in enumerate(documents[:n]) for s in _samples(i, *d, subset, metric, tokens, count)]


def _documents(subset: str, path: str | Path | None, hub: bool) -> list[tuple[str, list[tuple[str, Any]]]]:
    """[(text, [(question, answer)])] of either layout."""
    names = (subset, f"data/{subset}", f"LooGLE-testdata/{subset}")
    table = {"name": "summarization" if subset == "longdep_summarization" else subset, "split": "test"}
    layout = _files.Layout("loogle", names, {}, "bigai-nlco/LooGLE", table=table)
    rows = _files.rows(layout, None, path, hub)
    found = []
    for i, row in enumerate(rows):
        if "qa_pairs" in row and "input" in row:
            pairs: Any = row["qa_pairs"]
            pairs = literal(pairs) if isinstance(pairs, str) and pairs != "none" else pairs
            asked = [("", row.get("output"))] if pairs == "none" else [(pair["Q"], pair["A"]) for pair in pairs]
            found += [(row["input"], question, answer) for question, answer in asked]
        elif "context" in row and "answer" in row:
            found.append((row["context"], row.get("question") or "", row["answer"]))
        else:
            layouts = " or ".join(json.dumps(example) for example in (ROW_REPOSITORY, ROW_HUB))
            raise EvalError(f"loogle: row {i} has the fields {', '.join(row)}. Expected rows like {layouts}.")
    return [(text, [(q, a) for _, q, a in group]) for text, group in groupby(found, key=lambda item: item[0])]


def _samples(
    index: int,
    text: str,
    asked: list[tuple[str, Any]],
    subset: str,
    metric: str,
    tokens: int | None,
    count: Count | None,
) -> list[Sample]:
    prompt, limit = SUBSETS[subset]
    parts = [_prompt.split(prompt, text, question=question) for question, _ in asked]
    questions = [question for _, question in parts]
    context = _prompt.cut_context("loogle", parts[0][0], questions, limit, tokens, count)
    return [
        Sample(
            context,
            question,
            "",
            (_answer(answer, subset),),
            metric,
            limit,
            {"index": index, "subset": subset, "context": index, "turn": turn},
        )
        for turn, (question, (_, answer)) in enumerate(zip(questions, asked, strict=True))
    ]


def _answer(answer: Any, subset: str) -> str:
    """A text; of a cloze, {mask: entity} as JSON (the hub lists the entities in the masks' order)."""
    if subset != "shortdep_cloze":
        return str(answer)
    if isinstance(answer, str):
        answer = literal(answer)
    entities = answer if isinstance(answer, dict) else {f"<mask-{i}>": entity for i, entity in enumerate(answer)}
    return json.dumps(entities, ensure_ascii=False)
