"""Dispatch: what happens on each call of a captured graph, around its program.

    model, run, step -> schedule -> phase and weights -> variant(inputs + weights + slots) -> commit

The dispatcher stands where Dynamo calls the graph, so it sees the graph's inputs. Which module is called it learns from
the calls of modules that it runs in or, where a function was captured, from the parameters among them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..capture.inputs import InputLayout, kind_of
from ..capture.siblings import Siblings
from ..errors import warn
from ..method import Method
from ..options import CompileOptions
from ..program.phases import Phase
from ..program.runnable import Runnable
from ..program.sizes import SymbolBinder
from ..program.verdict import numbers_of
from ..recipe.schedule import Step
from ..recipe.vocabulary import PLAIN, Route
from .context import surroundings, unparted
from .decide import allows, asks
from .evidence import Given
from .guidance import partner_of, route_in
from .instance import HalfRun, Instance, Instances
from .model import Model
from .places import Place, Places
from .reach import WARMING
from .rows.step import ROWS
from .runs import Call, Run
from .state import OutputState, RunState
from .step import CurrentCall, Pending, StepCall
from .stream_capture import refuse_capture
from .watch import WATCHER

LIVE: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


@dataclass(frozen=True, eq=False)
class PreparedStep:
    """A step of a run that is about to be made.

    Attributes:
        place: Where its state is found.
        call: What the schedule says.
        once: How often what is kept for the run was computed before.
    """

    instance: Instance
    run: Run
    place: Place
    state: RunState
    step: Step
    call: StepCall
    once: int


class Dispatcher:
    """The callable that Dynamo gets for one graph."""

    def __init__(
        self,
        method: Method,
        options: CompileOptions,
        layout: InputLayout,
        root: torch.nn.Module | None,
        siblings: Siblings | None = None,
        captured_in: Model | None = None,
    ) -> None:
        self.method, self.options, self.layout = method, options, layout
        self.instances = Instances(method, options, layout.identity, root, siblings, captured_in)
        self.is_part = siblings is not None  # of its model
        self.program: Runnable | None = None  # set by the backend while the graph is compiled; None: nothing is cached
        self.idle_groups: tuple[str, ...] = ()  # the groups of a schedule that never predicts
        self.compiled: Callable[..., Any] | None = None
        self.half: HalfRun | None = None  # for guidance batches
        self.binder = SymbolBinder.of((), ())  # of the sizes in the plan, from the inputs
        self.current = CurrentCall()
        self.capture_seconds = 0.0  # of tracing, by Dynamo and AOTAutograd
        self.warnings: list[str] = []  # of its capture, and of calls outside of the model
        self.places = Places()
        self._warned = False
        LIVE.add(self)

    # ---- a call -----------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any) -> Any:
        assert self.compiled is not None
        refuse_capture(self.program)
        batch = ROWS.get()
        if batch is not None:
            return batch.call(self, batch, inputs)
        if surroundings().rows is not None:
            self._refuse_rows()
        if self.is_part and self.program is None and not self.idle_groups:
            return self.compiled(*inputs)  # nothing in it is cached
        instance = self.instances.called(inputs)
        if instance.groups is not None and not instance.groups:
            return self._plain(inputs)  # nothing is cut in this one
        call = self.call_of(instance.model, inputs)
        if call is None:
            self._warn_outside()
            return self._plain(inputs)
        warming = WARMING.get()
        if warming is not None and self.program is not None:
            warming.compile(self.program, self.method, self.options)
        run = call.run
        if run is None:
            return self._plain(inputs)  # nothing tells which trajectory it is a step of
        run.acquire()
        try:
            partner = self.partner(instance.model)
            if partner is None:
                return self._whole_step(instance, run, call, None, inputs)
            with partner.exclusively():
                return self._whole_step(instance, run, call, partner, inputs)
        finally:
            run.release()

    def _refuse_rows(self) -> None:
        """A call of several requests came here in one piece."""
        if self.program is not None:
            self.program.for_rows(frozenset(), 1)
        raise unparted()

    def _whole_step(self, instance: Instance, run: Run, call: Call, partner: Run | None, inputs: Sequence[Any]) -> Any:
        """A step, and where the graph is the whole model the end of its call."""
        succeeded = False
        try:
            result = self._step(instance, run, call, partner, inputs)
            succeeded = True
        finally:
            if not self.is_part:
                instance.model.finish(call, succeeded=succeeded)
        return result

    def partner(self, model: Model) -> Run | None:
        """The run of the other call of a guidance step; None for a guidance batch, or without guidance."""
        if self.program is None or self.method.guidance is None:
            return None
        output = self.program.plan.output
        return partner_of(model, two_calls=output is not None and not output.halved)

    def call_of(self, model: Model, inputs: Sequence[Any], timestep: float | None = None) -> Call | None:
        """The model's call that this is, or is a part of; None for a part that is called by itself. ``timestep``: where
        it was read already, in the model's unit."""
        if self.is_part:
            return model.current
        layout = self.layout
        kind = layout.static or kind_of([inputs[i] for i in layout.latents])
        if timestep is None and layout.timestep is not None:
            timestep = inputs[layout.timestep]
        call = Call(kind, timestep)
        latents = inputs[layout.latents[0]] if layout.latents else None
        if surroundings().is_row:  # its name tells
            given = Given(latents, (), (), graph=id(self))
        else:
            given = Given(latents, layout.names, [inputs[i] for i in layout.conditioning], graph=id(self))
        model.find_run(call, given)
        return call

    def _step(self, instance: Instance, run: Run, call: Call, partner: Run | None, inputs: Sequence[Any]) -> Any:
        if self.program is None:
            instance.model.enter(call)
            run.note(self.idle_groups, ())
            assert self.compiled is not None
            return self.compiled(*inputs)
        prepared = self.prepare(instance, run, call, partner, inputs)
        self.current.call = prepared.call
        try:
            result = self._run(prepared.call, inputs)
        finally:
            self.current.call = None
        self.commit(prepared, self.device(inputs))
        return result

    def prepare(
        self, instance: Instance, run: Run, call: Call, partner: Run | None, inputs: Sequence[Any]
    ) -> PreparedStep:
        """A call enters its run, and the schedule says what it does."""
        assert self.program is not None
        model = instance.model
        model.enter(call)
        run.cached = bool(self.program.plan.scheduled)
        place = self.places.of(self, instance, call, inputs)
        state = place.state(run)
        outputs = place.output(run), None if partner is None else place.output(partner)
        step = Step(run.clock.index, run.timestep, self._module(instance) if self.method.needs_model else None)
        route = route_in(self.method, model, run, partner, outputs[0], step)
        doubtful = run.is_doubtful or (self.half is not None and run.beside)
        decided = self._decide(instance, state, route, outputs, step, doubtful=doubtful)
        kept = None if place.in_pool else self.program.invariants(route)
        invariants = place.invariants(run, kept)
        decided.invariants, decided.epoch = invariants, run.epoch
        computed = 0 if invariants is None else invariants.computed
        return PreparedStep(instance, run, place, state, step, decided, computed)

    def commit(self, prepared: PreparedStep, device: torch.device) -> None:
        """A call succeeded: what it kept is history."""
        instance, run, decided = prepared.instance, prepared.run, prepared.call
        weights = {g: decided.weights.get(g, ()) for g in decided.phase.predicted}
        prepared.state.commit(prepared.step, decided.computed, weights, decided.distance)
        self._note(run, decided, prepared.step)
        watcher = WATCHER.get()
        if watcher is not None and not run.warms_up:
            watcher.saw(run, prepared.state, prepared.step)
        if run.grew:
            instance.model.make_room(0, device, run)
            run.grew = False
        if not run.warms_up:
            computed = 0 if decided.invariants is None else decided.invariants.computed
            instance.count(decided.phase, computed - prepared.once)

    def _note(self, run: Run, call: StepCall, step: Step) -> None:
        """Count what was done; keep the times at which the difference of the branches was written or used."""
        computed, predicted = call.computed, call.phase.predicted
        if call.difference is not None:
            guidance = self.method.guidance
            assert guidance is not None and call.output is not None
            call.output.commit(step.index, None if call.difference else call.weights[guidance.group])
            if call.difference:
                computed = (*computed, guidance.group)
            else:
                predicted = (guidance.group, *predicted)
        run.note(computed, predicted)
        if call.distance is not None:
            run.distance = call.distance

    def _run(self, call: StepCall, inputs: Sequence[Any]) -> Any:
        assert self.compiled is not None
        if not call.phase.route.half:
            return self.compiled(*inputs)
        assert self.half is not None
        return self.half.call.outputs(self.half.run(*self.half.call.inputs(inputs)))

    def _plain(self, inputs: Sequence[Any]) -> Any:
        """Keep nothing and predict nothing."""
        assert self.compiled is not None
        if self.program is not None:
            self.current.call = StepCall(self.program, Phase(route=PLAIN))
        try:
            return self.compiled(*inputs)
        finally:
            self.current.call = None

    def _warn_outside(self) -> None:
        """A part of a model is called by itself: there is no step."""
        model = self.instances.captured_in
        if not self._warned and model is not None:
            self._warned = True
            warn(
                f"{self.prefix or 'a part of the model'} is called outside of a call of "
                f"{type(model.module).__name__}, whose calls are the steps: computed without a cache",
                self.warnings,
            )

    def _decide(
        self,
        instance: Instance,
        state: RunState,
        route: Route,
        outputs: tuple[OutputState | None, OutputState | None],
        step: Step,
        *,
        doubtful: bool,
    ) -> StepCall:
        """The schedule: what is predicted in a step that takes a route, and with which weights; nothing, where it is
        ``doubtful`` whose step it is."""
        assert self.program is not None
        guidance, (output, partner) = self.method.guidance, outputs
        partner_known = None if partner is None else bool(partner.group.steps)
        allowed = allows(self.method, step, route, partner_known=partner_known) and not doubtful
        difference, predicted, computed, weights, pending = None, [], [], {}, None
        if guidance is not None:
            if route.weighted:
                difference = False
                assert output is not None
                weights[guidance.group] = self.method.weights(guidance.group, step, output.group)
            elif route in (guidance.both, guidance.uncond):
                difference = True
        for group, history in state.groups.items() if route.keeps else ():
            wanted = instance.groups is None or group in instance.groups
            if self.method.forgets(group, step):
                state.forget_group(group)
            known = allowed and wanted and bool(history.steps)
            answer = known and asks(self.method, group, step, history, probed=state.probed)
            if answer is None:
                pending = self._pending(instance, state, group, step)
                if state.plan.returns and state.plan.weighted(group):
                    weights[group] = pending.weights()
            elif answer:
                predicted.append(group)
                if state.plan.weighted(group):
                    weights[group] = self._weights(instance, state, group, step)
            else:
                computed.append(group)
        parameters = () if state.plan.probe is None else self.method.probe_parameters(step)
        return StepCall(
            self.program,
            Phase(tuple(predicted), route),
            state,
            tuple(computed),
            weights,
            output,
            partner,
            difference,
            pending=pending,
            parameters=parameters,
        )

    def _pending(self, instance: Instance, state: RunState, group: str, step: Step) -> Pending:
        """The probe's distance decides on a group."""
        history = state.groups[group]

        def decide(distance: float) -> bool:
            return bool(self.method.asks(group, step, history, distance))

        bound = numbers_of(self.method.bound(group, history)) if state.plan.returns else ()
        return Pending(group, decide, lambda: self._weights(instance, state, group, step), bound)

    def _weights(self, instance: Instance, state: RunState, group: str, step: Step) -> tuple[float, ...]:
        history, regions = state.groups[group], state.plan.weight_regions(group)
        if state.plan.from_gram(group):
            history.gram = state.grams(group)
        regions = [self._path(instance, region) for region in regions]
        if len(regions) == 1:
            return self.method.weights(group, step, history, regions[0])
        return tuple(w for region in regions for w in self.method.weights(group, step, history, region))

    # ---- states -----------------------------------------------------------------------------------------------------

    def _module(self, instance: Instance) -> torch.nn.Module | None:
        return instance.model.module or (None if self.instances.root is None else self.instances.root())

    @property
    def prefix(self) -> str:
        """Path of the module that was captured."""
        return "" if self.instances.siblings is None else self.instances.siblings.prefix

    def device(self, inputs: Sequence[Any]) -> torch.device:
        """Where the latents are, and all that is kept."""
        return inputs[self.layout.latents[0]].device if self.layout.latents else torch.device("cpu")

    def modules(self, instance: Instance) -> list[str]:
        """Paths of the modules that are cut in an instance."""
        if self.program is None:
            return []
        cuts = [c for c in self.program.plan.cuts if instance.groups is None or c.group in instance.groups]
        return [self._path(instance, path) for path in dict.fromkeys(c.region.split("@")[0] for c in cuts)]

    def _path(self, instance: Instance, path: str) -> str:
        """The path in an instance of what has this path in the one that was captured."""
        return instance.prefix + path.removeprefix(self.prefix) if self.is_part else path
