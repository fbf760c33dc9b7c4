"""Attention Matching: a prompt becomes a few keys and values that attend as all of it did. arXiv 2602.16284

The model reads the prompt again (attach/judging.py), which gives queries to match by and says which tokens to begin
with; keys and values of these are then changed in closed form (cache/matching.py). What comes of a document answers
many questions: `kvshrink compact` saves it.

A prompt takes about three times as long, and some least squares of each head. What is decoded stays, and so do steps of
fewer than 32 tokens. Only the first prompt of a cache is matched, of one in chunks the first chunk: of a later one
these queries read mostly what is stored before it, by which its own tokens cannot be told. It is chosen from as KVzip
does.

Departures: tokens are chosen and shared between heads as KVzip does, by the most attention of any query of the
repetition, where the paper takes its root mean square, a profile of heads made beforehand, or orthogonal matching
pursuit; the weight of a key is not a bias beside it but moves the key; no questions are made up to match by.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from kvshrink.methods._policy import Scorer
from kvshrink.methods._reading_again import ReadingAgain, Repeated
from kvshrink.methods._roles import Fitted
from kvshrink.methods._settings import require


@final
@dataclass(frozen=True)
class AttentionMatching(ReadingAgain):
    """As KVzip, what stays attending as all did."""

    matches: ClassVar[bool] = True

    def scorer(self, fitted: Fitted) -> Scorer:
        return Repeated(self.ratio, self.per, heard=True)

    def check(self) -> None:
        super().check()
        require(not self.merge, "merge=True beside matching", "What is dropped is matched already. Leave it out.")


METHOD = AttentionMatching
