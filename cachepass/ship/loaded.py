"""Loaded: the programs of an archive as what ``run/`` runs, and the plan that they were made by.

Dispatcher, clocks, histories and decisions are those of a compiled model: only where its programs come from differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..capture.half import HalfCall
from ..capture.inputs import InputLayout
from ..capture.siblings import Siblings
from ..errors import RowsError
from ..method import Method
from ..options import CompileOptions
from ..program.adopting import adopting
from ..program.liveness import subsets
from ..program.phases import Phase, phase_name
from ..program.plan import CachePlan, OutputPlan, ProbePlan
from ..program.roles import Carried, History, Invariant, Next, Output, Parameters, ProbeSlot, Role
from ..program.rows.variant import RowRunnable
from ..program.runnable import Invariants, LoweredVariant, Once, Runnable, decision_name, once_name
from ..program.sizes import SymbolBinder
from ..recipe.vocabulary import PLAIN, WHOLE, ProbeTarget, Route
from ..run.dispatch import Dispatcher
from ..run.instance import HalfRun
from ..run.model import Model
from ..run.state import allocate
from ..run.step import CurrentCall
from .listing import Program
from .manifest import Binding, Form, Kept, Layout, Planned, Shipped, Size, Weight


def dispatcher_of(
    size: Size, program: LoadedProgram, method: Method, options: CompileOptions, root: torch.nn.Module | Model
) -> Dispatcher:
    """The callable of the graph of one size: it takes the graph's inputs, and returns its results. ``root``: what it is
    the graph of, or the model that it is a part of."""
    layout = _layout(size.layout, size)
    if isinstance(root, Model):
        assert size.part is not None
        places = tuple(place for place, _ in size.part.places)
        siblings = Siblings(method, (), size.part.prefix, places, ())  # who its blocks are is known to its instances
        dispatcher = Dispatcher(method, options, layout, None, siblings, root)
    else:
        dispatcher = Dispatcher(method, options, layout, root)
    dispatcher.program = program
    dispatcher.compiled = _graph(size.binding, dispatcher.current)
    if size.half is not None:
        half = size.half
        call = HalfCall(half.picks, half.unconditional_first, half.names, half.pairs)
        dispatcher.half = HalfRun(_graph(half.binding, dispatcher.current), call)
    return dispatcher


def _layout(layout: Layout, size: Size) -> InputLayout:
    forms = [size.inputs[i].form for i in layout.latents]
    static = tuple((form.shape, form.dtype, device_of(form)) for form in forms)
    return InputLayout((), layout.latents, layout.timestep, static, layout.conditioning, layout.names)


def device_of(form: Form) -> torch.device:
    """The device of this kind that is current."""
    return torch.device("cuda", torch.cuda.current_device()) if form.device == "cuda" else torch.device(form.device)


def _graph(binding: Binding, current: CurrentCall) -> Callable[..., list[Any]]:
    """The captured graph as a callable: what AOTAutograd makes of it in the process that compiled it."""
    picked, returned = binding.inputs, binding.results
    as_given = picked == tuple(range(len(picked)))
    as_made = returned == tuple(range(len(returned)))

    def run(*inputs: Any) -> list[Any]:
        call = current.call
        assert call is not None, "a graph runs inside a call of its dispatcher"
        flat = list(inputs[: len(picked)]) if as_given else [inputs[i] for i in picked]
        results = call.run(flat)
        return results if as_made and len(results) == len(returned) else [results[i] for i in returned]

    return run


def no_rows() -> RowsError:
    """The error for calls of several requests."""
    return RowsError(
        "a loaded model takes no rows: its archive has the programs of one request",
        where="cachepass.rows",
        hint="call it once for each request, in a cachepass.cache_context of its own, or compile the model",
    )


class LoadedProgram(Runnable):
    """A program whose variants come from an archive: it can compile nothing, and needs not."""

    def __init__(self, size: Size, programs: Mapping[str, Program], method: Method) -> None:
        plan = plan_of(size.plan, method)
        super().__init__(plan, on_cuda=any(source.form.device == "cuda" for source in size.inputs))
        self._size = size
        self._programs = programs
        self.variants = {one.name: self.make_variant(one) for one in size.programs}
        self._shipped = {one.name: one for one in size.programs}
        self._kept = {half: _invariants(kept) for half, kept in ((False, size.kept), (True, size.kept_half))}
        binder = SymbolBinder.of((), ())
        self._once = {
            half: Once(self.variants[once_name(half=half)].run, binder)
            for half, kept in self._kept.items()
            if kept is not None
        }
        self._plain = self._without_cache()

    def make_variant(self, shipped: Shipped) -> LoweredVariant:
        """A program of the archive as a callable."""
        run, listing = shipped.listing.linked(self._programs), shipped.listing
        if listing.adopting:
            run = adopting(run, listing.adopting)
        return LoweredVariant.of(shipped.name, run, shipped.roles, shipped.kept, 0.0, nodes=len(listing.steps))

    def compile(self, phase: Phase) -> LoweredVariant:
        return self._plain if phase.route is PLAIN else self.variants[phase_name(phase, self.plan.groups)]

    def for_rows(self, differ: frozenset[int], seats: int) -> RowRunnable:  # noqa: ARG002
        raise no_rows()

    def compile_decision(self, route: Route) -> LoweredVariant:
        return self.variants[decision_name(route)]

    def compile_once(self, route: Route) -> Once | None:
        return self._once.get(route.half)

    def invariants(self, route: Route) -> Invariants | None:
        return self._kept[route.half]

    def flops(self, phase: Phase) -> int | None:
        return self._size.flops if phase.route is PLAIN else self._shipped[phase_name(phase, self.plan.groups)].flops

    def flops_once(self, route: Route = WHOLE) -> int | None:
        kept = self._size.kept_half if route.half else self._size.kept
        return 0 if kept is None else kept.flops

    def input_name(self, route: Route, index: int) -> str:
        return (self._size.names_half if route.half else self._size.names)[index]

    @property
    def computed_once(self) -> list[str]:
        kept = self._kept[False]
        return [] if kept is None else [region.split("@")[0] for region in kept.regions]

    def _without_cache(self) -> LoweredVariant:
        """What runs where nothing is kept and nothing predicted: the programs that compute all, on memory of the
        moment."""
        route = WHOLE if self.plan.output is None else self.plan.output.routes[0]
        whole = self.variants[phase_name(Phase((), route), self.plan.groups)]
        before = self.variants[decision_name(route)] if self.splits(route) else None
        own = len(self._size.binding.results)
        roles = tuple(dict.fromkeys((*whole.invariants, *(() if before is None else before.invariants))))

        def run(given: list[Any]) -> list[Any]:
            count = len(given) - len(roles)
            model, kept = given[:count], dict(zip(roles, given[count:], strict=True))
            given.clear()
            carried: dict[str, torch.Tensor] = {}
            if before is not None:
                values = before.run([*model, *(self._scratch(role, kept, carried) for role in before.inputs)])
                pairs = zip(before.kept, values, strict=False)
                carried = {role.name: value for role, value in pairs if isinstance(role, Carried)}
            results = whole.run([*model, *(self._scratch(role, kept, carried) for role in whole.inputs)])
            return list(results[:own])

        return LoweredVariant.of(PLAIN.name, run, roles, (), 0.0)

    def _scratch(
        self, role: Role, kept: Mapping[Invariant, torch.Tensor], carried: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        plan = self.plan
        if isinstance(role, Invariant):
            return kept[role]
        if isinstance(role, Carried):
            return carried[role.name]
        if isinstance(role, (History, Next)):
            return allocate(plan.cuts[role.cut], int)  # pyright: ignore[reportArgumentType]
        if isinstance(role, Output):
            assert plan.output is not None
            return allocate(next(slot for slot in plan.output.slots if slot.name == role.name), int)  # pyright: ignore
        assert plan.probe is not None and isinstance(role, (Parameters, ProbeSlot)), role
        if isinstance(role, ProbeSlot):
            return allocate(plan.probe.slot, int)  # pyright: ignore[reportArgumentType]
        return torch.zeros(plan.probe.probe.parameters, device=plan.probe.slot.device)


def _invariants(kept: Kept | None) -> Invariants | None:
    return None if kept is None else Invariants(kept.slots, kept.checked, frozenset(), kept.regions)


def plan_of(plan: Planned, method: Method) -> CachePlan:
    """The plan, as ``program.plan.make_plan`` made it."""
    output = probe = None
    if plan.guidance is not None:
        assert method.guidance is not None
        output = OutputPlan(method.guidance, plan.guidance.latents, plan.guidance.slots, plan.guidance.halved)
    if plan.probe is not None:
        told = plan.probe
        target = ProbeTarget(told.group, every=told.every, parameters=told.parameters)
        probe = ProbePlan(target, told.slot, told.residual)
    routes = (WHOLE,) if output is None else output.routes
    phases = tuple(Phase(p, route) for route in routes for p in (subsets(plan.groups) if route.predicts else [()]))
    return CachePlan(plan.cuts, plan.groups, phases, returns=False, output=output, probe=probe)


def weights_of(sizes: Sequence[Size]) -> dict[str, Weight]:
    """Every weight that a program of some size reads, by name."""
    return {weight.name: weight for size in sizes for weight in size.weights}
