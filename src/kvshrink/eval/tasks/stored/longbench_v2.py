"""LongBench v2: 503 questions with four choices about texts of 8,000 to 2,000,000 words.

Source: github.com/THUDM/LongBench@2e00731f, arXiv 2412.15204; data: hub THUDM/LongBench-v2 (Apache-2.0), data.json.
The prompt is the official one without reasoning (prompts/0shot.txt). Differs from upstream: greedy instead of
temperature 0.1. Too long prompts lose their middle: see `_prompt.cut_middle`.
"""

from pathlib import Path

from kvshrink.eval.tasks import Count, Sample, _files
from kvshrink.eval.tasks.stored import _prompt

MAX_NEW_TOKENS = 128
PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n(A) {a}\n(B) {b}\n(C) {c}\n(D) {d}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
ROW = {
    "domain": "Single-Document QA",
    "difficulty": "easy",
    "length": "short",
    "question": "Who wrote it?",
    **{f"choice_{letter}": name for letter, name in zip("ABCD", ("Ada", "Bob", "Cleo", "Dan"), strict=True)},
    "answer": "A",
    "context": "A long text",
}
LAYOUT = _files.Layout("longbench_v2", ("data", "longbench_v2"), ROW, "THUDM/LongBench-v2", file="data.json")


def samples(
    n: int | None,
    seed: int,
    *,
    path: str | Path | None = None,
    hub: bool = False,
    tokens: int | None = None,
    count: Count | None = None,
) -> list[Sample]:
    """The first n rows (`seed` has no effect), all if None. meta has domain, difficulty and length to group by.

    path: a file, or a folder with data.json.
    """
    return [_sample(i, row, tokens, count) for i, row in enumerate(_files.rows(LAYOUT, n, path, hub))]


def _sample(index: int, row: _files.Row, tokens: int | None, count: Count | None) -> Sample:
    choices = {letter.lower(): row[f"choice_{letter}"].strip() for letter in "ABCD"}
    context, question = _prompt.split(PROMPT, row["context"].strip(), question=row["question"].strip(), **choices)
    context, question = _prompt.cut_middle("longbench_v2", context, question, MAX_NEW_TOKENS, tokens, count)
    meta = {"index": index, "chance": 0.25, **{key: row[key] for key in ("domain", "difficulty", "length")}}
    return Sample(context, question, "", (row["answer"],), "choice_letter", MAX_NEW_TOKENS, meta)
