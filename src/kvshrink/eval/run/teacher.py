"""Teacher forcing: the true tokens of a document through several caches, in step with the full one.

The first prefix - 1 tokens are prefilled, exactly and once, and given to every cache. The prefix's last token is the
first one fed, then the rest, `chunk` tokens a forward: the logits after token i predict token i + 1, so ids[prefix:] is
scored and every prediction was made through the cache. What an exact prefill itself predicts is not scored.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvshrink.attach import attach, make_cache
from kvshrink.attach.fill import fill, held_by, prefill, wanted_by
from kvshrink.cache import KVCache
from kvshrink.errors import EvalError
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.shapes import Float, Int
from kvshrink.store.bytes import nbytes
from kvshrink.store.modes import without_dropout

Entry = Method | Artifact | None  # None: the full cache
Tokens = Tensor | Sequence[int]  # one document: [1, t] or a list
ROWS = 128  # positions compared at a time, so that float32 copies of the logits stay small


@final
@dataclass(frozen=True)
class Track:
    """One document through one cache: an array element per scored token.

    nll, nll_full: negative log-probability of the true token in nats, by this cache and by the full one.
    kl:            KL(full || this) of the next-token distributions, in nats.
    top1, top5:    whether the likeliest token is the same; share of the five likeliest that both have.
    dp:            change of the true token's probability, this minus full.
    compressed:    past tokens that the prediction could only read compressed, or not at all.
    held, full:    bytes of this and of the full cache after the last token. held is None if nothing is stored.
    seconds:       of feeding and scoring, without the prefill.
    """

    nll: np.ndarray
    nll_full: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    dp: np.ndarray
    compressed: np.ndarray
    held: int | None
    full: int
    seconds: float

    @classmethod
    def of(cls, scores: np.ndarray, compressed: np.ndarray, held: int | None, full: int, seconds: float) -> "Track":
        """From what `compared` gives, [6, s]."""
        nll, nll_full, kl, top1, top5, dp = scores
        return cls(nll, nll_full, kl, top1, top5, dp, compressed, held, full, seconds)

    @property
    def exercised(self) -> float:
        """Share of the scored tokens that were predicted from compressed tokens at all."""
        return float((self.compressed > 0).mean())

    @property
    def byte_ratio(self) -> float | None:
        return None if self.held is None else self.held / self.full


@without_dropout
@torch.inference_mode()
def follow(
    model: Any, methods: Mapping[str, Entry], ids: Tokens, prefix: int, chunk: int | None = 1
) -> dict[str, Track]:
    """Score ids[prefix:] through a cache of each method. prefix 0 is as 1: nothing predicts the first token.

    chunk: tokens a forward; 1 is decoding, None all in one forward.
    Raises EvalError if a method's cache held nothing compressed before its last forward: its scores would be those of
    the uncompressed model.
    """
    ids, prefix = checked(model, ids, prefix, chunk)
    dense, caches = opened(model, methods, ids[:, : prefix - 1])
    lanes = [_Lane(label, cache) for label, cache in caches.items()]
    end = ids.shape[1] - 1
    step = end - prefix + 1 if chunk is None else chunk
    for at in range(prefix - 1, end, step):
        part, targets = ids[:, at : min(at + step, end)], ids[0, at + 1 : min(at + step, end) + 1]
        for lane in lanes:
            lane.check(last=at + step >= end)
        started = time.perf_counter()
        full = model(input_ids=part, past_key_values=dense).logits[0]
        if full.is_cuda:
            torch.cuda.synchronize(full.device)  # else the first lane would wait for it
        spent = time.perf_counter() - started
        for lane in lanes:
            lane.feed(model, part, targets, full, spent)
    size = nbytes(t for layer in dense.layers for t in held_by(layer))
    return {lane.label: lane.track(size) for lane in lanes}


def compare(
    full: Float[Tensor, "s v"], logits: Float[Tensor, "s v"], targets: Int[Tensor, " s"]
) -> Float[Tensor, "6 s"]:
    """nll, nll_full, kl, top1, top5, dp of each position (see Track), by a float32 log-softmax."""
    p, q = full.float().log_softmax(-1), logits.float().log_softmax(-1)
    of_p, of_q = (x.gather(-1, targets[:, None])[:, 0] for x in (p, q))
    # rounding may leave a sum of nothing but tiny differences a hair below zero
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    k = min(5, p.shape[-1])
    both = p.topk(k).indices[:, :, None] == q.topk(k).indices[:, None, :]
    top1 = (p.argmax(-1) == q.argmax(-1)).float()
    return torch.stack([-of_q, -of_p, kl, top1, both.any(-1).float().mean(-1), of_q.exp() - of_p.exp()])


def compared(full: Tensor, logits: Tensor, targets: Tensor) -> np.ndarray:
    """`compare` over any number of positions, a few at a time: float64 [6, s]."""
    parts = [compare(*(x[at : at + ROWS] for x in (full, logits, targets))) for at in range(0, len(targets), ROWS)]
    return torch.cat(parts, 1).double().cpu().numpy()


def checked(model: Any, ids: Tokens, prefix: int, chunk: int | None = None) -> tuple[Int[Tensor, "1 t"], int]:
    """The document on the model's device, and the prefix, at least 1. Raises EvalError if nothing is left to score."""
    given = ids if isinstance(ids, Tensor) else torch.tensor([list(ids)], dtype=torch.long)
    if given.dim() != 2 or given.shape[0] != 1 or given.shape[1] < 2:
        raise EvalError(
            f"tokens of shape {tuple(given.shape)}: give one document of 2 or more tokens, [1, t] or a list."
        )
    if not 0 <= prefix < given.shape[1]:
        raise EvalError(
            f"a prefix of {prefix} in {given.shape[1]} tokens leaves nothing to score. Use 0 or more, and less."
        )
    if chunk is not None and chunk < 1:
        raise EvalError(f"chunk={chunk}: feed at least 1 token a forward, or None for all at once.")
    return given.to(next(model.parameters()).device), max(prefix, 1)


