"""Fidelity: how far a cache moves the model's predictions away from those with the full cache, over documents.

KL divergence is the headline, since perplexity may fall while predictions drift: arXiv 2407.09141 (changed answers go
with KL), llama.cpp's --kl-divergence. Every document scores the same number of tokens, so that each counts the same;
intervals are 95 % over documents, the difference in NLL paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from kvshrink.errors import EvalError
from kvshrink.eval.run.perplexity import bits_per_byte, chunk_of, tracks
from kvshrink.eval.run.stats import bootstrap, student
from kvshrink.eval.run.teacher import Entry, Tokens, Track, checked, follow, opened
from kvshrink.store.modes import without_dropout

NEAREST, WIDER = 32, 4  # distances from the prefix end: up to 32 tokens, then 4 times as far each
DIGITS = 6
FEW = 20  # documents, up to which intervals are Student's


@final
@dataclass(frozen=True)
class Fidelity:
    """One method over some documents. Nats, per scored token; *_full is the full cache, d* is this minus full.

    *_low, *_high:       95 % interval over documents: Student's t up to 20, else bootstrap; None for a single one.
    top1, top5:          share of positions with the same likeliest token; mean share of the five likeliest in common.
    dp_rms:              root mean square change of the true token's probability.
    trajectory_prefix:   tokens that greedy generation has in common from the start, mean over documents, of
    trajectory_tokens    generated; trajectory_agreement: share of equal tokens at equal places. None if not asked for.
    generated_kl:        mean KL along the text that the full cache generates greedily, which both then read;
    generated_growth:    its mean over the last half of the steps over that of the first; generated_by_step: as
                         by_distance. None if not asked for.
    by_distance:         mean KL of the tokens up to so far from the prefix end, and beyond the entry before.
    byte_ratio, exercised: mean over documents, see Perplexity.
    """

    mode: str
    chunk: int | None
    documents: int
    positions: int
    kl_mean: float
    kl_low: float | None
    kl_high: float | None
    kl_median: float
    kl_p95: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1: float
    top5: float
    dp_rms: float
    nll: float
    nll_full: float
    dnll: float
    dnll_low: float | None
    dnll_high: float | None
    ppl: float
    ppl_full: float
    bits_per_byte: float | None
    trajectory_prefix: float | None
    trajectory_agreement: float | None
    trajectory_tokens: int
    generated_kl: float | None
    generated_growth: float | None
    generated_by_step: list[dict[str, float]]
    by_distance: list[dict[str, float]]
    exercised: float
    byte_ratio: float | None

    def to_dict(self) -> dict:
        """Plain values, rounded, for JSON."""
        values = {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in asdict(self).items()}
        for name in ("by_distance", "generated_by_step"):
            values[name] = [{**x, "kl": round(x["kl"], DIGITS)} for x in getattr(self, name)]
        return values


def fidelity(
    model: Any,
    methods: Mapping[str, Entry],
    documents: Sequence[Tokens],
    *,
    prefix: int,
    mode: str = "decode",
    chunk: int | None = None,
    trajectory: int = 0,
    n_bytes: int | None = None,
    seed: int = 0,
) -> dict[str, Fidelity]:
    """Every method on every document: ids[prefix:] is scored (see teacher.follow).

    trajectory: tokens to generate greedily after each prefix, 0 for none: by each cache alone, and by the full one,
    whose text all then read. n_bytes: of all scored text together.
    Raises EvalError if the documents differ in length or a method's cache is not exercised.
    """
    lengths = [x.shape[-1] if isinstance(x, Tensor) else len(x) for x in documents]
    if len(set(lengths)) != 1:
        raise EvalError(
            f"{len(lengths)} documents of {min(lengths, default=0)} to {max(lengths, default=0)} tokens: "
            "give at least one, and cut all to one length, so that each counts the same."
        )
    check_mode(mode, chunk, trajectory)
    found: dict[str, list[Track]] = {label: [] for label in methods}
    paths: dict[str, list[np.ndarray]] = {label: [] for label in methods}
    along: dict[str, list[np.ndarray]] = {label: [] for label in methods}
    for ids in documents:
        for label, track in tracks(model, methods, ids, mode, prefix, chunk).items():
            found[label].append(track)
        if trajectory:
            said, equal = free_running(model, methods, ids, prefix, trajectory)
            tracks_along = generated(model, methods, ids, prefix, said)
            for label in methods:
                paths[label].append(equal[label])
                along[label].append(tracks_along[label].kl)
    step = chunk_of(mode, chunk)
    return {label: summary(found[label], paths[label], mode, step, n_bytes, seed, along[label]) for label in methods}


def check_mode(mode: str, chunk: int | None, trajectory: int) -> None:
    """Raise EvalError on a chunk or a trajectory that the mode cannot have."""
    chunk_of(mode, chunk)
    if trajectory and mode == "simulated":
        raise EvalError(f"trajectory={trajectory}: nothing can be generated in the mode 'simulated'. Use 'decode'.")


def summary(
    documents: Sequence[Track],
    paths: Sequence[np.ndarray],
    mode: str,
    chunk: int | None,
    n_bytes: int | None = None,
    seed: int = 0,
    along: Sequence[np.ndarray] = (),
) -> Fidelity:
    """Fidelity of one method from its tracks, trajectories (whether each generated token is the full cache's), and KL
    along the full cache's own text."""
    own = np.stack(along) if along else None
    kl, nll, nll_full, top1, top5, dp = (
        np.stack([getattr(x, name) for x in documents]) for name in ("kl", "nll", "nll_full", "top1", "top5", "dp")
    )
    kl_low, kl_high = _interval(kl, seed)
    kl_low = None if kl_low is None else max(0.0, kl_low)  # a divergence is never below 0
    dnll_low, dnll_high = _interval(nll - nll_full, seed)
    median, p95, p99, p999 = (float(np.quantile(kl, q)) for q in (0.5, 0.95, 0.99, 0.999))
    ratios = [x.byte_ratio for x in documents if x.byte_ratio is not None]
    return Fidelity(
        mode=mode,
        chunk=kl.shape[1] if mode == "prefix_compressed" else chunk,
        documents=len(documents),
        positions=kl.size,
        kl_mean=float(kl.mean()),
        kl_low=kl_low,
        kl_high=kl_high,
        kl_median=median,
        kl_p95=p95,
        kl_p99=p99,
        kl_p999=p999,
        kl_max=float(kl.max()),
        top1=float(top1.mean()),
        top5=float(top5.mean()),
        dp_rms=float(np.sqrt((dp**2).mean())),
        nll=float(nll.mean()),
        nll_full=float(nll_full.mean()),
        dnll=float((nll - nll_full).mean()),
        dnll_low=dnll_low,
        dnll_high=dnll_high,
        ppl=float(np.exp(nll.mean())),
        ppl_full=float(np.exp(nll_full.mean())),
        bits_per_byte=None if n_bytes is None else bits_per_byte(float(nll.sum()), n_bytes),
        trajectory_prefix=float(np.mean([common_prefix(x) for x in paths])) if paths else None,
        trajectory_agreement=float(np.mean([x.mean() for x in paths])) if paths else None,
        trajectory_tokens=len(paths[0]) if paths else 0,
        generated_kl=None if own is None else float(own.mean()),
        generated_growth=None if own is None else growth(own),
        generated_by_step=[] if own is None else by_distance(own),
        by_distance=by_distance(kl),
        exercised=float(np.mean([x.exercised for x in documents])),
        byte_ratio=float(np.mean(ratios)) if ratios else None,
    )


def by_distance(kl: np.ndarray) -> list[dict[str, float]]:
    """Mean of kl [documents, positions] by distance from the prefix end; the first scored token is at distance 1."""
    out, start, upto = [], 0, NEAREST
    while start < kl.shape[1]:
        end = min(upto, kl.shape[1])
        out.append({"upto": end, "kl": float(kl[:, start:end].mean())})
        start, upto = end, upto * WIDER
    return out


def growth(kl: np.ndarray) -> float | None:
    """Mean of kl [documents, steps] over the last half of the steps over that of the first; None for a single step."""
    half = kl.shape[1] // 2
    first = float(kl[:, :half].mean()) if half else 0.0
    return float(kl[:, -half:].mean()) / first if first > 0 else None


def generated(model: Any, methods: Mapping[str, Entry], ids: Tokens, prefix: int, said: np.ndarray) -> dict[str, Track]:
    """Tracks along what the full cache said after the prefix, one token a forward: what becomes of the model's own
    words, where teacher-forced text says what becomes of others'."""
    ids, prefix = checked(model, ids, prefix)
    return follow(model, methods, torch.cat([ids[:, :prefix], torch.from_numpy(said).to(ids)[None]], 1), prefix)


def trajectories(
    model: Any, methods: Mapping[str, Entry], ids: Tokens, prefix: int, count: int
) -> dict[str, np.ndarray]:
    """Whether each of `count` greedy tokens after the prefix is the one that the full cache gives there."""
    return free_running(model, methods, ids, prefix, count)[1]


@without_dropout
@torch.inference_mode()
def free_running(
    model: Any, methods: Mapping[str, Entry], ids: Tokens, prefix: int, count: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(`count` greedy tokens of the full cache after the prefix, whether each method's are the same, bool [count]).

    Generation does not stop at an end-of-sequence token.
    """
    ids, prefix = checked(model, ids, prefix)
    dense, caches = opened(model, methods, ids[:, : prefix - 1])
    first = ids[:, prefix - 1 : prefix]
    wanted = _greedy(model, dense, first, count)
    return wanted, {
        label: (wanted if cache is None else _greedy(model, cache, first, count)) == wanted
        for label, cache in caches.items()
    }


def common_prefix(equal: np.ndarray) -> int:
    """Leading true elements."""
    return len(equal) if bool(equal.all()) else int(equal.argmin())


def _greedy(model: Any, cache: Any, token: Tensor, count: int) -> np.ndarray:
    out = []
    for _ in range(count):
        token = model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        out.append(token)
    return torch.cat(out, 1)[0].cpu().numpy()


def _interval(values: np.ndarray, seed: int) -> tuple[float, float] | tuple[None, None]:
    """Of the mean over documents; one document says nothing about others."""
    means = values.mean(1).tolist()
    return (None, None) if len(means) < 2 else bootstrap(means, seed) if len(means) > FEW else student(means)
