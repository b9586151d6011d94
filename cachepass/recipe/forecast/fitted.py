"""Fitted: weights that were found by least squares in runs of the model, for each step and what is kept then.

What a table cannot know - another number of steps, a step that was computed once more - it carries over. Every forecast
with weights that sum to 1 is Newton's interpolation polynomial with its terms damped::

    r(t) = h_0 + a_1 (t - t_0) [h_0, h_1] + a_2 (t - t_0) (t - t_1) [h_0, h_1, h_2] + ...

``a = (1, 1, ...)`` is the polynomial itself and ``a = (1, 0, ...)`` a line. The factors ``a`` have no unit, so those
that were fitted near a position serve for the outputs that are kept really.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConfigError
from ..checks import check_int
from ..value import Value
from .form import Forecast
from .rule import ForecastRule, Spacing, check_spacing

_NEAR = 1e-4  # positions within this share of a step are one position: timesteps in half precision


@dataclass(frozen=True)
class Fit(Value):
    """Weights for one step.

    Attributes:
        step: Which is forecast.
        kept: The steps whose outputs are kept then, newest first.
        weights: One for each; they sum to 1.
    """

    step: int
    kept: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Fitted(ForecastRule):
    """A table of weights by step and kept steps, such as ``cachepass.tune`` finds.

    A run that leaves the table gets the weights of the nearest entry, carried over to what it has kept; where the table
    is empty, the line through the last two.

    Attributes:
        depth: Outputs kept.
        timesteps: Those of the run that it was fitted in, by step.
        table: Its entries.
        spacing: What positions count. :meth:`bind` chooses: steps for runs of as many, else timesteps.

    Raises:
        ConfigError: An entry names a step that the run has not, a later step than its own, or has too many weights.
    """

    depth: int
    timesteps: tuple[float, ...]
    table: tuple[Fit, ...]
    spacing: Spacing = "timestep"

    def __post_init__(self) -> None:
        check_int(self, "depth", 1)
        check_spacing(self)
        object.__setattr__(self, "timesteps", tuple(map(float, self.timesteps)))
        object.__setattr__(self, "table", tuple(self.table))
        for entry in self.table:
            self._check(entry)
        # Weights are remembered by rule and positions, and asked for at every step: the table is hashed once.
        object.__setattr__(self, "_hash", hash((self.depth, self.timesteps, self.table, self.spacing)))

    def __hash__(self) -> int:
        return self.__dict__["_hash"]

    def _check(self, entry: object) -> None:
        where = "Fitted.table"
        if not isinstance(entry, Fit):
            raise ConfigError(f"expected entries of the type Fit, got {entry!r}", where=where)
        known = range(len(self.timesteps))
        newest_first = all(a > b for a, b in itertools.pairwise((entry.step, *entry.kept)))
        if not newest_first or not entry.kept or {entry.step, *entry.kept} - set(known):
            raise ConfigError(
                f"step {entry.step} cannot be forecast from the steps {list(entry.kept)}",
                where=where,
                hint=f"kept steps come before it, newest first, and the run has {len(known)}",
            )
        if len(entry.weights) != len(entry.kept) or len(entry.kept) > self.depth:
            raise ConfigError(
                f"{len(entry.weights)} weights for {len(entry.kept)} outputs of at most {self.depth} kept", where=where
            )

    @property
    def form(self) -> Forecast:
        return Forecast(f"fitted({self.depth})", history=self.depth)

    def bind(self, num_inference_steps: int | None) -> Fitted:
        """For runs of so many steps: positions are steps if the table was fitted in such a run, else timesteps."""
        spacing: Spacing = "step" if num_inference_steps == len(self.timesteps) else "timestep"
        return dataclasses.replace(self, spacing=spacing)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:
        ways = [self._way(entry, nodes, at) for entry in self.table if len(entry.kept) <= len(nodes)]
        if not ways:
            return _line(nodes, at)
        distance, entry, chosen = min(ways, key=lambda way: (way[0], -len(way[2])))
        weights: Sequence[float] = entry.weights
        if distance >= _NEAR:
            own = [self._position(step) for step in entry.kept]
            factors = _factors(entry.weights, own, self._position(entry.step))
            weights = _newton([nodes[i] for i in chosen], at, factors)
        spelled = [0.0] * len(nodes)
        for i, weight in zip(chosen, weights, strict=True):
            spelled[i] = weight
        return spelled

    def _way(self, entry: Fit, nodes: Sequence[float], at: float) -> tuple[float, Fit, tuple[int, ...]]:
        """How far an entry is from what is asked for, in steps, what is newer counting more; with those of the outputs
        kept that are nearest to its own: a step that was computed beside them changes nothing."""
        mine = [self._position(step) for step in entry.kept]

        def distance(chosen: tuple[int, ...]) -> float:
            pairs = zip(mine, (nodes[i] for i in chosen), strict=True)
            return sum(abs(a - b) / (2 + i) for i, (a, b) in enumerate(pairs))

        chosen = min(itertools.combinations(range(len(nodes)), len(mine)), key=distance)
        away = abs(self._position(entry.step) - at) + distance(chosen)
        return away / _unit(self), entry, chosen

    def _position(self, step: int) -> float:
        return float(step) if self.spacing == "step" else self.timesteps[step]

    def __str__(self) -> str:
        return f"fitted weights of the last {self.depth}"


@functools.lru_cache(maxsize=64)
def _unit(rule: Fitted) -> float:
    """The mean distance of two steps."""
    if rule.spacing == "step" or len(rule.timesteps) < 2:
        return 1.0
    return abs(rule.timesteps[-1] - rule.timesteps[0]) / (len(rule.timesteps) - 1) or 1.0


def _line(nodes: Sequence[float], at: float) -> tuple[float, ...]:
    slope = (at - nodes[0]) / (nodes[0] - nodes[1])
    return (1 + slope, -slope, *(0.0 for _ in nodes[2:]))


def _terms(nodes: Sequence[float], at: float) -> list[list[float]]:
    """Newton's terms at a position, each as weights of the outputs: ``(at - t_0)...(at - t_k-1) [h_0, ..., h_k]``."""
    terms, product = [], 1.0
    for k in range(1, len(nodes)):
        product *= at - nodes[k - 1]
        row = []
        for i in range(k + 1):
            others = [nodes[i] - nodes[j] for j in range(k + 1) if j != i]
            weight = product
            for other in others:
                weight /= other
            row.append(weight)
        terms.append(row)
    return terms


def _factors(weights: Sequence[float], nodes: Sequence[float], at: float) -> list[float]:
    """The factors of Newton's terms that make these weights; from the oldest output, which one term alone has."""
    rest, factors = list(weights), list[float]()
    for term in reversed(_terms(nodes, at)):
        factor = rest[len(term) - 1] / term[-1]
        rest = [w - factor * t for w, t in zip(rest, term, strict=False)]
        factors.insert(0, factor)
    return factors


def _newton(nodes: Sequence[float], at: float, factors: Sequence[float]) -> tuple[float, ...]:
    weights = [1.0, *(0.0 for _ in nodes[1:])]
    for factor, term in zip(factors, _terms(nodes, at), strict=True):
        for i, weight in enumerate(term):
            weights[i] += factor * weight
    return tuple(weights)
