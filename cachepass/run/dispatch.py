"""Dispatch: what happens on each call of a captured graph, around its program.

    model, run, step -> schedule -> phase and weights -> variant(inputs + weights + slots) -> commit

The dispatcher stands where Dynamo calls the graph, so it sees the graph's inputs. Which module is called it learns from
the calls of modules that it runs in or, where a function was captured, from the parameters among them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from .. import _torch
from ..capture.inputs import InputLayout, kind_of
from ..capture.place import step_call
from ..errors import warn
from ..method import Method
from ..options import CompileOptions
from ..program.plan import Phase
from ..program.sizes import SymbolBinder
from ..program.variants import Program
from ..program.verdict import numbers_of
from ..recipe.schedule import Step
from ..recipe.vocabulary import PLAIN, Route
from .decide import allows, asks
from .evidence import Given
from .guidance import partner_of, route_in
from .instance import HalfRun, Instance, Instances, Part
from .invariants import InvariantState
from .model import Model
from .reach import WARMING
from .registry import model_of
from .runs import Call, Run
from .state import OutputState, RunState
from .step import CurrentCall, Pending, StepCall
from .stream_capture import refuse_capture

LIVE: weakref.WeakSet[Dispatcher] = weakref.WeakSet()
_MOST_LAYOUTS = 64  # of sizes that were seen; made anew in a moment


class Dispatcher:
    """The callable that Dynamo gets for one graph."""

    def __init__(self, method: Method, options: CompileOptions, layout: InputLayout,
                 root: torch.nn.Module | None, part: Part | None = None) -> None:  # fmt: skip
        self.method, self.options, self.layout, self.part = method, options, layout, part
        self.root = None if root is None else weakref.ref(root)
        self._root_type = None if root is None else type(root)  # the graph may outlive the module it was captured of
        self.instances = Instances()
        self.program: Program | None = None  # set by the backend while the graph is compiled; None: nothing is cached
        self.idle_groups: tuple[str, ...] = ()  # the groups of a schedule that never predicts
        self.compiled: Callable[..., Any] | None = None
        self.half: HalfRun | None = None  # for guidance batches
        self.binder = SymbolBinder.of((), ())  # of the sizes in the plan, from the inputs
        self.current = CurrentCall()
        self.warnings: list[str] = []  # of its capture, and of calls outside of the model
        self._layouts: dict[tuple[int, ...], tuple[Hashable, Callable[[object], int]]] = {}
        self._warned = False
        LIVE.add(self)

    # ---- a call -----------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any) -> Any:
        assert self.compiled is not None
        refuse_capture(self.program)
        if self.part is not None and self.program is None and not self.idle_groups:
            return self.compiled(*inputs)  # nothing in it is cached
        instance = self._instance_of_part() if self.part is not None else self._instance(inputs)
        if instance.groups is not None and not instance.groups:
            return self._plain(inputs)  # nothing is cut in this one
        call = self._call(instance.model, inputs)
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
            partner = self._partner(instance.model)
            if partner is None:
                return self._whole_step(instance, run, call, None, inputs)
            with partner.exclusively():
                return self._whole_step(instance, run, call, partner, inputs)
        finally:
            run.release()

    def _whole_step(self, instance: Instance, run: Run, call: Call, partner: Run | None, inputs: Sequence[Any]) -> Any:
        """A step, and where the graph is the whole model the end of its call."""
        succeeded = False
        try:
            result = self._step(instance, run, call, partner, inputs)
            succeeded = True
        finally:
            if self.part is None:
                instance.model.finish(call, succeeded=succeeded)
        return result

    def _partner(self, model: Model) -> Run | None:
        """The run of the other call of a guidance step; None for a guidance batch, or without guidance."""
        if self.program is None or self.method.guidance is None:
            return None
        output = self.program.plan.output
        return partner_of(model, two_calls=output is not None and not output.halved)

    def _call(self, model: Model, inputs: Sequence[Any]) -> Call | None:
        """The model's call that this is, or is a part of; None for a part that is called by itself."""
        if self.part is not None:
            return model.current
        layout = self.layout
        kind = layout.static or kind_of([inputs[i] for i in layout.latents])
        call = Call(kind, None if layout.timestep is None else inputs[layout.timestep])
        latents = inputs[layout.latents[0]] if layout.latents else None
        model.find_run(call, Given(latents, layout.names, [inputs[i] for i in layout.conditioning], graph=id(self)))
        return call

    def _step(self, instance: Instance, run: Run, call: Call, partner: Run | None, inputs: Sequence[Any]) -> Any:
        model = instance.model
        model.enter(call)
        if self.program is None:
            run.note(self.idle_groups, ())
            assert self.compiled is not None
            return self.compiled(*inputs)
        run.cached = bool(self.program.plan.scheduled)
        state = self._state(instance, run, call, inputs)
        outputs = self._output(model, run), None if partner is None else self._output(model, partner)
        step = Step(run.clock.index, run.timestep, self._module(instance) if self.method.needs_model else None)
        route = route_in(self.method, model, run, partner, outputs[0], step)
        doubtful = run.is_doubtful or (self.half is not None and run.beside)
        decided = self._decide(instance, state, route, outputs, step, doubtful=doubtful)
        invariants = self._invariants(model, run, route)
        decided.invariants, decided.epoch = invariants, run.epoch
        kept = 0 if invariants is None else invariants.computed
        self.current.call = decided
        try:
            result = self._run(decided, inputs)
        finally:
            self.current.call = None
        weights = {g: decided.weights.get(g, ()) for g in decided.phase.predicted}
        state.commit(step, decided.computed, weights, decided.distance)
        self._note(run, decided, step)
        if run.grew:
            model.make_room(0, self._device(inputs), run)
            run.grew = False
        if not run.warms_up:
            instance.count(decided.phase, 0 if invariants is None else invariants.computed - kept)
        return result

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
        assert self.part is not None
        if not self._warned:
            self._warned = True
            warn(
                f"{self.part.siblings.prefix or 'a part of the model'} is called outside of a call of "
                f"{type(self.part.model.module).__name__}, whose calls are the steps: computed without a cache",
                self.warnings, stacklevel=4,
            )  # fmt: skip

    def _decide(self, instance: Instance, state: RunState, route: Route,
                outputs: tuple[OutputState | None, OutputState | None], step: Step, *,
                doubtful: bool) -> StepCall:  # fmt: skip
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
        return StepCall(self.program, Phase(tuple(predicted), route), state, tuple(computed), weights, output, partner,
                        difference, pending=pending, parameters=parameters)  # fmt: skip

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

    # ---- instances and states ---------------------------------------------------------------------------------------

    def _instance(self, inputs: Sequence[Any]) -> Instance:
        """The module that is called: the one whose call this is, or the one with these parameters."""
        called = _torch.calling_module()
        own = (id(called),)
        instance = self.instances.get(own)
        if instance is not None:
            return instance
        # The module is not on the stack: a function was captured. Then all parameters tell.
        key = tuple(id(inputs[i]) for i in self.layout.identity)
        held = inputs[self.layout.identity[0]] if self.layout.identity else None
        instance = self.instances.get(key)
        if instance is None or not instance.is_at(held):
            module = self._holder(held, called)
            model = model_of(module, self.method, self.options)
            # Parameters may have been replaced (offloading does): the module is the same instance as before.
            known = next((i for i in self.instances.values() if module is not None and i.model is model), None)
            instance = known or Instance(model, None if module is None else weakref.ref(module))
            by_module = module is called and module is not None
            instance = self.instances.add(own if by_module else key, instance, module if by_module else held)
        return instance

    def _instance_of_part(self) -> Instance:
        """The module that is called, by the call itself: a part may have no parameters, or share them."""
        module = _torch.calling_module()
        key = (id(module),)
        instance = self.instances.get(key)
        if instance is None:
            assert self.part is not None
            calls, compiled = _torch.calling_modules()
            if module is None or compiled is None:
                instance = Instance(self.part.model, None, self.part.siblings.prefix)
            else:
                begun = step_call(calls[compiled:], self.options.timestep_input)
                model = model_of(begun.module, self.method, self.options)
                model.watch(begun)
                siblings = self.part.siblings
                prefix = next((name for name, m in begun.module.named_modules() if m is module), siblings.prefix)
                model.found(siblings.under(prefix))
                groups = siblings.groups(prefix, self.part.targets)
                instance = Instance(model, weakref.ref(module), prefix, groups)
            instance = self.instances.add(key, instance, module)
        return instance

    def _holder(self, held: torch.Tensor | None, called: torch.nn.Module | None) -> torch.nn.Module | None:
        """The module that is called: one like the captured one that holds this parameter; None where a function was
        captured and the module is not among its arguments."""
        root = None if self.root is None else self.root()
        if held is None:
            return root
        for module in (called if type(called) is self._root_type else None, root):
            if module is not None and any(held is own for own in (*module.parameters(), *module.buffers())):
                return module
        return None

    def _module(self, instance: Instance) -> torch.nn.Module | None:
        return instance.model.module or (None if self.root is None else self.root())

    def _state(self, instance: Instance, run: Run, call: Call, inputs: Sequence[Any]) -> RunState:
        assert self.program is not None
        sizes = self.binder.key(inputs)
        if sizes not in self._layouts:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            resolve = self.binder.resolver(inputs)
            prefix = "" if self.part is None else self.part.siblings.prefix
            self._layouts[sizes] = self.program.plan.layout(resolve, prefix), resolve
        layout, resolve = self._layouts[sizes]
        # Batches of both branches and conditional ones alone keep the same: the conditional half.
        kind = call.kind if self.method.guidance is None else None
        place = kind, instance.prefix, layout
        key = *place, call.occurrence(place)
        state = run.states.get(key)
        if state is None:
            state = RunState(self.program.plan, resolve)
            instance.model.make_room(state.planned_bytes, self._device(inputs), run)
            state = run.states.setdefault(key, state)
        state.stamp = run.stamp
        state.follow(run.epoch, run.clock.index)
        if self.layout.sizing and state.follow_sizes([inputs[i] for i in self.layout.sizing]):
            instance.model.warn_once(
                "sizing", "an input that the sizes of kept values depend on is another tensor in the middle of a run, "
                "so what was kept is dropped and computed anew: give the same tensor object in all steps of a run",
                stacklevel=6,
            )  # fmt: skip
        return state

    def _device(self, inputs: Sequence[Any]) -> torch.device:
        """Where the latents are, and all that is kept."""
        return inputs[self.layout.latents[0]].device if self.layout.latents else torch.device("cpu")

    def _invariants(self, model: Model, run: Run, route: Route) -> InvariantState | None:
        assert self.program is not None
        traced = self.program.traced(route)
        if traced.hoisted is None:
            return None
        state = run.invariants.get(traced.hoisted)
        if state is None:
            state = InvariantState(traced.hoisted, traced.declared)
            model.make_room(traced.hoisted.slot_bytes, traced.hoisted.slots[0].device, run)
            state = run.invariants.setdefault(traced.hoisted, state)
        state.stamp = run.stamp
        return state

    def _output(self, model: Model, run: Run) -> OutputState | None:
        assert self.program is not None
        plan = self.program.plan.output
        if plan is None:
            return None
        state = run.outputs.get(plan.slots)
        if state is None:
            state = OutputState(plan)
            model.make_room(plan.slot_bytes, plan.slots[0].device, run)
            state = run.outputs.setdefault(plan.slots, state)
        state.stamp = run.stamp
        state.follow(run.epoch)
        return state

    def modules(self, instance: Instance) -> list[str]:
        """Paths of the modules that are cut in an instance."""
        if self.program is None:
            return []
        cuts = [c for c in self.program.plan.cuts if instance.groups is None or c.group in instance.groups]
        return [self._path(instance, path) for path in dict.fromkeys(c.region.split("@")[0] for c in cuts)]

    def _path(self, instance: Instance, path: str) -> str:
        """The path in an instance of what has this path in the one that was captured."""
        return path if self.part is None else instance.prefix + path.removeprefix(self.part.siblings.prefix)

    def belongs_to(self, model: torch.nn.Module) -> list[Instance]:
        """The instances that are ``model`` or in it."""
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        modules = {id(module) for module in model.modules()}

        def belongs(key: tuple[int, ...], instance: Instance) -> bool:
            module = None if instance.module is None else instance.module()
            if module is not None:
                return id(module) in modules
            return bool(key) and self.part is None and set(key) <= own

        return list(dict.fromkeys(i for key, i in self.instances.items() if belongs(key, i)))
