"""KL of a method's predictions, read through the cache that it really makes: nothing is assumed of what it stores.

The rows are those of a `Recall`, which reads them through codecs alone: a third of the work, and the same for a method
that does no more (`Method.apart`). Each cache is filled from an exact prefill, and the repetition is read a page at a
time. A method that lets a new token read a part of the tokens does so for single ones, so these come one by one.
"""

from typing import Any

import torch
from transformers import DynamicCache

from kvshrink.attach import attach, make_cache
from kvshrink.attach.fill import Wanted, fill, prefill
from kvshrink.attach.judging import judged_by_reading_again
from kvshrink.cache import KVCache
from kvshrink.fit.probe import Recall
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact


class Judge:
    """A Recall's rows, prefilled again with what methods ask of queries."""

    def __init__(self, recall: Recall, step: int) -> None:
        self.model, self.recall, self.step = recall.reader.model, recall, step
        self.exact = prefill(self.model, recall.made[:, : -recall.tail], wanted=Wanted(torch.arange, hidden=True))
        self.queries = 0

    def judged(self, queries: int) -> DynamicCache:
        """The rows with what the model needs of them, when it reads them again, and so many of its queries."""
        made: Any = self.exact
        if made.judged is None or queries > self.queries:
            context = self.recall.made[:, : -self.recall.tail]
            made.judged, self.queries = judged_by_reading_again(self.model, made, context, queries=queries), queries
        found: DynamicCache = made
        return found

    @torch.no_grad()
    def kl(self, method: Method | Artifact) -> float:
        """In nats, over all tokens of the repetitions. Raises DataError where predictions are no numbers."""
        cache, exact = make_cache(self.model, method), self.exact
        scorers = [layer.policy.scorer for layer in cache.compressed]
        if any(s is not None and s.judged for s in scorers):
            exact = self.judged(max(s.listens for s in scorers if s is not None))
        fill(cache, exact, attach(self.model))
        tail = self.recall.made[:, -self.recall.tail :]
        parts = tail.split(1 if _chooses(cache) else self.step, 1)
        return self.recall.lost(
            self.model(input_ids=x, past_key_values=cache).logits.float().log_softmax(-1) for x in parts
        )


def _chooses(cache: KVCache) -> bool:
    """Whether a single new token reads some of the tokens alone."""
    seen = cache.get_seq_length()
    reads = (codec.reads(seen) for layer in cache.compressed for codec in layer.codecs or ())
    return any(count is not None and count < seen for count in reads)
