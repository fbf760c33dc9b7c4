"""What a setting costs: its bytes by the method's own arithmetic, its KL measured on text that no fit has seen, and
where it is asked, the time of a decoding step (pace.py).

The text runs through the model once; any number of settings is then fitted to the same statistics. The last tenth of
the rows is kept from the fit: passages of it are repeated (fit/probe.py), and the repetition is read a page at a time
over what the setting leaves of the rest, with pages leaving the window as they do in use: through its codecs where
these are all that a cache does (`Method.apart`), else through a cache (judge.py).

Trade-off: how `spectral` shares its bytes is measured at the largest window of the search, and roughly: budgets near
each other have one answer. `fit` measures it at the window and the budget that were chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from kvshrink.attach import attach
from kvshrink.attach.budget import CacheBudget
from kvshrink.attach.factory import digest_of
from kvshrink.attach.families import shape_of
from kvshrink.attach.identity import identity_of, model_key
from kvshrink.errors import DataError
from kvshrink.fit.data import rows_hash
from kvshrink.fit.gather import gather
from kvshrink.fit.probe import Recall
from kvshrink.fit.recall import REPEATED
from kvshrink.methods import build, name_of
from kvshrink.methods._roles import Method
from kvshrink.methods._stats import CalibrationStats
from kvshrink.methods.artifact import Artifact
from kvshrink.methods.quant.rtn import RTN
from kvshrink.plan.judge import Judge
from kvshrink.plan.pace import Pace
from kvshrink.plan.space import SINKS, windows
from kvshrink.shapes import Int
from kvshrink.store.log import Log, is_number, key_of
from kvshrink.store.modes import without_dropout

HELD_OUT = 10  # one row in so many
BATCH = 4  # calibration rows per forward pass


@dataclass(frozen=True)
class Point:
    """A setting: bytes that it promises for one sequence, the share of the full cache's, KL in nats."""

    name: str
    settings: dict
    nbytes: int
    byte_ratio: float
    kl: float

    @property
    def method(self) -> Method:
        return build(self.name, self.settings)


def is_pace(row: dict) -> bool:
    """Whether a row of a log says what a step takes over a setting."""
    return set(row) == {"key", "method", "settings", "pace"} and is_number(row["pace"]) and row["pace"] > 0


def is_point(row: dict) -> bool:
    """Whether a row of a log says what a setting loses."""
    return set(row) == {"key", "method", "settings", "kl"} and is_number(row["kl"]) and row["kl"] >= 0


class Bench:
    """Measures settings on one model and text. What `log` has is not measured again."""

    def __init__(
        self, model: Any, rows: Int[Tensor, "rows length"], sizes: CacheBudget, log: Log, progress: bool
    ) -> None:
        self.model, self.sizes, self.log, self.progress = model, sizes, log, progress
        self.infos, self.identity = attach(model).layers, identity_of(model)
        self.shapes = {i: shape_of(x) for i, x in enumerate(self.infos) if x.compressed}
        self.widest = widest(sizes.tokens)
        self.fitted_rows, self.held_rows = split(rows, self.widest)
        self.key = (model_key(model), rows_hash(rows))
        self.measured = 0
        self._paces: dict[int, Pace] = {}
        self._last: Artifact | None = None

    @cached_property
    def facts(self) -> dict[int, CalibrationStats]:
        return gather(self.model, self.fitted_rows, BATCH, self.progress)

    @cached_property
    def sampled(self) -> dict[int, CalibrationStats]:
        """With rows as they are, for methods that learn from them."""
        return gather(self.model, self.fitted_rows, BATCH, self.progress, sample=True)

    @cached_property
    @without_dropout
    def asks(self) -> Recall:
        """For methods that ask, while they are fitted, what a loss costs."""
        return Recall(self.model, self.infos, self.fitted_rows, self.widest, self.progress, rough=True)

    @cached_property
    @without_dropout
    def judge(self) -> Recall:
        return Recall(self.model, self.infos, self.held_rows, self.widest, False, chunk=self.widest.page)

    @cached_property
    @without_dropout
    def cached(self) -> Judge:
        """For methods of which a cache does more than codecs alone."""
        return Judge(self.judge, self.widest.page)

    @without_dropout
    def point(self, method: Method) -> Point:
        """Where a setting stands."""
        key = key_of("plan", *self.key, name_of(method), method.settings())
        if not self.log.has(key, is_point):
            self.log.add({"key": key, "method": name_of(method), "settings": method.settings(), "kl": self._kl(method)})
            self.measured += 1
        kl = self.log.rows[key]["kl"]
        return Point(name_of(method), method.settings(), self.sizes.held(method), self.sizes.byte_ratio(method), kl)

    def pace(self, method: Method, batch: int) -> float:
        """Time of a decoding step of `batch` sequences, in that of the full cache's."""
        tokens = self.sizes.tokens
        device = str(next(self.model.parameters()).device)
        key = key_of("pace", *self.key, name_of(method), method.settings(), tokens, batch, device)
        if not self.log.has(key, is_pace):
            ready = self.fitted(method) if method.needs_fit else method
            ratio = self._paces.setdefault(batch, Pace(self.model, tokens, batch)).ratio(ready)
            self.log.add({"key": key, "method": name_of(method), "settings": method.settings(), "pace": ratio})
        return float(self.log.rows[key]["pace"])

    @without_dropout
    def fitted(self, method: Method) -> Artifact:
        """The method fitted to the statistics; nothing is trained. The last one is kept: it is timed after its KL."""
        if self._last is not None and digest_of(self._last.method) == digest_of(method):  # 1 == 1.0, but they differ
            return self._last
        known = self.sampled if method.samples else self.facts
        layers: Mapping[int, Any] = {i: method.fit_layer(facts) for i, facts in known.items()}
        layers, record = method.finish(layers, self.shapes, self.asks if method.probes else None)
        model = {"name": str(self.model.config.name_or_path), "identity": self.identity.to_dict()}
        self._last = Artifact(method, layers, model, record)
        return self._last

    def _kl(self, method: Method) -> float:
        ready = self.fitted(method) if method.needs_fit else Artifact(method, {i: {} for i in self.shapes})
        if ready.apart:
            return self.cached.kl(ready if method.needs_fit else method)
        pairs = {i: method.codecs(shape, ready.layers[i]) for i, shape in self.shapes.items()}
        return self.judge.seen_by(method).kl({i: pair for i, pair in pairs.items() if pair is not None})


def widest(tokens: int) -> Method:
    """Stands for all methods of a plan for so many tokens: whose window and sinks none exceeds."""
    return RTN(window=max(windows(tokens)), sinks=max(SINKS))


def split(rows: Int[Tensor, "rows length"], widest: Method) -> tuple[Tensor, Tensor]:
    """(rows to fit on, rows to judge on): the last tenth, and no fewer than the probe needs with such a window.

    Raises DataError if nothing is left to fit on.
    """
    least = REPEATED * (widest.window + widest.sinks + widest.page + 2)
    count = max(-(-len(rows) // HELD_OUT), -(-least // rows.shape[1]))
    if count >= len(rows):
        need = least + rows.shape[1]
        raise DataError(f"{rows.numel()} calibration tokens are too few to fit and to judge on. Give {need} or more.")
    return rows[:-count], rows[-count:]
