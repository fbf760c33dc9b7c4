"""LongBench: 21 tasks of reading, summarising, few-shot learning and code, 5 of them in Chinese; and LongBench-E.

Source: github.com/THUDM/LongBench@2e00731f (MIT), arXiv 2308.14508; data: hub THUDM/LongBench, one JSONL file a subset.
The prompt is the official one, all of it the user's text. Upstream puts no chat template around the subsets of NO_CHAT
(meta["chat"] is False there) and stops samsum at a line end; of those with `first_line` only the first line is scored.
Too long prompts lose their middle: see `_prompt.cut_middle`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _files
from kvshrink.eval.tasks.stored import _prompt
from kvshrink.eval.tasks.stored._longbench_prompts import PROMPTS


@final
@dataclass(frozen=True)
class Subset:
    metric: str
    max_new_tokens: int
    first_line: bool = False


SUBSETS = {
    "narrativeqa": Subset("qa_f1", 128),
    "qasper": Subset("qa_f1", 128),
    "multifieldqa_en": Subset("qa_f1", 64),
    "multifieldqa_zh": Subset("qa_f1_zh", 64),
    "hotpotqa": Subset("qa_f1", 32),
    "2wikimqa": Subset("qa_f1", 32),
    "musique": Subset("qa_f1", 32),
    "dureader": Subset("rouge_l_zh", 128),
    "gov_report": Subset("rouge_l", 512),
    "qmsum": Subset("rouge_l", 512),
    "multi_news": Subset("rouge_l", 512),
    "vcsum": Subset("rouge_l_zh", 512),
    "trec": Subset("classification", 64, first_line=True),
    "triviaqa": Subset("qa_f1", 32, first_line=True),
    "samsum": Subset("rouge_l", 128, first_line=True),
    "lsht": Subset("classification", 64, first_line=True),
    "passage_count": Subset("count_share", 32),
    "passage_retrieval_en": Subset("retrieval", 32),
    "passage_retrieval_zh": Subset("retrieval", 32),
    "lcc": Subset("code_similarity", 64),
    "repobench-p": Subset("code_similarity", 64),
}
SUBSETS_E = (
    "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum passage_count "
    "passage_retrieval_en lcc repobench-p"
).split()
NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
ROW = {"input": "Who wrote it?", "context": "A long text", "answers": ["Ada"], "length": 3000, "all_classes": None}


def samples(
    n: int | None,
    seed: int,
    *,
    path: str | Path | None = None,
    hub: bool = False,
    subset: str = "qasper",
    e: bool = False,
    tokens: int | None = None,
    count: Count | None = None,
) -> list[Sample]:
    """The first n rows of a subset (`seed` has no effect), all if None; e: of LongBench-E, with meta["bucket"].

    path: a file, or a folder with <subset>.jsonl (E: <subset>_e.jsonl), or with these in data/.
    """
    _files.choice("longbench", "subset of LongBench-E" if e else "subset", subset, SUBSETS_E if e else SUBSETS)
    name = f"{subset}_e" if e else subset
    layout = _files.Layout(
        "longbench", (name, f"data/{name}"), ROW, "THUDM/LongBench", file="data.zip", member=f"{name}.jsonl"
    )
    return [_sample(i, row, subset, e, tokens, count) for i, row in enumerate(_files.rows(layout, n, path, hub))]


def _sample(index: int, row: _files.Row, subset: str, e: bool, tokens: int | None, count: Count | None) -> Sample:
    kind = SUBSETS[subset]
    answers = _files.texts(row["answers"])
    if not answers:
        raise EvalError(f"longbench: row {index} of {subset} has no answers. Take the official file.")
    context, question = _prompt.split(PROMPTS[subset], row["context"], input=row["input"])
    context, question = _prompt.cut_middle("longbench", context, question, kind.max_new_tokens, tokens, count)
    length = int(row["length"])
    meta: dict[str, Any] = {"index": index, "subset": subset, "length": length, "chat": subset not in NO_CHAT}
    if e:
        meta["bucket"] = "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"
    if kind.first_line:
        meta["first_line"] = True
    if kind.metric == "classification":
        meta["classes"] = list(_files.texts(row["all_classes"]))
    return Sample(context, question, "", answers, kind.metric, kind.max_new_tokens, meta)
