"""What every generator is made of: documents of weighted segments, and a world to draw their content from.

A segment's weight is the loss weight of its tokens; a segment of weight ANSWER is an answer, and decoding would start
right after the segment before it. Segment borders fall on pre-token borders of the tokenizer (before a space, a digit,
a newline or punctuation), so that encoding the segments one by one gives the ids of the joined text.

Sizes are in tokens. Generators steer them by the average cost of a record, not by encoding: ten times faster, and
a few per cent off.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

RECORD = 0.05  # random keys and values: nothing to learn there
PROMPT = 0.25  # fixed wording of a question
TEXT = 0.5  # book text
ANSWER = 4.0  # tokens the context determines

Segment = tuple[str, float]


@dataclass
class Example:
    """One document: weighted text segments."""

    segments: list[Segment] = field(default_factory=list)

    def add(self, text: str, weight: float) -> None:
        self.segments.append((text, weight))

    @property
    def text(self) -> str:
        return "".join(t for t, _ in self.segments)


@dataclass
class World:
    """What the generators draw from: a word list, book text and a random source."""

    words: Sequence[str]
    books: Sequence[str]
    rng: random.Random
    chars_per_token: float = 3.6

    def word(self) -> str:
        return self.rng.choice(self.words)

    def distinct_words(self, n: int) -> list[str]:
        """n different words, or word pairs where the list is too short."""
        if n <= len(self.words):
            return self.rng.sample(list(self.words), n)
        return self._distinct_pairs(n, self.words, self.words)

    def pairs(self, n: int, shared: float = 0.12) -> list[str]:
        """n distinct hyphenated word pairs; now and then from small pools, so that keys share words (hard)."""
        left = right = self.words
        if self.rng.random() < shared:
            side = max(4, int((2.5 * n) ** 0.5) + 1)
            left, right = self.distinct_words(side), self.distinct_words(side)
        return self._distinct_pairs(n, left, right)

    def digits(self, n: int) -> str:
        return str(self.rng.randint(1, 9)) + "".join(self.rng.choice(string.digits) for _ in range(n - 1))

    def passage(self, chars: int) -> str:
        """About `chars` characters of one book, cut at word borders, without line breaks."""
        book = self.rng.choice(self.books)
        at = self.rng.randrange(max(1, len(book) - chars - 400))
        cut = book[at : at + chars + 200]
        first = cut.find(" ") + 1
        last = cut.rfind(" ", first, first + chars)
        return " ".join(cut[first : last if last > first else None].split())

    def picks(self, n: int, count: int) -> list[int]:
        """Which of n records are asked for: `count` of them, without repetition while there are records."""
        order = list(range(n))
        self.rng.shuffle(order)
        while len(order) < count:
            order.append(self.rng.randrange(n))
        return order[:count]

    def scatter(self, sentences: list[str], tokens: int, depths: Sequence[float] | None = None) -> list[Segment]:
        """The sentences inside `tokens` of book text, at random or the given depths (0 to 1)."""
        cuts = sorted(self.rng.random() for _ in sentences) if depths is None else depths
        out: list[Segment] = []
        done = 0.0
        for sentence, cut in zip(sentences, cuts, strict=True):
            self._fill(out, cut - done, tokens)
            out.append((" " + sentence, RECORD))
            done = max(done, cut)
        self._fill(out, 1.0 - done, tokens)
        last, weight = out[-1]
        return [*out[:-1], (last + "\n", weight)]

    def _fill(self, out: list[Segment], share: float, tokens: int) -> None:
        chars = int(share * tokens * self.chars_per_token)
        if chars > 12:
            out.append((" " + self.passage(chars), TEXT))

    def _distinct_pairs(self, n: int, left: Sequence[str], right: Sequence[str]) -> list[str]:
        seen: dict[str, None] = {}
        while len(seen) < n:
            seen[f"{self.rng.choice(left)}-{self.rng.choice(right)}"] = None
        return list(seen)
