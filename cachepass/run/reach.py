"""Reach: which phases the steps of a run can be in, for the warm-up, which compiles them ahead."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..method import Method
from ..options import CompileOptions
from ..program.phases import Phase, phase_name
from ..program.plan import CachePlan
from ..program.runnable import Runnable
from ..recipe.schedule import Step
from .clock import scaled
from .decide import Rehearsal, allows, route_of

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class Warming:
    """A warm-up in progress: the timesteps of a run, as the model gets them (None: not given), and its progress bar."""

    timesteps: tuple[float, ...] | None
    bar: Progress

    def compile(self, program: Runnable, method: Method, options: CompileOptions) -> None:
        """Compile what a run can reach of one graph; kernels of all programs side by side."""
        phases = self.phases(program, method, options)
        task = self.bar.add_task("compiling", total=len(phases))
        with program.side_by_side():
            for phase in phases:
                self.bar.update(task, description=f"compiling {phase_name(phase, program.plan.groups)}")
                program.compile(phase)
                program.compile_once(phase.route)
                if program.splits(phase.route):
                    program.compile_decision(phase.route)
                self.bar.advance(task)
            self.bar.update(task, description="compiling kernels")

    def phases(self, program: Runnable, method: Method, options: CompileOptions) -> list[Phase]:
        """What a run can reach."""
        return reachable(program.plan, method, self._steps(method, options))

    def _steps(self, method: Method, options: CompileOptions) -> list[Step] | None:
        if self.timesteps is not None:
            return [Step(i, t) for i, t in enumerate(scaled(self.timesteps, options.timestep_scale))]
        if options.num_inference_steps is None or method.needs_timestep:
            return None
        return [Step(i) for i in range(options.num_inference_steps)]


WARMING: ContextVar[Warming | None] = ContextVar("cachepass_warming", default=None)


def reachable(plan: CachePlan, method: Method, steps: Sequence[Step] | None) -> list[Phase]:
    """The phases of a plan that a run with these steps is in, in the plan's order; None: all of them."""
    if steps is None:
        return list(plan.phases)
    rehearsal = Rehearsal(method, plan)
    seen = {(phase.route, phase.predicted) for step in steps for phase in _phases_at(rehearsal, step)}
    return [phase for phase in plan.phases if (phase.route, phase.predicted) in seen]


def _phases_at(rehearsal: Rehearsal, step: Step) -> list[Phase]:
    """What one step may be: the first one of a run has no history."""
    method, plan, known = rehearsal.method, rehearsal.plan, bool(step.index)
    answers = {group: rehearsal.asks(group, step) for group in plan.groups}
    for group, answer in answers.items():
        rehearsal.note(group, step, predicted=bool(answer))
    sure = tuple(group for group in plan.groups if answers[group])
    likely = tuple(group for group in plan.groups if answers[group] is not False)
    two_calls = plan.output is not None and not plan.output.halved
    phases = []
    for side in ("cond", "uncond") if two_calls else (None,):
        route = route_of(method, step, known=known, side=side)
        allowed = allows(method, step, route, partner_known=known if two_calls else None)
        phases += [Phase(predicted if allowed else (), route) for predicted in dict.fromkeys((sure, likely))]
    return phases
