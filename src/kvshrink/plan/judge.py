"""KL of a method's predictions, read through the cache that it really makes: nothing is assumed of what it stores.

The rows are those of a `Recall`, which reads them through codecs alone: a third of the work, and the same for a method
that does no more (`Method.apart`). Each cache is filled from an exact prefill, and the repetition is read a page at a
time. A method that lets a new token read a part of the tokens does so for single ones, so these come one by one.
"""

from functools import cached_property
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

    @cached_property
    def judged(self) -> DynamicCache:
        """The rows with what the model needs of them, when it reads them again, and some of its queries."""
        context = self.recall.made[:, : -self.recall.tail]
        made: Any = self.exact
        made.judged = judged_by_reading_again(self.model, made, context, queries=True)
        found: DynamicCache = made
        return found

    @torch.no_grad()
    def kl(self, method: Method | Artifact) -> float:
        """In nats, over all tokens of the repetitions. Raises DataError where predictions are no numbers."""
        cache, exact = make_cache(self.model, method), self.exact
        if any(layer.policy.scorer is not None and layer.policy.scorer.judged for layer in cache.compressed):
            exact = self.judged
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
