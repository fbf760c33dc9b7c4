"""A sentence hidden in book text: the loop that passkey and needle share. Each of them only words its needle."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, final

from kvshrink import data
from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Sample
from kvshrink.eval.tasks._common import check_count, depth, rng

# The fewest characters a token seen in 500-token stretches of the bundled book, with the bundled tokenizer (3072
# entries; the mean is 3.36, so prompts fill 85 % of `tokens` on average). Larger vocabularies reach 4 and more: raise
# it there.
CHARS_PER_TOKEN = 2.9
FIXED_CHARS_PER_TOKEN = 2.0  # the same for instruction, needle and question, whose digits are a token each
SHORTEST = 100  # characters of book text


@final
@dataclass(frozen=True)
class Needle:
    """The texts of one sample. `intro` opens the context, `sentence` is hidden in it, `answer` is in the sentence."""

    intro: str
    sentence: str
    question: str
    answer_prefix: str
    answer: str
    meta: dict[str, Any]


def samples(
    task: str,
    word: Callable[[Random], Needle],
    n: int,
    seed: int,
    tokens: int,
    chars_per_token: float,
    path: str | Path | None,
) -> list[Sample]:
    """n samples at evenly spread depths. Prompt, bos and generated answer stay below `tokens`.

    Raises EvalError if the text cannot be read, or `tokens` leaves no room for it or needs more of it than there is.
    """
    check_count(task, n)
    text = load(path)
    return [_hide(task, word, text, seed, i, tokens, chars_per_token) for i in range(n)]


def load(path: str | Path | None) -> str:
    """The text of `path` (the bundled heldout.txt if None) on one line. Raises EvalError if it cannot be read."""
    source = data.path("heldout.txt") if path is None else Path(path)
    try:
        return " ".join(source.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"Cannot read the book text {source} ({error}). Give a UTF-8 text file as path=.") from error


def digits(random: Random, n: int) -> str:
    """A number of n digits, the first not 0."""
    return str(random.randrange(10 ** (n - 1), 10**n))


def split(text: str, share: float) -> tuple[str, str]:
    """`text` in two at the last word border within its first `share` of characters."""
    border = max(0, (text + " ").rfind(" ", 0, round(share * len(text)) + 1))
    return text[:border], text[border:].strip()


def _passage(text: str, random: Random, chars: int) -> str:
    """Fewer than `chars` characters of `text`, cut at word borders."""
    at = random.randrange(len(text) - chars + 1)
    cut = text[at : at + chars]
    return cut[cut.find(" ") + 1 : cut.rfind(" ")]


def _hide(
    task: str, word: Callable[[Random], Needle], text: str, seed: int, index: int, tokens: int, chars_per_token: float
) -> Sample:
    random = rng(task, seed, index)
    needle = word(random)
    max_new_tokens = len(needle.answer) + 3
    parts = (needle.intro, needle.sentence, needle.question, needle.answer_prefix)
    # a space or line break after each part; 1 for bos
    fixed = (len("".join(parts)) + len(parts)) / FIXED_CHARS_PER_TOKEN + max_new_tokens + 1
    chars = int((tokens - fixed) * chars_per_token)
    if chars < SHORTEST:
        raise EvalError(
            f"{task}: tokens={tokens} leaves {max(0, chars)} characters for book text "
            f"(chars_per_token={chars_per_token}), at least {SHORTEST} are needed. Raise tokens."
        )
    if chars > len(text):
        raise EvalError(
            f"{task}: tokens={tokens} needs {chars} characters of book text, the file has {len(text)}. "
            "Lower tokens or give a longer text as path=."
        )
    before, after = split(_passage(text, random, chars), depth(index))
    context = " ".join(part for part in (needle.intro, before, needle.sentence, after) if part) + "\n"
    meta = {"index": index, "depth": depth(index), **needle.meta}
    return Sample(context, needle.question, needle.answer_prefix, (needle.answer,), max_new_tokens, meta)
