"""Transformers' quantised caches beside ours, on the same documents and samples (equal_bytes.py)."""

import copy
from typing import Any

import numpy as np
from rivals import Contender, divergence, plain
from tqdm import tqdm

from kvshrink.attach.fill import prefill
from kvshrink.eval.run.entries import Entry
from kvshrink.eval.run.runner import Runner
from kvshrink.store.log import Log, key_of


def tracks(model: Any, peers: list[Contender], documents: list, chunk: int | None, log: Log, identity: str) -> dict:
    """{label: [{kl, top1, byte_ratio} per document]}, as `compared` gives them of our own."""
    found: dict[str, list[dict]] = {p.label: [] for p in peers}
    for ids, prefix in tqdm(documents if peers else [], desc="KL of peers", unit="document"):
        keys = {p.label: key_of(identity, p.identity, ids.tolist(), prefix, chunk) for p in peers}
        todo = [p for p in peers if keys[p.label] not in log.rows]
        dense = prefill(model, ids[:, : prefix - 1]) if todo else None
        for p in todo:
            cache, full = p.fill(dense), copy.deepcopy(dense)
            scores = divergence(model, ids[0].tolist(), prefix, cache, full, chunk or ids.shape[1])
            row = {"kl": np.round(scores[2], 6).tolist(), "top1": scores[3].astype(int).tolist()}
            log.add({"key": keys[p.label], **row, "byte_ratio": p.held(cache)[1] / plain(full)})
        for label, key in keys.items():
            found[label].append(log.rows[key])
    return found


class Beside(Runner):
    """A runner that also fills the caches of peers, which are entries without a method of ours."""

    peers: dict[str, Contender]

    def _cache(self, entry: Entry, held: dict, dense: Any, mask: Any) -> Any:
        peer = self.peers.get(entry.label)
        return super()._cache(entry, held, dense, mask) if peer is None else peer.fill(dense)
