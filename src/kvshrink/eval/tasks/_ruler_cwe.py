"""RULER's common words (cwe): which ten words stand most often in a numbered list. A solved example comes first.

Limited to the 8166 distinct words of wonderwords; upstream goes on with a list of 8.5 MB beyond them, which only
prompts of well over 100000 tokens need.
Upstream has a short form for prompts under 4096 tokens. Here it serves as well where a tokenizer makes so many tokens
of a word that the long form leaves no room, as the bundled reference model's does at 4096.
"""

from collections.abc import Sequence
from random import Random

from kvshrink.eval.tasks import Count, Sample
from kvshrink.eval.tasks._ruler_draft import Draft
from kvshrink.eval.tasks._ruler_words import words

COMMON = 10
LONG = 3840  # tokens the long form is for: 4096, of which a chat template may have taken some
ENTRIES = 493  # of the shortest long prompt: 10 x 10 + 30 x 3 in the example, 10 x 30 + 1 x 3 in the list
SHARE = 0.85  # of the tokens, for these entries; words drawn at random may need a tenth more
MAX_NEW_TOKENS = 120


def draft(random: Random, tokens: int, count: Count) -> Draft:
    """A sample whose units are distinct words, the ten common ones among them."""
    known = words("adjective", "noun", "verb")
    long = tokens >= LONG and count(numbered(known[:: len(known) // ENTRIES][:ENTRIES])) <= SHARE * tokens
    size, example_often, example_seldom = (40, 10, 3) if long else (20, 3, 1)
    often, seldom = (30, 3) if long else (6, 1)
    drawn, order = random.sample(known, size), random.random()
    example = solved(listing(drawn, example_often, example_seldom, Random(order)), drawn[:COMMON])
    drawn = random.sample(known, len(known))

    def make(n: int) -> Sample:
        context, question, answer_prefix = prompt(listing(drawn[:n], often, seldom, Random(order)))
        answers, meta = tuple(drawn[:COMMON]), {"often": often, "seldom": seldom}
        return Sample(example + context, question, answer_prefix, answers, "string_match_all", MAX_NEW_TOKENS, meta)

    return Draft("distinct words", COMMON + 1, min(len(known), tokens), make)


def listing(distinct: Sequence[str], often: int, seldom: int, random: Random) -> str:
    """The first ten words `often` times, the others `seldom` times, mixed and numbered."""
    entries = [*distinct[:COMMON]] * often + [*distinct[COMMON:]] * seldom
    random.shuffle(entries)
    return numbered(entries)


def numbered(entries: Sequence[str]) -> str:
    """ "1. word 2. word ..." """
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))


def prompt(listed: str) -> tuple[str, str, str]:
    """(context, question, answer prefix)."""
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{listed}\n",
        f"Question: What are the {COMMON} most common words in the above list?",
        f" Answer: The top {COMMON} words that appear most often in the list are:",
    )


def solved(listed: str, common: Sequence[str]) -> str:
    """The example with its answer."""
    return f"{''.join(prompt(listed))} {numbered(common)}\n"
