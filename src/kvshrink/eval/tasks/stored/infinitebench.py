# ruff: noqa: RUF001
"""InfiniteBench: 12 tasks on books, dialogues, code, arithmetic and hidden facts, 44k to 2M tokens long.

Source: github.com/OpenBMB/InfiniteBench@88b3daa6 (MIT), arXiv 2402.13718; data: hub xinrongzhang2022/InfiniteBench, one
JSONL file a subset. Prompts and lengths of answers are the official ones for yarn-mistral, the open model of the paper;
upstream has others for GPT-4, Claude and Kimi. Too long prompts lose their middle: see `_prompt.cut_middle`.
"""

import re
from pathlib import Path
from typing import Any

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _files
from kvshrink.eval.tasks.stored import _prompt

_OPTIONS = "A. {a}\nB. {b}\nC. {c}\nD. {d}\n\n"
_MASK = "$$MASK$$"

# prompt, metric, tokens of the answer
SUBSETS = {
    "passkey": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n{context}\n\n{input}\n\nThe pass key is",
        "first_digits",
        6,
    ),
    "number_string": (
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\n{context}\n\n{input}\n\nThe sequence of digits is",
        "first_digits",
        12,
    ),
    "kv_retrieval": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        "word_in_text",
        50,
    ),
    "longbook_sum_eng": ("Summarize the book below.\n\n{context}\n\nSummary:", "rouge_lsum", 1200),
    "longbook_choice_eng": (
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n"
        f"{_OPTIONS}The letter of the correct answer is",
        "choice_or_text",
        40,
    ),
    "longbook_qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
        "Question: {input}\nAnswer:",
        "qa_f1",
        40,
    ),
    "longbook_qa_chn": (
        "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：",
        "qa_f1_chars",
        40,
    ),
    "longdialogue_qa_eng": (
        f'Below is a dialogue script where one random occurrence of a character name is replaced with "{_MASK}", and '
        f"you should try to guess who that character is.\n\n{{context}}\n\nThe name that has been replaced with "
        f"{_MASK} is likely",
        "name_in_text",
        40,
    ),
    "math_find": ("What is {number} in the following list?\n\n{context}\n\n{input}", "first_number", 3),
    "math_calc": (
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\nValues:",
        "leading_values",
        30000,
    ),
    "code_run": (
        "There is a function called {function} in the following Python code.\n\n{context}\n\n"
        "Please compute the exact value of {call}. The value of {call} is",
        "last_word_number",
        5,
    ),
    "code_debug": (
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        f"crash.\n\n{{context}}\n\nOptions:\n{_OPTIONS}The correct option is:",
        "code_choice",
        5,
    ),
}
CHOICES = ("longbook_choice_eng", "code_debug")
ROW = {"context": "A long text", "input": "What is the pass key?", "answer": ["71432"]}


def samples(
    n: int | None,
    seed: int,
    *,
    path: str | Path | None = None,
    hub: bool = False,
    subset: str = "longbook_qa_eng",
    tokens: int | None = None,
    count: Count | None = None,
) -> list[Sample]:
    """The first n rows of a subset (`seed` has no effect), all if None.

    path: a file, or a folder with <subset>.jsonl.
    """
    _files.choice("infinitebench", "subset", subset, SUBSETS)
    layout = _files.Layout(
        "infinitebench", (subset, f"data/{subset}"), ROW, "xinrongzhang2022/InfiniteBench", file=f"{subset}.jsonl"
    )
    return [_sample(i, row, subset, tokens, count) for i, row in enumerate(_files.rows(layout, n, path, hub))]


def _sample(index: int, row: _files.Row, subset: str, tokens: int | None, count: Count | None) -> Sample:
    prompt, metric, limit = SUBSETS[subset]
    answers, meta = _files.texts(row["answer"]), {"index": index, "subset": subset}
    fields: dict[str, Any] = {"input": row["input"]}
    if subset in CHOICES:
        options = _files.texts(row.get("options"))
        if len(options) != 4 or answers[0] not in options:
            raise EvalError(f"infinitebench: row {index} of {subset} needs 4 options with the answer, has {options}.")
        fields |= dict(zip("abcd", options, strict=True))
        answers = answers[0], "ABCD"[options.index(answers[0])]
        meta["chance"] = 0.25
    elif subset == "math_find":
        fields["number"] = _find("The .+ of", row, index)[:-3].lower()
    elif subset == "code_run":
        call = _find(r"func_[0-9]+\(-?[0-9]+\)", row, index)
        fields |= {"call": call, "function": call.partition("(")[0]}
    context, question = _prompt.split(prompt, row["context"], **fields)
    context, question = _prompt.cut_middle("infinitebench", context, question, limit, tokens, count)
    return Sample(context, question, "", answers, metric, limit, meta)


def _find(pattern: str, row: _files.Row, index: int) -> str:
    """What upstream takes out of the question with this pattern."""
    found = re.search(pattern, row["input"])
    if found is None:
        raise EvalError(f"infinitebench: the input of row {index} has no {pattern!r}: {row['input'][:80]!r}.")
    return found[0]
