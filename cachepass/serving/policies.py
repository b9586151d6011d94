"""Policies: which rows to call next, of those that are ready.

A policy is asked under the scheduler's lock and is a function of what it is given: the same rows, the same answer. No
policy can let a request starve: that is the scheduler's own promise (``scheduler.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

from .costs import Cost, best_number, typical_cost
from .requests import Request, Row


class Policy(ABC):
    """Picks the rows of a call. Subclass it for one of your own."""

    @abstractmethod
    def pick(self, ready: Sequence[Row], most: int, due: Row | None) -> Sequence[Row]:
        """Rows for the next call, at most ``most``, of equal sizes.

        Args:
            ready: Rows of all requests that wait for their next step, at least one, in the order of admission. With
                ``due``, only those of its size.
            most: Rows that a call can have.
            due: A row that has been passed over so often that it is in this call whatever is picked: pick what goes
                well with it.
        """

    def check(self, request: Request) -> None:  # noqa: B027 (most policies serve every request)
        """Raise an error for a request that the policy cannot serve; asked when it is submitted."""


class CatchUp(Policy):
    """Rows of one phase at a time; the phase that gains least from company goes first.

    A row costs less the more run with it, and a computed row gains more by that than a predicted one. So predicted
    steps go first: their requests catch up until they stand at a computed step, too, which then runs once for all of
    them, and from there they stay together. Where it is the other way round - a model so large that computed rows gain
    nothing from each other - computed steps go first, and predicted ones run together.

    Of one phase, requests that were admitted first go first: they are over soonest. There are as many rows in the call
    as make one row cheapest: 4 of 5, for example, of which the fifth would run by itself.

    Args:
        cost: What a call costs.
    """

    def __init__(self, cost: Cost = typical_cost) -> None:
        self.cost = cost
        self._best: dict[tuple[Hashable, int], int] = {}

    def pick(self, ready: Sequence[Row], most: int, due: Row | None) -> Sequence[Row]:
        if due is None:
            kinds = dict.fromkeys((row.size, row.phase) for row in ready)  # of equal ones the first admitted goes first
            size, phase = min(kinds, key=lambda kind: (self._gain(kind[1], most), self.cost(kind[1], 1)))
        else:
            size, phase = due.size, due.phase
        alike = [row for row in ready if row.phase == phase and row.size == size]
        if due is not None:
            alike.remove(due)
            alike.insert(0, due)
        return alike[: self._number(phase, min(len(alike), most))]

    def _gain(self, phase: Hashable, most: int) -> float:
        """What a row costs less in company."""
        best = self._number(phase, most)
        return self.cost(phase, 1) - self.cost(phase, best) / best

    def _number(self, phase: Hashable, most: int) -> int:
        if (phase, most) not in self._best:
            self._best[phase, most] = best_number(phase, most, self.cost)
        return self._best[phase, most]

    def check(self, request: Request) -> None:
        for phase in () if callable(request.phases) else dict.fromkeys(request.phases):
            self.cost(phase, 1)


class FirstCome(Policy):
    """As many as a call can have, those passed over longest first, whatever their phases: where all active requests
    fit into a call, each of them steps in every call."""

    def pick(self, ready: Sequence[Row], most: int, due: Row | None) -> Sequence[Row]:
        order = sorted(ready, key=lambda row: (-row.passed, row.arrival))
        size = (due or order[0]).size
        return [row for row in order if row.size == size][:most]


class Together(Policy):
    """Batches as they were before requests could join in the middle: requests begin together, and nobody else begins
    before the last of them is over. Only to compare with; a scheduler needs ``patience=None`` for it."""

    def pick(self, ready: Sequence[Row], most: int, due: Row | None) -> Sequence[Row]:
        begun = [row for row in ready if row.step or row.attempt]
        lead = due or (begun or ready)[0]
        return [row for row in begun or ready if row.size == lead.size][:most]
