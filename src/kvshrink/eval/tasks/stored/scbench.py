# ruff: noqa: RUF001
"""SCBench: several questions on one shared context, which shows what is lost when the question is not known.

Source: github.com/microsoft/MInference@9987de63 (scbench/eval_utils.py, MIT), arXiv 2412.10319; data: hub
microsoft/SCBench, one JSONL file a subset. The questions of a row follow each other as samples with the identical
context (meta context and turn), so that one cache serves them: as separate requests, or as turns of a conversation.
Prompts are the official ones of the multi-turn mode without the answers of earlier turns, which the runner puts in.
Differs from upstream: its multi-request mode has no blank line before the question. repoqa and the repoqa questions of
repoqa_and_kv are scored with a parser of six languages and are refused. vt is not rounded to two digits.
A too long context loses its middle, the same for all its questions: see `_prompt.cut_context`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _files
from kvshrink.eval.tasks.stored import _prompt

Turn = dict[str, Any]


@final
@dataclass(frozen=True)
class Subset:
    """`first` is the first turn's prompt, `later` that of the others; the question is what follows the context."""

    metric: str
    max_new_tokens: int
    first: str = "{context}\n\n{input}"
    later: str = "\n\n{input}"


_ASK = "\n\nQuestion: {input}\nAnswer:"
_ASK_ZH = "\n\n问题：{input}\n答案："
_CHOOSE = "\n\nQuestion: {input}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n\nThe "
SUBSETS = {
    "kv": Subset(
        "text_contains",
        150,
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
    ),
    "prefix_suffix": Subset("text_contains", 150),
    "vt": Subset("string_match_all", 30),
    "qa_eng": Subset(
        "text_contains_any",
        40,
        f"Read the book and answer the question. Be very concise in your answer.\n\n{{context}}{_ASK}",
        _ASK,
    ),
    "qa_chn": Subset("qa_f1_chars", 40, f"阅读以下书籍然后回答问题。\n\n{{context}}{_ASK_ZH}", _ASK_ZH),
    "choice_eng": Subset(
        "choice_or_text",
        40,
        f"Read the book and answer the question.\n\n{{context}}{_CHOOSE}the correct answer is",
        f"{_CHOOSE}letter of the correct answer is",
    ),
    "many_shot": Subset("text_contains_any", 10),
    "mf": Subset("first_number", 5, "What is {number}?\n\n{context}\n\n{input}", "\n\nWhat is {number}?\n\n{input}"),
    "summary": Subset("rouge_lsum", 200),
    "summary_with_needles": Subset("rouge_lsum", 800),
}
# of subsets with two kinds of turns: how each is scored, and for how long it may answer
MIXED = {
    "summary_with_needles": {
        "scbench_summary": Subset("rouge_lsum", 800),
        "scbench_passkey": Subset("first_digits", 15),
    },
}
REFUSED = ("repoqa", "repoqa_and_kv")
ROW = {"context": "A long text", "multi_turns": [{"input": "Who wrote it?", "answer": "Ada"}]}


def samples(
    n: int | None,
    seed: int,
    *,
    path: str | Path | None = None,
    hub: bool = False,
    subset: str = "kv",
    turns: int | None = None,
    tokens: int | None = None,
    count: Count | None = None,
) -> list[Sample]:
    """The questions of the first n rows (`seed` has no effect), of all if None; turns: only the first of each row.

    path: a file, or a folder with scbench_<subset>.jsonl, or with this in data/.
    """
    if subset in REFUSED:
        raise EvalError(f"scbench: {subset} is scored by parsing code, which is not here. Known: {', '.join(SUBSETS)}.")
    _files.choice("scbench", "subset", subset, SUBSETS)
    if turns is not None and turns < 1:
        raise EvalError(f"scbench: turns={turns}. Use at least 1, or None for all.")
    name = f"scbench_{subset}"
    layout = _files.Layout("scbench", (name, f"data/{name}"), ROW, "microsoft/SCBench", file=f"data/{name}.jsonl")
    rows = _files.rows(layout, n, path, hub)
    return [s for i, row in enumerate(rows) for s in _samples(i, row, subset, turns, tokens, count)]


def _samples(
    index: int, row: _files.Row, subset: str, turns: int | None, tokens: int | None, count: Count | None
) -> list[Sample]:
    asked = _turns(row, index)[:turns]
    kinds = [MIXED[subset][turn["task"]] if subset in MIXED else SUBSETS[subset] for turn in asked]
    context, first = _prompt.split(SUBSETS[subset].first, row["context"], **_fields(asked[0], subset, index))
    later = [SUBSETS[subset].later.format(**_fields(turn, subset, index)) for turn in asked[1:]]
    longest = max(kind.max_new_tokens for kind in kinds)
    context = _prompt.cut_context("scbench", context, [first, *later], longest, tokens, count)
    made = []
    for i, (turn, kind, question) in enumerate(zip(asked, kinds, [first, *later], strict=True)):
        meta = {"index": index, "subset": subset, "context": index, "turn": i}
        answers = _files.texts(turn["answer"])
        if subset == "choice_eng":
            options = _files.texts(turn["options"])
            answers, meta["chance"] = (answers[0], "ABCD"[options.index(answers[0])]), 0.25
        made.append(Sample(context, question, "", answers, kind.metric, kind.max_new_tokens, meta))
    return made


def _turns(row: _files.Row, index: int) -> list[Turn]:
    turns = list(row["multi_turns"])
    wrong = [i for i, turn in enumerate(turns) if not {"input", "answer"} <= set(turn)]
    if not turns or wrong:
        raise EvalError(f"scbench: row {index} has {len(turns)} turns; {wrong} lack input or answer. Expected: {ROW}.")
    return turns


def _fields(turn: Turn, subset: str, index: int) -> Turn:
    """What the templates name, of one turn."""
    fields: Turn = {"input": turn["input"]}
    if subset == "choice_eng":
        options = _files.texts(turn.get("options"))
        if len(options) != 4 or str(turn["answer"]) not in options:
            raise EvalError(f"scbench: row {index} of choice_eng needs 4 options with the answer, has {options}.")
        fields |= dict(zip("abcd", options, strict=True))
    elif subset == "mf":
        found = re.search("The .+ is", turn["input"])
        if found is None:
            raise EvalError(f"scbench: row {index} of mf does not ask for 'The ... is': {turn['input'][:80]!r}.")
        fields["number"] = found[0][:-3].lower()
    return fields
