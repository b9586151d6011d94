"""Search: the best candidate for a number of computed steps, by runs of the user's own loop.

    fixed methods, and what the Gram matrix says   ->   the best of them   ->   its neighbours, while tries are left

What counts is the result of whole runs. The error on a Gram matrix only says what is worth a run: its sums of local
errors are not the error of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .candidates import DEPTHS, Candidate, fitted, fixed_methods, searched
from .fitting import fit_jointly
from .schedules import Steps, neighbours

_FIXED_MARGIN = 3.0  # decibels below the best in the first run, at which a fixed method is not run any more
_MARGIN = 1.5  # the same for what was fitted
_PATIENCE = 12  # neighbours without gain
_VARIED = (0.03, 0.1, 0.3, 1.0, 3.0)


class Runs(Protocol):
    """Calibration runs: ``score(candidate, run)`` is the quality of one, higher is better (decibels)."""

    count: int

    def score(self, candidate: Candidate, run: int) -> float: ...


@dataclass(frozen=True)
class Scored:
    """A candidate and what its runs gave, in decibels."""

    candidate: Candidate
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


@dataclass
class Found:
    """What a search found so far; it can be stopped at any time.

    Attributes:
        best: Of all.
        fixed: Of the fixed methods.
        tried: Candidates of which a run was made.
    """

    best: Scored | None = None
    fixed: Scored | None = None
    tried: int = 0


@dataclass
class Search:
    """Looks for candidates.

    Attributes:
        gram: Inner products of the steps, ``[n, n]``.
        scale: What an error of each step is worth at the end.
        runs: To score candidates with.
        tries: Neighbours of the best that are run, for each budget.
        depths: Outputs that fitted forecasts may keep.
        fixed: Of a number of computed steps, the fixed methods to try.
        advance: Called with the computed steps of every run made.
    """

    gram: torch.Tensor
    scale: Sequence[float]
    runs: Runs
    tries: int = 40
    depths: Sequence[int] = DEPTHS
    fixed: Callable[[int, int], Iterator[Candidate]] = fixed_methods
    found: dict[int, Found] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.gram)

    def budget(self, count: int) -> Found:
        """The best with at most ``count`` computed steps. What is found is in ``found`` at any time."""
        found = self.found.setdefault(count, Found())
        smaller = [f.best for c, f in self.found.items() if c < count and f.best is not None]
        seed = max(smaller, key=lambda scored: scored.mean) if smaller else None
        found.best = seed  # never worse than with fewer
        for candidate in self._by_error(self._searched(count, seed)):
            self._try(found, candidate, _MARGIN)
        for candidate in self.fixed(count, self.steps):
            self._try(found, candidate, _FIXED_MARGIN)
        self._vary(found, found.best)
        self._refine(found, count)
        return found

    def quick(self, count: int) -> Scored:
        """A first look: what the Gram matrix says is best."""
        (candidate,) = list(self._by_error(self._searched(count, None)))[:1]
        return Scored(candidate, tuple(self.runs.score(candidate, run) for run in range(self.runs.count)))

    def _searched(self, count: int, seed: Scored | None) -> list[Candidate]:
        return list(
            searched(count, self.gram, self.scale, self.depths, None if seed is None else seed.candidate.computed)
        )

    def _by_error(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return sorted(candidates, key=lambda c: self._error(c.computed, c.depth, c.spread))

    def _error(self, computed: Steps, depth: int, spread: float) -> float:
        return fit_jointly(self.gram, computed, depth, self.scale, spread).error

    def _try(self, found: Found, candidate: Candidate, margin: float) -> bool:
        """Run a candidate; further runs only where the first one was near the best. Whether it is the best now."""
        found.tried += 1
        first = self.runs.score(candidate, 0)
        is_fixed = candidate.forecast is not None
        rival = found.fixed if is_fixed else found.best
        if rival is not None and first < rival.scores[0] - (1.0 if is_fixed else margin):
            return False
        scored = Scored(candidate, (first, *(self.runs.score(candidate, run) for run in range(1, self.runs.count))))
        if is_fixed and (found.fixed is None or scored.mean > found.fixed.mean):
            found.fixed = scored
        if found.best is None or scored.mean > found.best.mean:
            found.best = scored
            return True
        return False

    def _vary(self, found: Found, best: Scored | None) -> None:
        """Other ways of fitting the best schedule."""
        if best is None:
            return
        candidate = best.candidate
        for spread in _VARIED:
            if candidate.forecast is None and spread != candidate.spread:
                self._try(found, self._fit("varied", candidate.computed, candidate.depth, spread), _MARGIN)
        if candidate.forecast is not None:
            for depth in self.depths:
                self._try(found, self._fit("refitted", candidate.computed, depth, 1.0), _MARGIN)

    def _fit(self, name: str, computed: Steps, depth: int, spread: float) -> Candidate:
        return fitted(name, computed, self.gram, depth, self.scale, spread)

    def _refine(self, found: Found, count: int) -> None:
        """Hill climbing: neighbours of the best schedule, those with the smallest error on the Gram matrix first."""
        tries, seen = self.tries, set[Steps]()
        while tries > 0 and found.best is not None:
            best = found.best.candidate
            depth = best.depth if best.forecast is None else max(self.depths)
            near = [steps for steps in neighbours(best.computed, self.steps) if steps not in seen]
            if len(best.computed) < count:
                free = [step for step in range(self.steps) if step not in best.computed]
                near += [tuple(sorted((*best.computed, step))) for step in free]
            near.sort(key=lambda steps: self._error(steps, depth, best.spread))
            for steps in near[: min(_PATIENCE, tries)]:
                seen.add(steps)
                tries -= 1
                if self._try(found, self._fit("refined", steps, depth, best.spread), _MARGIN):
                    break
            else:
                return

    def up_to(self, good: Callable[[Scored], bool]) -> int:
        """The smallest number of computed steps of which a first look is good; by bisection."""
        low, high = 1, self.steps - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if good(self.quick(middle)) else (middle + 1, high)
        return low
