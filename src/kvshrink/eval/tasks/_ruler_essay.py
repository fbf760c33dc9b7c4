"""Needles between the sentences of a book: the essay haystack of RULER's niah tasks.

Upstream finds sentences with nltk's punkt, which is a download; here a stop, a space and a capital end a sentence,
except after a title or an initial. It only decides where a needle may stand.
"""

import re
from collections.abc import Sequence
from itertools import chain, pairwise
from random import Random

DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent
END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]*[A-Z0-9])")
NO_END = re.compile(r"(?:^|[^\w.])(?:Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|St|Capt|Col|Gen|Lieut|Lt|Sgt|Hon|No|vs|[A-Z])\.\s+$")


def sentences(text: str) -> list[str]:
    """The sentences of a text. Joined with spaces they are the text again, if it has no other white space."""
    found, start = [], 0
    for match in END.finditer(text):
        if not NO_END.search(text[max(start, match.end() - 12) : match.end()]):
            found.append(text[start : match.end()].rstrip())
            start = match.end()
    return [*found, text[start:]]


def depths(random: Random, n: int) -> list[int]:
    """Where n needles stand, in percent of the sentences: n different ones of the 40 depths, in order."""
    return sorted(random.sample(DEPTHS, n))


def hide(words: Sequence[str], n: int, needles: Sequence[str], at: Sequence[int]) -> str:
    """The first n words (over again if there are fewer), with the needles, in this order, at these depths.

    A needle at the very start or end leaves a space there, as upstream.
    """
    text = sentences(" ".join((list(words) * -(-n // len(words)))[:n]))
    borders = [0, *(int(len(text) * (depth / 100)) for depth in at), len(text)]
    parts = [" ".join(text[a:b]) for a, b in pairwise(borders)]
    return " ".join([parts[0], *chain.from_iterable(zip(needles, parts[1:], strict=True))])
