"""Timeline: what a schedule does in every step of a run, on the host, without running the model.

    simulate_calls : method, plan, timesteps, contexts -> the calls of a run
    lanes          : calls -> one Lane per (context, group)

It asks the very functions that the dispatcher asks (``run/decide.py``), about a run that begins with no history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import BatchError, OptionError
from ..method import Method
from ..program.phases import Phase, phase_name
from ..program.plan import CachePlan
from ..recipe.schedule import Step
from ..recipe.vocabulary import PLAIN, Route
from ..run.clock import scaled
from ..run.context import DEFAULT, guidance_partner
from ..run.decide import Rehearsal, allows, route_of

#: What a group does in a step. ``half``: the unconditional branch is not run, the batch is half as large; ``answered``:
#: the call is answered without running the model; ``plain``: computed, and nothing of it is kept; ``decided``: what the
#: probe measures in the step decides.
State = Literal["computed", "predicted", "half", "answered", "plain", "decided"]


@dataclass(frozen=True)
class SimulatedCall:
    """One call of the model: the step and context it is in, its phase, and what each group does in it."""

    context: str
    step: int
    timestep: float
    phase: Phase
    states: Mapping[str, State]


@dataclass(frozen=True)
class Cell:
    """One step of a lane; ``phase`` is the name of the program that runs, ``timestep`` in the unit of the ranges."""

    step: int
    timestep: float
    state: State
    phase: str


@dataclass(frozen=True)
class Lane:
    """One group in one context, over a run."""

    context: str
    group: str
    cells: tuple[Cell, ...]

    @property
    def computed(self) -> int:
        """Steps in which it runs."""
        return sum(cell.state in ("computed", "plain") for cell in self.cells)

    @property
    def predicted(self) -> int:
        """Steps in which something stands in for it."""
        return len(self.cells) - self.computed - self.decided

    @property
    def decided(self) -> int:
        """Steps of which the data decide."""
        return sum(cell.state == "decided" for cell in self.cells)

    @property
    def marks(self) -> str:
        """What it does in each step: ``"##..#"``."""
        return "".join(_MARKS[cell.state] for cell in self.cells)

    def __str__(self) -> str:
        decided = f", {self.decided} decided by the data" if self.decided else ""
        return (
            f"{self.context} {self.group}: {self.marks}  {self.computed} computed, {self.predicted} predicted{decided}"
        )


_MARKS: dict[State, str] = {
    "computed": "#",
    "predicted": ".",
    "half": "-",
    "answered": "=",
    "plain": "+",
    "decided": "?",
}


@dataclass
class _Context:
    """What is known of the run in one context."""

    name: str
    side: str | None
    partner: str | None
    rehearsal: Rehearsal
    steps: int = 0
    known: bool = False  # the difference of the two branches


def even_timesteps(num_inference_steps: int) -> tuple[float, ...]:
    """An even descent from 1000 that ends one interval above 0, as most schedulers make it."""
    return tuple(1000.0 * (1 - step / num_inference_steps) for step in range(num_inference_steps))


def run_timesteps(steps: int, timesteps: Sequence[float] | None, scale: float | None) -> tuple[float, ...]:
    """Those of one run, in the unit of the config's ranges. ``scale``: what the user said of the model's unit.

    Raises:
        OptionError: There are more or fewer timesteps than steps.
    """
    if timesteps is None:
        return even_timesteps(steps)
    if len(timesteps) != steps:
        raise OptionError(
            f"{len(timesteps)} timesteps for {steps} steps",
            where="timeline",
            hint="give one of the two, or one timestep for each step",
        )
    return tuple(scaled(timesteps, scale))


def default_contexts(plan: CachePlan) -> tuple[str, ...]:
    """The contexts of a run as the plan was made for it."""
    two_calls = plan.output is not None and not plan.output.halved
    return ("cond", "uncond") if two_calls else (DEFAULT,)


def simulate_calls(
    method: Method, plan: CachePlan, timesteps: Sequence[float], contexts: Sequence[str]
) -> tuple[SimulatedCall, ...]:
    """The calls of one run: in every step one in each context, in the order given; timesteps in the unit of the
    config's ranges.

    Raises:
        BatchError: The contexts are those of two calls per step and the plan is for guidance batches, or the reverse.
    """
    _check_contexts(plan, contexts)
    guided = plan.output is not None
    pairs = {name: guidance_partner(name) if guided else None for name in contexts}
    known = {name: _Context(name, *(pair or (None, None)), Rehearsal(method, plan)) for name, pair in pairs.items()}
    return tuple(
        _call(method, plan, known, name, Step(index, float(timestep)))
        for index, timestep in enumerate(timesteps)
        for name in contexts
    )


def lanes(calls: Sequence[SimulatedCall], plan: CachePlan) -> tuple[Lane, ...]:
    """The calls of a run by context and group."""
    cells: dict[tuple[str, str], list[Cell]] = {}
    for call in calls:
        name = phase_name(call.phase, plan.groups)
        for group, state in call.states.items():
            cells.setdefault((call.context, group), []).append(Cell(call.step, call.timestep, state, name))
    contexts = list(dict.fromkeys(call.context for call in calls))
    return tuple(Lane(*key, tuple(cells[key])) for key in sorted(cells, key=lambda key: contexts.index(key[0])))


def _check_contexts(plan: CachePlan, contexts: Sequence[str]) -> None:
    if plan.output is None:
        return
    for name in contexts:
        if (guidance_partner(name) is None) != plan.output.halved:
            ways = ("guidance batches", "two calls per step, in the contexts 'cond' and 'uncond'")
            made, asked = ways if plan.output.halved else reversed(ways)
            raise BatchError(
                f"the plan was made for {made}, and not for {asked}",
                where=f"cache context {name!r}",
                hint="explain the model inside cache_context('cond') for two calls per step, and outside "
                "of it for guidance batches",
            )


def _call(method: Method, plan: CachePlan, contexts: Mapping[str, _Context], name: str, step: Step) -> SimulatedCall:
    """One call; what it keeps is known afterwards."""
    assert step.timestep is not None
    context = contexts[name]
    partner = None if context.partner is None else contexts.get(context.partner, _absent(context))
    follows = partner is None or partner.steps == context.steps + 1
    route = route_of(method, step, known=context.known, side=context.side, follows=follows)
    allowed = allows(method, step, route, partner_known=None if partner is None else partner.known)
    states = _guidance_state(method, route)
    predicted = []
    for group in plan.groups if route.keeps else ():
        answer = context.rehearsal.asks(group, step, allowed=allowed)
        if answer:
            predicted.append(group)
        states[group] = "decided" if answer is None else "predicted" if answer else "computed"
        context.rehearsal.note(group, step, predicted=bool(answer))
    guidance = method.guidance
    if guidance is not None and route in (guidance.both, guidance.uncond):
        context.known = True
    context.steps += 1
    return SimulatedCall(name, step.index, step.timestep, Phase(tuple(predicted), route), states)


def _absent(context: _Context) -> _Context:
    """The other call of a step, where none is made."""
    return _Context(context.partner or "", None, None, context.rehearsal)


def _guidance_state(method: Method, route: Route) -> dict[str, State]:
    """What becomes of the unconditional branch on a route, where there is one."""
    guidance = method.guidance
    if guidance is None or route is guidance.cond:
        return {}
    states: dict[Route, State] = {guidance.half: "half", guidance.answer: "answered", PLAIN: "plain"}
    return {guidance.group: states.get(route, "computed")}
