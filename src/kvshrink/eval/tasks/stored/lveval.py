# ruff: noqa: RUF001
"""LV-Eval: 11 sets of questions in English and Chinese, the same ones at five lengths from 16k to 256k words.

Source: github.com/infinigence/LVEval@25aebcb3 (config.py), arXiv 2402.05136; data: hub Infinigence/LVEval (MIT;
cmrc_mixup and lic_mixup CC BY-SA 4.0), a file <subset>_<length>.jsonl each. The prompt is the official one.
Too long prompts lose their middle: see `_prompt.cut_middle`. As upstream, only the first answer of a row is scored.
"""

from pathlib import Path

from kvshrink.eval.tasks import Count, Sample, _files
from kvshrink.eval.tasks.stored import _prompt

LENGTHS = ("16k", "32k", "64k", "128k", "256k")


def _english(please: str, only: str, said: str) -> str:
    """`please` opens the first instruction, `only` ends both, `said` says where the answer is."""
    return (
        f"{please} based on the given passages. {said} {only}\n\nArticle: {{context}}\n\n"
        f"Please answer the following question based on the above passages. {said} {only}\n\n"
        "Question: {input}\nAnswer:"
    )


def _chinese(first: str, second: str) -> str:
    return f"{first}\n\n文章：{{context}}\n\n{second}\n\n问题：{{input}}\n回答："


_ONLY = "Only give me the answer and do not output any other explanation and evidence."
_ONE = _english(
    "Please answer the following question", _ONLY, "Questions and answers are only relevant to one passage."
)
_ZH_ONE = "问题和答案只与其中一篇文章有关。"
_ZH_ONLY = "只需要直接给出问题的答案，不要输出其他任何解释和证据。"
_ZH_BY = f"请根据下面给定的文章回答问题，{_ZH_ONE}"
_ZH_NOW = f"现在请基于上述文章回答下面的问题，{_ZH_ONE}"

# prompt, metric, tokens of the answer
SUBSETS = {
    "hotpotwikiqa_mixup": (
        _english("Answer the question", _ONLY, "Questions and answers are only relevant to some passages."),
        "gated_f1",
        64,
    ),
    "loogle_SD_mixup": (_ONE, "gated_f1", 64),
    "loogle_CR_mixup": (_ONE, "gated_f1", 64),
    "loogle_MIR_mixup": (_ONE, "gated_f1", 64),
    "multifieldqa_en_mixup": (_ONE, "gated_f1", 64),
    "multifieldqa_zh_mixup": (
        _chinese(
            f"请阅读以下文章并用中文回答问题，{_ZH_ONE}{_ZH_ONLY}",
            f"请基于上面的文章回答下面的问题，{_ZH_ONE}{_ZH_ONLY}",
        ),
        "gated_f1_zh",
        64,
    ),
    "factrecall_en": (
        "Please answer the following questions based on the given article.\n\nArticle: {context}\n\n"
        "Please answer the following questions based on the above article.\n\nQuestion: {input}\nAnswer:",
        "qa_f1",
        16,
    ),
    "factrecall_zh": (
        _chinese("请基于给定的文章回答下述问题。", "现在请基于上述文章回答下面的问题。"),
        "qa_f1_zh",
        16,
    ),
    "cmrc_mixup": (_chinese(_ZH_BY, _ZH_NOW), "gated_f1_zh", 64),
    "lic_mixup": (
        _chinese(_ZH_BY, f"请现在基于上述文章回答下面的问题，{_ZH_ONE}"),
        "gated_f1_zh",
        64,
    ),
    "dureader_mixup": (_chinese(_ZH_BY, _ZH_NOW), "rouge_l_stop_zh", 64),
}
ROW = {"input": "Who wrote it?", "context": "A long text", "answers": ["Ada"], "length": 16000}


def samples(
    n: int | None,
    seed: int,
    *,
    path: str | Path | None = None,
    hub: bool = False,
    subset: str = "hotpotwikiqa_mixup",
    length: str = "16k",
    tokens: int | None = None,
    count: Count | None = None,
) -> list[Sample]:
    """The first n rows of a subset at a length (`seed` has no effect), all if None.

    path: a file, or a folder with <subset>_<length>.jsonl, or with a folder <subset>/ that has it. A row's
    answer_keywords may be absent: cmrc_mixup and dureader_mixup have none.
    """
    _files.choice("lveval", "subset", subset, SUBSETS)
    _files.choice("lveval", "length", length, LENGTHS)
    name = f"{subset}_{length}"
    layout = _files.Layout(
        "lveval", (name, f"{subset}/{name}"), ROW, "Infinigence/LVEval", file=f"{subset}.zip", member=f"{name}.jsonl"
    )
    return [_sample(i, row, subset, length, tokens, count) for i, row in enumerate(_files.rows(layout, n, path, hub))]


def _sample(index: int, row: _files.Row, subset: str, length: str, tokens: int | None, count: Count | None) -> Sample:
    prompt, metric, limit = SUBSETS[subset]
    context, question = _prompt.split(prompt, row["context"], input=row["input"])
    context, question = _prompt.cut_middle("lveval", context, question, limit, tokens, count)
    meta = {"index": index, "subset": subset, "length": length, "keywords": row.get("answer_keywords") or ""}
    return Sample(context, question, "", _files.texts(row["answers"])[:1], metric, limit, meta)
