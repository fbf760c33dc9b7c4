"""Fidelity, per-layer error and memory of a comparison's methods on held-out text, resumable record by record."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kvshrink import data
from kvshrink.attach.factory import digest_of
from kvshrink.attach.fill import held_by
from kvshrink.attach.identity import model_key
from kvshrink.data.text import read_text
from kvshrink.errors import EvalError
from kvshrink.eval.run.entries import FULL, Entry
from kvshrink.eval.run.fidelity import summary, trajectories
from kvshrink.eval.run.layers import layer_errors
from kvshrink.eval.run.memory import decode_peak
from kvshrink.eval.run.outcomes import Failure
from kvshrink.eval.run.perplexity import scored_bytes, tracks
from kvshrink.eval.run.records import has_layers, has_memory, has_path
from kvshrink.eval.run.teacher import Track, opened
from kvshrink.store.bytes import nbytes
from kvshrink.store.log import Log, key_of

MODE, CHUNK = "decode", 1


@dataclass(frozen=True)
class Measured:
    """Rows of results.json."""

    fidelity: list[dict]
    layers: list[dict]
    memory: list[dict]
    failures: list[Failure]


class Meter:
    """Measures methods on `documents` held-out texts, of which the last `scored` tokens are compared.

    As many tokens are generated greedily from there, for the agreement of trajectories.
    """

    def __init__(self, model: Any, tokenizer, documents: int, scored: int, seed: int, log: Log) -> None:
        self.model, self.tokenizer, self.log = model, tokenizer, log
        self.documents, self.scored, self.seed = documents, scored, seed
        self.model_key = model_key(model)

    def run(self, plans: dict[int, Sequence[Entry]]) -> Measured:
        """The entries of each length, controls left out; a method that fails is listed and the others go on."""
        out = Measured([], [], [], [])
        todo = [(n, e) for n, entries in plans.items() for e in entries if e.method is not None]
        texts = {n: held_out(self.tokenizer, n, self.documents, self.seed) for n in plans}
        for length in plans:
            out.memory.append(
                {**_named(Entry(FULL, None, series=FULL), length), **self._memory(None, texts[length][0])}
            )
        for length, entry in tqdm(todo, desc="fidelity", unit="method", disable=not todo):
            with self._isolated(entry.label, length, out):
                self._entry(entry, length, texts[length], out)
        return out

    @contextmanager
    def _isolated(self, label: str, length: int, out: Measured) -> Iterator[None]:
        """List a failure, and let the other methods go on."""
        try:
            yield
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            out.failures.append(Failure(label, "fidelity", length, f"{type(error).__name__}: {line}"))

    def _entry(self, entry: Entry, length: int, texts: list[Tensor], out: Measured) -> None:
        prefix, method = length - self.scored, entry.method
        assert method is not None
        named, done = _named(entry, length), [self._track(method, ids, prefix) for ids in texts]
        size = sum(scored_bytes(self.tokenizer, ids, prefix) for ids in texts)
        found = summary([t for t, _ in done], [p for _, p in done], MODE, CHUNK, size, self.seed)
        out.fidelity.append({**named, **found.to_dict()})
        rows = self._recorded(
            ("layers", digest_of(method), texts[0].tolist(), prefix),
            has_layers,
            lambda: {"rows": [x.to_dict() for x in layer_errors(self.model, method, texts[0], prefix)]},
        )["rows"]
        out.layers.extend({**named, **row} for row in rows)
        out.memory.append({**named, **self._memory(method, texts[0])})

    def _track(self, method: Any, ids: Tensor, prefix: int) -> tuple[Track, np.ndarray]:
        def make() -> dict:
            track = tracks(self.model, {"": method}, ids, MODE, prefix)[""]
            path = trajectories(self.model, {"": method}, ids, prefix, self.scored)[""]
            return {"track": plain(track), "path": path.tolist()}

        row = self._recorded(("track", digest_of(method), ids.tolist(), prefix), has_path, make)
        return track_of(row["track"]), np.array(row["path"])

    def _memory(self, method: Any, ids: Tensor) -> dict:
        """Bytes of the cache after the text, and the temporaries of one more step."""

        def make() -> dict:
            dense, caches = opened(self.model, {"": method}, ids[:, :-1].to(self.model.device))
            full = nbytes(t for layer in dense.layers for t in held_by(layer))
            cache: Any = caches[""] or copy.deepcopy(dense)
            held = full if method is None else cache.nbytes
            return {
                "held": held,
                "full": full,
                "bits": None if method is None else cache.report().bits,
                "peak": decode_peak(self.model, cache, ids[:, -1:].to(self.model.device)),
            }

        row = self._recorded(("memory", None if method is None else digest_of(method), ids.tolist()), has_memory, make)
        return {
            "held": row["held"],
            "full": row["full"],
            "byte_ratio": round(row["held"] / row["full"], 6),
            "bits": row.get("bits"),
            "peak": row["peak"],
        }

    def _recorded(self, parts: tuple, valid: Callable[[dict], bool], make: Callable[[], dict]) -> dict:
        """The log's record of this measurement, made now if there is no valid one."""
        key = key_of(self.model_key, parts)
        if not self.log.has(key, valid):
            self.log.add({"key": key, **make()})
        return self.log.rows[key]


def held_out(tokenizer, length: int, documents: int, seed: int, text: str | None = None) -> list[Tensor]:
    """`documents` texts [1, length], evenly spread over a text (default: the bundled held-out book).

    Raises EvalError if they do not fit.
    """
    ids = tokenizer(book(None) if text is None else text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = len(ids) - (length - len(bos))
    if room < 0:
        raise EvalError(f"a text of {length} tokens is longer than the whole one ({len(ids)}). Use shorter ones.")
    if documents > max(1, room):
        raise EvalError(f"{documents} texts of {length} tokens do not differ: the whole has {len(ids)}. Use fewer.")
    offset = seed % max(1, room // max(1, documents))
    starts = [min(room, round(i * room / documents) + offset) for i in range(documents)]
    return [torch.tensor([bos + ids[at : at + length - len(bos)]]) for at in starts]


def book(path: str | Path | None) -> str:
    """The text of a file. Raises EvalError if it cannot be read."""
    return read_text(data.path("heldout.txt") if path is None else path, "cannot read text", EvalError)


def _named(entry: Entry, length: int) -> dict:
    names = ("series", "target", "reached", "setting")
    return {"method": entry.label, **{name: getattr(entry, name) for name in names}, "length": length}


def plain(track: Track) -> dict:
    """A track as JSON holds it."""
    values = {f.name: getattr(track, f.name) for f in fields(track)}
    return {k: np.round(v, 6).tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def track_of(values: dict) -> Track:
    """A track from what JSON held."""
    named: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in values.items()}
    return Track(**named)
