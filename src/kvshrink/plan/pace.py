"""What a decoding step takes over a setting's cache, beside the same step over the full one: both in turn, where the
model is.

The caches are filled with noise, which takes the time that any text takes, except where a method reads what it chooses.
"""

import copy
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache

from kvshrink.attach import attach, make_cache
from kvshrink.attach.fill import fill
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.plan.check import noise
from kvshrink.store.modes import without_dropout

STEPS = 7  # of each, after one that is not counted


@dataclass
class Pace:
    """Steps of `batch` sequences of `tokens` tokens, or of as many as plan/check.py fills."""

    model: Any
    tokens: int
    batch: int

    @cached_property
    def dense(self) -> tuple[DynamicCache, int]:
        """(a full cache, its sequences)."""
        cache, rows, _ = noise(self.model, self.tokens, self.batch)
        return cache, rows

    @without_dropout
    @torch.inference_mode()
    def ratio(self, method: Method | Artifact) -> float:
        """Median time of a step over the method's cache, in that of one over the full cache."""
        dense, rows = self.dense
        cache, full = make_cache(self.model, method), copy.deepcopy(dense)
        fill(cache, dense, attach(self.model))
        token = torch.zeros(rows, 1, dtype=torch.long, device=self._device)
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(STEPS + 1):
            for held, times in zip((full, cache), taken, strict=True):
                started = self._now()
                self.model(input_ids=token, past_key_values=held)
                times.append(self._now() - started)
        theirs, ours = (statistics.median(times[1:]) for times in taken)
        return ours / theirs

    @property
    def _device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
