"""Costs: seconds, or any other unit, of calling rows of one phase together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import OptionError
from .requests import Row

#: What it costs to call some rows of one phase together.
Cost = Callable[[Hashable, int], float]

# Of a computed step; what stands in for a region costs little, what lies outside of the regions is always there.
_SHARES = {"#": 1.0, "+": 1.0, "?": 0.6, "-": 0.5, ".": 0.2, "=": 0.0}


def typical_cost(phase: Hashable, rows: int) -> float:
    """Costs where none were measured, in computed rows: a predicted row costs a fifth of a computed one, and a call
    half a row more than its rows. Where a phase has a mark for each group, they share the step evenly.

    Raises:
        OptionError: The phase is no string of marks.
    """
    if not isinstance(phase, str) or not phase or set(phase) - _SHARES.keys():
        raise OptionError(
            f"no cost is known for the phase {phase!r}",
            where="typical_cost",
            hint=f"phases are strings of the marks {' '.join(_SHARES)}; for other keys give CatchUp a cost of your own",
        )
    return sum(_SHARES[mark] for mark in phase) / len(phase) * (rows + 0.5)


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs from a table: ``MeasuredCosts({"#": {1: 0.020, 4: 0.052}, ".": {1: 0.004, 4: 0.009}})``, in seconds.

    Rows of another number run in calls of the table's sizes, the largest first, as ``options["row_sizes"]`` has them
    run; what is left of less than the smallest costs as much as that.

    Raises:
        OptionError: The table is empty, or has a number that is no number of rows or seconds.
    """

    table: Mapping[Hashable, Mapping[int, float]]

    def __post_init__(self) -> None:
        if not self.table or not all(self.table.values()):
            raise OptionError(
                "a table of costs has an entry for each phase, and each entry seconds by rows",
                where="MeasuredCosts",
                hint='such as {"#": {1: 0.020, 4: 0.052}}',
            )
        for phase, seconds in self.table.items():
            if any(rows < 1 or cost < 0 for rows, cost in seconds.items()):
                raise OptionError(
                    f"rows are counted from 1 and seconds are not negative, got {dict(seconds)}",
                    where=f"MeasuredCosts, phase {phase!r}",
                    hint="measure again",
                )

    def __call__(self, phase: Hashable, rows: int) -> float:
        seconds = self.table.get(phase)
        if seconds is None:
            raise OptionError(
                f"no cost was measured for the phase {phase!r}",
                where="MeasuredCosts",
                hint=f"measured: {', '.join(map(repr, self.table))}",
            )
        total = 0.0
        for size in sorted(seconds, reverse=True):
            pieces, rows = divmod(rows, size)
            total += pieces * seconds[size]
        return total + (seconds[min(seconds)] if rows else 0.0)


def cost_of(rows: Iterable[Row], cost: Cost) -> float:
    """What a call costs: the rows of each phase run together, one phase after the other."""
    numbers: dict[Hashable, int] = {}
    for row in rows:
        numbers[row.phase] = numbers.get(row.phase, 0) + 1
    return sum(cost(phase, number) for phase, number in numbers.items())


def best_number(phase: Hashable, most: int, cost: Cost) -> int:
    """How many rows to call together, at most ``most``, so that a row costs least."""
    return min(range(1, most + 1), key=lambda rows: (cost(phase, rows) / rows, -rows))
