"""Cost: the floating-point operations of a simulated run, step by step, against those without a cache.

run_costs : Findings, calls -> one StepCost per step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...program.flops import add_known
from ...program.phases import Phase, phase_name
from ..findings import Findings
from ..timeline import SimulatedCall


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one step, over all of its calls: with the cache, of what is computed once in the run and falls into this
    step, and of the model as it is; ``least``: with the cache, where all that the data decide is predicted. None:
    unknown, because sizes depend on data."""

    flops: int | None
    once: int | None
    uncached: int | None
    least: int | None

    @property
    def total(self) -> int | None:
        """FLOPs with the cache, and with what is computed once."""
        return add_known(self.flops, self.once)

    @property
    def share(self) -> float | None:
        """The share of the uncached step, between 0 and 1 (and a little more, where a step pays for the whole run)."""
        return share_of(self.total, self.uncached)


def share_of(part: int | None, whole: int | None) -> float | None:
    """The share of a part in a whole; None: unknown."""
    if part is None or whole is None:
        return None
    return part / whole if whole else 1.0


def run_costs(explanation: Findings, calls: Sequence[SimulatedCall]) -> tuple[StepCost, ...]:
    """What every step of a run costs. What is computed once per run is paid by the first call that reads it in each
    context; without a cache every call pays for it."""
    phases = {phase for call in calls for phase in (call.phase, least_phase(call, explanation))}
    flops = {phase: explanation.flops(phase_name(phase, explanation.plan.groups)) for phase in phases}
    once = {
        half: explanation.flops("half/once" if half else "once") for half in {call.phase.route.half for call in calls}
    }
    uncached = add_known(explanation.flops("plain"), explanation.flops("once"))
    paid: set[tuple[str, bool]] = set()
    costs: dict[int, StepCost] = {}
    for call in calls:
        before = costs.get(call.step, StepCost(0, 0, 0, 0))
        key = call.context, call.phase.route.half
        own = flops[call.phase]
        first = 0 if key in paid or own == 0 else once[call.phase.route.half]
        if own != 0:  # an answered call runs nothing that would read it
            paid.add(key)
        costs[call.step] = StepCost(
            add_known(before.flops, own),
            add_known(before.once, first),
            add_known(before.uncached, uncached),
            add_known(before.least, flops[least_phase(call, explanation)]),
        )
    return tuple(costs.values())


def least_phase(call: SimulatedCall, explanation: Findings) -> Phase:
    """The phase of a call if all that the data decide in it is predicted."""
    decided = {group for group, state in call.states.items() if state == "decided"}
    chosen = decided.union(call.phase.predicted)
    return Phase(tuple(group for group in explanation.plan.groups if group in chosen), call.phase.route)


def saved(costs: Sequence[StepCost]) -> tuple[float, float] | None:
    """Share of the run's FLOPs that the cache saves: at least, and at most, as the data decide; None: unknown."""
    uncached = add_known(*(cost.uncached for cost in costs))
    shares = [
        share_of(add_known(*(cost.total for cost in costs)), uncached),
        share_of(add_known(*(add_known(cost.least, cost.once) for cost in costs)), uncached),
    ]
    return None if None in shares else (1 - shares[0], 1 - shares[1])  # pyright: ignore[reportOperatorIssue]