def opened(
    model: Any, methods: Mapping[str, Entry], ids: Int[Tensor, "1 t"]
) -> tuple[DynamicCache, dict[str, KVCache | None]]:
    """The full cache after these tokens, and each method's cache filled from it (None for the full one)."""
    attachment = attach(model)
    wanted = wanted_by(methods.values())
    dense = prefill(model, ids, wanted=wanted) if ids.shape[1] else DynamicCache(config=model.config)
    caches: dict[str, KVCache | None] = {}
    for label, method in methods.items():
        cache = caches[label] = None if method is None else empty(model, method)
        if cache is not None and ids.shape[1]:
            fill(cache, dense, attachment)
    return dense, caches


def empty(model: Any, method: Method | Artifact) -> KVCache:
    """An empty cache. Raises EvalError if the method has no layer to work on."""
    cache = make_cache(model, method)
    if not cache.compressed:
        raise EvalError(
            f"all {len(cache.layers)} layers of this model have sliding-window attention and stay as they are: "
            "there is nothing to measure. Use a model with full attention."
        )
    return cache


def compressed_tokens(cache: KVCache) -> int:
    """Past tokens that the next forward can only read compressed, or not at all: seen, and in no exact part."""
    most = 0
    for layer in cache.compressed:
        sinks, columns = layer.sinks, layer.sinks.columns
        first = sinks.size if sinks.full else 0 if columns is None else int((columns >= 0).sum(1).max())
        most = max(most, layer.seen - layer.window.count - first)
    return most


def remedy(method: Method) -> str:
    """What to say where nothing was compressed."""
    pages = method.sinks // method.page + 1  # the first that holds more than sinks
    least = method.window + pages * method.page + 1
    return (
        f"a prefix of at least {least} tokens (window {method.window}, page {method.page}, sinks {method.sinks}), "
        "or a smaller window."
    )


class _Lane:
    """One cache on its way along the document. cache None: the full cache, whose logits are given to all."""

    def __init__(self, label: str, cache: KVCache | None) -> None:
        self.label, self.cache, self.seconds = label, cache, 0.0
        self.scores: list[np.ndarray] = []
        self.reads: list[int] = []

    def check(self, last: bool) -> None:
        """Before the last forward: raise EvalError if none of all scored tokens will have read a compressed one."""
        if self.cache is None or not last or any(self.reads) or compressed_tokens(self.cache):
            return
        raise EvalError(
            f"{self.label}: no scored token read a compressed one. Prefill is exact in this cache: one forward pass "
            "scores the uncompressed model, for every method. Use mode='decode' and "
            f"{remedy(self.cache.method)}"
        )

    def feed(self, model: Any, part: Tensor, targets: Tensor, full: Tensor, spent: float) -> None:
        started, logits, reads = time.perf_counter(), full, 0
        if self.cache is not None:
            spent, reads = 0.0, compressed_tokens(self.cache)
            logits = model(input_ids=part, past_key_values=self.cache).logits[0]
        self.scores.append(compared(full, logits, targets))
        self.reads += [reads] * len(targets)
        self.seconds += spent + time.perf_counter() - started

    def track(self, full: int) -> Track:
        held = full if self.cache is None else self.cache.nbytes
        return Track.of(np.concatenate(self.scores, 1), np.array(self.reads), held, full, self.seconds)
