"""BABILong: bAbI's questions about people, places and things, the facts hidden in books, at lengths from 0k to 10M.

Source: github.com/booydar/babilong@ffa075fb (Apache-2.0), arXiv 2406.10149; data: hub RMT-team/babilong, a file
data/<subset>/<length>.json each. The prompt is the official one with instruction, examples and format of the answer.
Differs from upstream: prompts of qa1 to qa10 only. Nothing is cut: the data
is made in lengths, and a sample longer than `tokens` is an error.
"""

from pathlib import Path

from kvshrink.eval.tasks import Count, Sample, _files
from kvshrink.eval.tasks.stored import _prompt
from kvshrink.eval.tasks.stored._babilong_prompts import PROMPTS

MAX_NEW_TOKENS = 20
LENGTHS = "0k 1k 2k 4k 8k 16k 32k 64k 128k 256k 512k 1M 10M".split()
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), _PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa6": ("no", "yes"),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": ("no", "yes"),
    "qa10": ("maybe", "no", "yes"),
}
ROW = {"input": "Mary moved to the garden. It was night.", "question": "Where is Mary? ", "target": "garden"}


def samples(
    n: int | None,
    seed: int,
    *,
    path: str | Path | None = None,
    hub: bool = False,
    subset: str = "qa1",
    length: str = "4k",
    tokens: int | None = None,
    count: Count | None = None,
) -> list[Sample]:
    """The first n rows of a subset at a length (`seed` has no effect), all if None.

    path: a file, or a folder with <subset>/<length>.json, or with this in data/.
    """
    _files.choice("babilong", "subset", subset, PROMPTS)
    _files.choice("babilong", "length", length, LENGTHS)
    name = f"{subset}/{length}"
    layout = _files.Layout("babilong", (name, f"data/{name}"), ROW, "RMT-team/babilong", file=f"data/{name}.json")
    return [_sample(i, row, subset, length, tokens, count) for i, row in enumerate(_files.rows(layout, n, path, hub))]


def _sample(index: int, row: _files.Row, subset: str, length: str, tokens: int | None, count: Count | None) -> Sample:
    context = "\n\n".join((*PROMPTS[subset], f"<context>\n{row['input'].strip()}"))
    question = f"\n</context>\n\nQuestion: {row['question']}".rstrip()
    _prompt.check_fits("babilong", index, context + question, MAX_NEW_TOKENS, tokens, count)
    # a label that the question names is never the answer
    labels = [label for label in LABELS[subset] if label.lower() not in row["question"].lower()]
    metric = "exact_labels" if subset == "qa8" else "one_label"
    meta = {"index": index, "subset": subset, "length": length, "labels": labels, "chance": 1 / max(1, len(labels))}
    return Sample(context, question, "", (row["target"],), metric, MAX_NEW_TOKENS, meta)
