"""A benchmark's prompt in two parts, and cutting its middle out so that it fits a length."""

from collections.abc import Sequence
from typing import Any

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count
from kvshrink.eval.tasks._common import largest

BOS = 1


def split(template: str, context: str, **fields: Any) -> tuple[str, str]:
    """(context, question) of an official prompt: everything up to the end of {context}, and the rest."""
    before, after = template.split("{context}")
    return before.format(**fields) + context, after.format(**fields)


def cut_middle(
    task: str, context: str, question: str, max_new_tokens: int, tokens: int | None, count: Count | None
) -> tuple[str, str]:
    """The prompt without its middle if it is longer than `tokens` less bos and `max_new_tokens`; None: unchanged.

    LongBench's rule (github.com/THUDM/LongBench@2e00731f, pred.py): the first and the last half are kept. Upstream
    cuts token ids and decodes them again, which moves texts; here the text is cut, at the characters up to which
    `count` finds half the tokens. Where upstream cuts to the model's length, the answer's tokens have room too.
    """
    if tokens is None:
        return context, question
    room, count = _room(task, max_new_tokens, tokens), _given(task, count)
    if count(context) + count(question) <= room:
        return context, question
    prompt, border = context + question, len(context)
    for half in range(room // 2, 0, -1):
        head, tail = len(_start(prompt, half, count)), len(prompt) - len(_end(prompt, half, count))
        context = prompt[: min(head, border)] + prompt[tail:border]
        question = prompt[border:head] + prompt[max(tail, border) :]
        # two halves can have more tokens when they are counted in other pieces
        if count(context) + count(question) <= room:
            return context, question
    raise EvalError(f"{task}: tokens={tokens} leaves no room for a prompt. Raise tokens.")


def cut_context(
    task: str, context: str, questions: Sequence[str], max_new_tokens: int, tokens: int | None, count: Count | None
) -> str:
    """The same, but only the context is cut, to what the longest of its questions leaves: they share one context."""
    if tokens is None:
        return context
    count = _given(task, count)
    room = _room(task, max_new_tokens, tokens) - max(count(question) for question in questions)
    if room < 2:
        raise EvalError(f"{task}: tokens={tokens} leaves {room} tokens of context beside its questions. Raise tokens.")
    return cut_middle(task, context, "", 0, room + BOS, count)[0]


def check_fits(
    task: str, index: int, prompt: str, max_new_tokens: int, tokens: int | None, count: Count | None
) -> None:
    """For benchmarks that are made in fixed lengths and never cut: raises EvalError for a sample longer than tokens."""
    if tokens is not None and (needs := _given(task, count)(prompt) + max_new_tokens + BOS) > tokens:
        raise EvalError(f"{task}: sample {index} needs {needs} tokens, tokens={tokens}. Raise it or take shorter data.")


def _given(task: str, count: Count | None) -> Count:
    if count is None:
        raise EvalError(f"{task}: tokens= needs count=, the tokens of a text. Give both or neither.")
    return count


def _room(task: str, max_new_tokens: int, tokens: int) -> int:
    room = tokens - max_new_tokens - BOS
    if room < 2:
        raise EvalError(f"{task}: tokens={tokens}, the answer alone takes {max_new_tokens}. Raise tokens.")
    return room


def _start(text: str, tokens: int, count: Count) -> str:
    """The longest start of the text with at most so many tokens."""
    high = min(tokens, len(text))
    while high < len(text) and count(text[:high]) <= tokens:
        high = min(2 * high, len(text))
    return text[: largest(0, high, lambda chars: count(text[:chars]) <= tokens)]


def _end(text: str, tokens: int, count: Count) -> str:
    return _start(text[::-1], tokens, lambda reverse: count(reverse[::-1]))[::-1]
