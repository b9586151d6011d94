"""Cost: the floating-point operations of a simulated run, step by step, against those without a cache.

run_costs : Explanation, calls -> one StepCost per step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...graph.plan import phase_name
from ..timeline import SimulatedCall

if TYPE_CHECKING:
    from ..explain import Explanation


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one step, over all of its calls: with the cache, of what is computed once in the run and falls into this
    step, and of the model as it is."""

    flops: int
    once: int
    uncached: int

    @property
    def share(self) -> float:
        """Of the uncached step, between 0 and 1 (and a little more, where a step pays for the whole run)."""
        return (self.flops + self.once) / self.uncached if self.uncached else 1.0


def run_costs(explanation: Explanation, calls: Sequence[SimulatedCall]) -> tuple[StepCost, ...]:
    """What every step of a run costs. What is computed once per run is paid by the first call that reads it in each
    context; without a cache every call pays for it."""
    names = {call.phase: phase_name(call.phase, explanation.plan.groups) for call in calls}
    flops = {phase: explanation.flops(name) for phase, name in names.items()}
    once = {half: explanation.flops("half/once" if half else "once")
            for half in {call.phase.route.half for call in calls}}  # fmt: skip
    uncached = explanation.flops("plain") + explanation.flops("once")
    paid: set[tuple[str, bool]] = set()
    costs: dict[int, StepCost] = {}
    for call in calls:
        before = costs.get(call.step, StepCost(0, 0, 0))
        key = call.context, call.phase.route.half
        first = 0 if key in paid or not flops[call.phase] else once[call.phase.route.half]
        if flops[call.phase]:  # an answered call runs nothing that would read it
            paid.add(key)
        costs[call.step] = StepCost(before.flops + flops[call.phase], before.once + first, before.uncached + uncached)
    return tuple(costs.values())


def saved(costs: Sequence[StepCost]) -> float:
    """Share of the run's FLOPs that the cache saves."""
    uncached = sum(cost.uncached for cost in costs)
    return 1 - sum(cost.flops + cost.once for cost in costs) / uncached if uncached else 0.0
