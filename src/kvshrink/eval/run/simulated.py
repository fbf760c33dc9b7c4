"""All keys and values lossy in one forward pass, as tables of Palu and KVQuant are made. It saves no byte.

Source: the practice of Palu run_ppl_eval.py@bb22666e and KVQuant llama_simquant.py@57a23835: every query reads lossy
keys and values only, its own token's included, without window or sinks. So it is harsher than decoding, and not what
a cache holds. Departure: codes come in the method's own pages, the last one filled up with masked rows.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvshrink.attach import attach
from kvshrink.attach.fill import held_by
from kvshrink.attach.hook import Attachment
from kvshrink.cache import KVCache
from kvshrink.cache.layer import CompressedLayer
from kvshrink.cache.lossy import round_trip
from kvshrink.errors import EvalError
from kvshrink.eval.run.teacher import Entry, Tokens, Track, checked, compared, empty
from kvshrink.methods._roles import Method
from kvshrink.methods.artifact import Artifact
from kvshrink.store.modes import without_dropout


class Simulated(DynamicCache):
    """A full cache whose `update` sends keys and values through codecs and back. For one forward of unpadded input."""

    def __init__(self, model: Any, like: KVCache, attachment: Attachment) -> None:
        super().__init__(config=model.config)
        self.page = like.method.page
        self.codecs = [x.codecs if isinstance(x, CompressedLayer) else None for x in like.layers]
        self.ropes = [info.rope for info in attachment.layers]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        codecs = self.codecs[layer_idx]
        if codecs is not None:
            key_states = round_trip(codecs[0], key_states, self.ropes[layer_idx], self.page)
            value_states = round_trip(codecs[1], value_states, None, self.page)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@without_dropout
@torch.inference_mode()
def simulate(model: Any, methods: Mapping[str, Entry], ids: Tokens, prefix: int) -> dict[str, Track]:
    """Score ids[prefix:] after one forward pass over all tokens, every key and value lossy.

    Raises EvalError, before anything runs, for a method of which a cache does more than its codecs do.
    """
    ids, prefix = checked(model, ids, prefix)
    for label, entry in methods.items():
        artifact = Artifact(entry, {}) if isinstance(entry, Method) else entry
        if artifact is not None and (why := artifact.apart):
            name = type(artifact.method).__name__
            raise EvalError(f"{label}: {name} {why}, which rows through its codecs do not show. Use mode='decode'.")
    part, targets, attachment = ids[:, :-1], ids[0, prefix:], attach(model)
    dense = DynamicCache(config=model.config)

    def run(cache: DynamicCache) -> Tensor:
        return model(input_ids=part, past_key_values=cache, logits_to_keep=len(targets)).logits[0]

    full, tracks = run(dense), {}
    size = sum(t.nbytes for layer in dense.layers for t in held_by(layer))
    for label, method in methods.items():
        started, logits = time.perf_counter(), full
        if method is not None:
            logits = run(Simulated(model, empty(model, method), attachment))
        reads = np.arange(prefix, ids.shape[1]) * (method is not None)
        scores, held = compared(full, logits, targets), size if method is None else None
        tracks[label] = Track.of(scores, reads, held, size, time.perf_counter() - started)
    return tracks
