"""Perplexity through a cache. The mode is part of every number: the same method scores differently in each.

    decode             the true tokens one by one; each prediction reads what a cache holds while generating
    chunked            `chunk` tokens a forward: they see the past as the cache holds it, and their own chunk exactly
    prefix_compressed  the continuation in one forward: only the prefix is compressed
    simulated          every key and value lossy in one forward: to compare with published tables only, saves no byte

Prefill is exact, so the usual one-forward perplexity of a whole text is that of the uncompressed model for every
method; such a run is refused. Perplexity alone can rank methods backwards: see fidelity.py.

A chunked score is that of decoding where pages leave the window at the borders of chunks. Elsewhere a prediction may
read up to chunk - 1 tokens, rounded up to whole pages, exactly that decoding reads compressed; and the first of a chunk
one page the other way, since a chunk that fills the window spills at once and decoding with its next token.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import exp, log
from typing import Any, final

import torch

from kvshrink.attach.families import text_config
from kvshrink.errors import EvalError
from kvshrink.eval.run.simulated import simulate
from kvshrink.eval.run.teacher import Entry, Tokens, Track, checked, compared, follow
from kvshrink.store.modes import without_dropout

MODES = ("decode", "chunked", "prefix_compressed", "simulated")
CHUNK = 32


@final
@dataclass(frozen=True)
class Perplexity:
    """One document, one cache. NLL is in nats per token.

    chunk:     tokens a forward; None in the mode "simulated".
    exercised: share of the scored tokens whose prediction read compressed tokens at all.
    byte_ratio:      bytes held at the end over those of a full cache; None if simulated.
    gain:      recovered context gain, (NLL without the prefix - NLL) / (NLL without - NLL of the full cache): 1 if
               compressing the prefix costs nothing, 0 if it is worth nothing. In "prefix_compressed" only, and None
               where the prefix does not help the full cache.
    """

    mode: str
    chunk: int | None
    prefix: int
    positions: int
    nll: float
    nll_full: float
    nll_none: float | None
    gain: float | None
    bits_per_byte: float | None
    exercised: float
    byte_ratio: float | None

    @property
    def ppl(self) -> float:
        return exp(self.nll)

    def to_dict(self) -> dict:
        values = {**asdict(self), "ppl": self.ppl, "ppl_full": exp(self.nll_full)}
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}

    def __str__(self) -> str:
        of = "no byte saved" if self.byte_ratio is None else f"{100 * self.byte_ratio:.1f} % of the bytes"
        chunk = "" if self.chunk is None else f", chunk {self.chunk}"
        text = f"perplexity {self.ppl:.4f} [{self.mode}{chunk}; full cache {exp(self.nll_full):.4f}; {of}]"
        text += f" NLL {self.nll:.4f} over {self.positions} tokens after {self.prefix}"
        if self.gain is not None:
            text += f"; recovered context gain {self.gain:.3f}"
        return text + f"; {100 * self.exercised:.0f} % of them read compressed tokens"


def perplexity(
    model: Any,
    method: Entry,
    ids: Tokens,
    *,
    mode: str,
    prefix: int,
    chunk: int | None = None,
    n_bytes: int | None = None,
) -> Perplexity:
    """Perplexity of ids[prefix:] given ids[:prefix], through the method's cache (None: the full cache).

    chunk: for the mode "chunked" only, default 32. n_bytes: bytes of the scored text (see scored_bytes), for bits per
    byte, which compare between tokenizers. Raises EvalError if no compressed token would be read.
    """
    track = tracks(model, {"cache": method}, ids, mode, prefix, chunk)["cache"]
    nll, nll_full = float(track.nll.mean()), float(track.nll_full.mean())
    none = without_prefix(model, ids, prefix) if mode == "prefix_compressed" else None
    return Perplexity(
        mode=mode,
        chunk=len(track.nll) if mode == "prefix_compressed" else chunk_of(mode, chunk),
        prefix=prefix,
        positions=len(track.nll),
        nll=nll,
        nll_full=nll_full,
        nll_none=none,
        gain=None if none is None or none <= nll_full else (none - nll) / (none - nll_full),
        bits_per_byte=None if n_bytes is None else bits_per_byte(float(track.nll.sum()), n_bytes),
        exercised=track.exercised,
        byte_ratio=track.byte_ratio,
    )


def tracks(
    model: Any, methods: Mapping[str, Entry], ids: Tokens, mode: str, prefix: int, chunk: int | None = None
) -> dict[str, Track]:
    """One document through a cache of each method, in one of the MODES."""
    step = chunk_of(mode, chunk)
    if mode == "simulated":
        return simulate(model, methods, ids, prefix)
    return follow(model, methods, ids, prefix, step)


def chunk_of(mode: str, chunk: int | None) -> int | None:
    """Tokens a forward in this mode, None for all at once. Raises EvalError on a chunk that the mode does not take."""
    if mode not in MODES:
        raise EvalError(f"mode {mode!r} is unknown. Use one of {', '.join(MODES)}.")
    if mode == "chunked":
        return CHUNK if chunk is None else chunk
    if chunk is not None and not (mode == "decode" and chunk == 1):
        raise EvalError(f"chunk={chunk} has no meaning with mode={mode!r}. Leave it out, or use mode='chunked'.")
    return 1 if mode == "decode" else None


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Nats of a whole text in bits per byte of it."""
    if n_bytes < 1:
        raise EvalError(f"n_bytes={n_bytes}: give the number of bytes of the scored text, at least 1.")
    return nats / log(2) / n_bytes


def scored_bytes(tokenizer, ids: Tokens, prefix: int) -> int:
    """UTF-8 bytes of the text of ids[prefix:]; special tokens are none. A character cut by the border counts once."""
    tokens = ids[0].tolist() if isinstance(ids, torch.Tensor) else list(ids)
    whole, before = (tokenizer.decode(x, skip_special_tokens=True) for x in (tokens, tokens[: max(prefix, 1)]))
    return len(whole.encode()) - len(before.rstrip("\ufffd").encode())


@without_dropout
@torch.inference_mode()
def without_prefix(model: Any, ids: Tokens, prefix: int) -> float:
    """NLL of ids[prefix:] with nothing before it but its first input, and bos if the document began with it."""
    ids, prefix = checked(model, ids, prefix)
    part, targets = ids[:, prefix - 1 : -1], ids[0, prefix:]
    if prefix > 1 and int(ids[0, 0]) == text_config(model).bos_token_id:
        part = torch.cat([ids[:, :1], part], 1)
    logits = model(input_ids=part, use_cache=False, logits_to_keep=len(targets)).logits[0]
    return float(compared(logits, logits, targets)[0].mean())
