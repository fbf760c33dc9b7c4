"""The search: Optuna's TPE (arXiv 2304.11127) chooses settings, the budget sets the bytes, the probe says the KL.

Under a byte budget each trial is fitted to the budget and its KL is minimised. Under a KL each trial's bytes go down
until the KL is passed, and the bytes are minimised; a trial that misses the KL at the best bytes so far is left
there. The best setting of each method is then fitted to a quarter, half, twice and four times the bytes, for the front.

A run resumes by replay: the sampler is seeded and what was measured is in the log, so an interrupted search goes on as
if nothing had happened. (A stored study would not: Optuna keeps trials, not the sampler's state.)
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from kvshrink.errors import KVShrinkError, SettingError
from kvshrink.methods._roles import Method
from kvshrink.plan.bench import Bench, Point
from kvshrink.plan.budget import Budget
from kvshrink.plan.space import defaults, fit_to_budget, label, smallest, suggest
from kvshrink.store.bytes import human

LEVELS = (0.25, 0.5, 2.0, 4.0)  # of the plan's bytes, where the best setting of each method is measured too
STEP = 1.02  # bytes are searched this finely under a KL
STARTUP = 10  # trials before the sampler begins to learn


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points of which none has both fewer bytes and a smaller KL, by bytes."""
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.nbytes, p.kl)):
        if not front or p.kl < front[-1].kl:
            front.append(p)
    return front


