"""RULER as kvpress stores it: 13 tasks in one table for each length, made with the tokens of Llama 3.1.

Source: hub simonjegou/ruler (4096, 8192, 16384), which github.com/NVIDIA/kvpress@8bb29b9c evaluates;
github.com/NVIDIA/RULER@c3f5e3b4 (Apache-2.0), arXiv 2404.06654. The three parts of the prompt are the table's columns,
so the context is compressed without the question, as there. Nothing is cut: a sample longer than `tokens` is an error.
"""

from pathlib import Path

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _files
from kvshrink.eval.tasks.stored import _prompt

LENGTHS = (4096, 8192, 16384)
TASKS = (
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue "
    "niah_multiquery vt cwe fwe qa_1 qa_2"
).split()
ROW = {
    "context": "A long text",
    "question": "What is the number?",
    "answer_prefix": "It is",
    "answer": ["4711"],
    "task": "niah_single_1",
    "max_new_tokens": 128,
}


def samples(
    n: int | None,
    seed: int,
    *,
    path: str | Path | None = None,
    hub: bool = False,
    subset: str | None = None,
    length: int = 4096,
    tokens: int | None = None,
    count: Count | None = None,
) -> list[Sample]:
    """The first n rows, all if None (`seed` has no effect). subset: only those of one task; the file has all of them.

    path: a file, or a folder with test-00000-of-00001.parquet, or with a folder <length>/ that has it.
    """
    _files.choice("ruler_kvpress", "length", str(length), map(str, LENGTHS))
    if subset is not None:
        _files.choice("ruler_kvpress", "subset", subset, TASKS)
    name = "test-00000-of-00001"
    layout = _files.Layout(
        "ruler_kvpress",
        (f"{length}/{name}", f"{length}/test", name, "test"),
        ROW,
        "simonjegou/ruler",
        table={"data_dir": str(length), "split": "test"},
    )
    rows = _files.rows(layout, n if subset is None else None, path, hub)
    if subset is not None:
        rows = [row for row in rows if row["task"] == subset]
        if not rows or len(rows) < (n or 1):
            raise EvalError(
                f"ruler_kvpress: {n or 'all'} samples of {subset} asked, the file has {len(rows)}. Ask for fewer cases."
            )
    return [_sample(i, row, tokens, count) for i, row in enumerate(rows[:n])]


def _sample(index: int, row: _files.Row, tokens: int | None, count: Count | None) -> Sample:
    # the official rule: one reference is enough in question answering, everywhere else all count
    metric = "string_match_part" if row["task"].startswith("qa") else "string_match_all"
    parts = row["context"], row["question"], row["answer_prefix"]
    limit = int(row["max_new_tokens"])
    _prompt.check_fits("ruler_kvpress", index, "".join(parts), limit, tokens, count)
    return Sample(*parts, _files.texts(row["answer"]), metric, limit, {"index": index, "subset": row["task"]})