@dataclass
class Search:
    """trials: settings that are tried. points: every setting that was measured."""

    bench: Bench
    budget: Budget
    names: Sequence[str]
    trials: int
    seed: int
    points: list[Point] = field(default_factory=list)

    def run(self) -> Point:
        """The chosen point. Raises SettingError if the budget is smaller than anything."""
        names = self._possible()
        study = _study(self.seed, min(STARTUP, self.trials))
        for name in names:
            own = defaults(name, self.bench.sizes)
            study.enqueue_trial({"method": name, **{f"{name}.{k}": v for k, v in own.items()}})
        with tqdm(total=self.trials, desc="plan", unit="trial", disable=not self.bench.progress) as bar:
            for _ in range(self.trials):
                trial = study.ask()
                method = suggest(trial, names, self.bench.sizes)
                value = self._at_bytes(method) if self.budget.nbytes is not None else self._at_kl(method)
                study.tell(trial, value, state=None if value is not None else _pruned())
                bar.update()
        if self.budget.nbytes is not None and not self._within():
            self._try_smallest(names, self.budget.nbytes)
        chosen = self._chosen()
        if chosen is None and (within := self._within()):
            pace, best = min(((self.pace(p), p) for p in within), key=lambda pair: pair[0])
            raise SettingError(
                f"no setting that was tried takes a step in {self.budget.step_time:g} times the full cache's time: the "
                f"fastest took {pace:.2f}, with {label(best.method)}. Allow that much, or try more."
            )
        if chosen is None:
            best = min(self.points, key=lambda p: p.kl)
            raise SettingError(
                f"no setting that was tried comes to a KL of {self.budget.kl:g} nats: the smallest was {best.kl:.3g}, "
                f"with {label(best.method)} at {human(best.nbytes)}. Allow that much, or try more."
            )
        self._sweep(chosen)
        return self._chosen() or chosen

    def _possible(self) -> list[str]:
        """The methods that have a setting within the budget."""
        if self.budget.nbytes is None:
            return list(self.names)
        sizes, least = self.bench.sizes, {name: smallest(name, self.bench.sizes) for name in self.names}
        possible = [name for name in self.names if least[name][0] <= self.budget.nbytes]
        if not possible:
            size, method = min(least.values(), key=lambda pair: pair[0])
            batch = self.budget.batch
            raise SettingError(
                f"{self.budget.nbytes * batch} bytes are too few for {batch} x {sizes.tokens} tokens: the smallest "
                f"possible are {size * batch} (byte ratio {math.ceil(1e6 * size / sizes.full) / 1e6:g}), "
                f"with {label(method)}. Give that much."
            )
        return possible

    def _try_smallest(self, names: Sequence[str], nbytes: int) -> None:
        """Where a byte budget is so small that no trial stood within it: the methods' smallest settings."""
        for name in names:
            method = smallest(name, self.bench.sizes)[1]
            if (there := fit_to_budget(method, self.bench.sizes, nbytes)) is not None:
                self._measure(there)

    def _measure(self, method: Method) -> Point:
        point = self.bench.point(method)
        if point not in self.points:
            self.points.append(point)
        return point

    def _at_bytes(self, method: Method) -> float | None:
        """KL at the budget; None if the setting cannot be as small."""
        assert self.budget.nbytes is not None
        there = fit_to_budget(method, self.bench.sizes, self.budget.nbytes)
        if there is None:
            return None
        before, point = self._chosen(), self._measure(there)
        slow = (before is None or point.kl < before.kl) and not self._fast_enough(point)
        return None if slow else point.kl

    def _at_kl(self, method: Method) -> float | None:
        """Log of the bytes that the KL takes; where that is above the best so far, of more than the best, by the KL."""
        assert self.budget.kl is not None
        sizes, chosen = self.bench.sizes, self._chosen()
        there = fit_to_budget(method, sizes, sizes.full if chosen is None else chosen.nbytes / STEP)
        if there is None:
            return None
        best = self._measure(there)
        if best.kl > self.budget.kl:
            return math.log(best.nbytes) + math.log(best.kl / self.budget.kl)
        if not self._fast_enough(best):
            return None
        low = best.nbytes / 1024
        while best.nbytes > STEP * low:
            middle = math.sqrt(low * best.nbytes)
            there = fit_to_budget(method, sizes, middle)
            if there is not None and (point := self._measure(there)).kl <= self.budget.kl:
                best = point
            else:
                low = middle
        return math.log(best.nbytes)

    def _chosen(self) -> Point | None:
        """The smallest KL within the bytes, or the fewest bytes within the KL, of what is fast enough."""
        return next((p for p in self._within() if self._fast_enough(p)), None)

    def _within(self) -> list[Point]:
        """The points within the budget, the best first."""
        if self.budget.nbytes is not None:
            within = [p for p in self.points if p.nbytes <= self.budget.nbytes]
            return sorted(within, key=lambda p: (p.kl, p.nbytes))
        within = [p for p in self.points if p.kl <= (self.budget.kl or 0.0)]
        return sorted(within, key=lambda p: (p.nbytes, p.kl))

    def _fast_enough(self, point: Point) -> bool:
        return self.budget.step_time is None or self.pace(point) <= self.budget.step_time

    def pace(self, point: Point) -> float:
        """Time of a step over the setting's cache, in that of the full cache's."""
        return self.bench.pace(point.method, self.budget.batch)

    def best_of(self, name: str, nbytes: int) -> Point | None:
        """The method's point to go on with: the smallest KL of those nearest to these bytes."""
        own = [p for p in self.points if p.name == name]
        near = [p for p in own if p.nbytes <= nbytes] or own
        return min(near, key=lambda p: p.kl, default=None)

    def _sweep(self, chosen: Point) -> None:
        sizes = self.bench.sizes
        for name in tqdm(self.names, desc="front", unit="method", disable=not self.bench.progress):
            best = self.best_of(name, chosen.nbytes)
            start = best.method if best else smallest(name, sizes)[1]
            for level in LEVELS:
                if (there := fit_to_budget(start, sizes, level * chosen.nbytes)) is not None:
                    with suppress(SettingError):  # a point that cannot be fitted must not cost the plan
                        self._measure(there)


def _study(seed: int, startup: int) -> Any:
    """A seeded study in memory, silent. Raises KVShrinkError if Optuna is not installed."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup))


def _pruned() -> Any:
    """The state of a trial that has no setting at the budget: the sampler keeps away from it."""
    return _optuna().trial.TrialState.PRUNED


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise KVShrinkError("kvshrink plan needs Optuna: pip install 'kvshrink[plan]'.") from error
    return optuna
