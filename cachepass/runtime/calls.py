"""Models and their calls: which step of which run a graph is called in.

    Model   a module as its user calls it, under one set of compile options; it has the runs of all contexts

A model that is one graph makes a call of every call of that graph. Where the graph breaks, or blocks are compiled one
by one, many graphs run in one call: then two forward hooks on the model say where its calls begin and end, with which
inputs, and whether they succeeded. A call that fails leaves the clock where it was.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from .. import _torch
from ..errors import NoMatchError, listing, warn
from ..graph.inputs import find_latents, find_timestep_input, kind_of, named_inputs
from ..methods import Method, Region
from ..options import CompileOptions
from .context import WARMUP, given_timestep, guidance_partner
from .hooks import watch_calls
from .runs import Call, Run

logger = logging.getLogger(__name__)
_KEPT_KINDS = 4  # of inputs, per context, whose slots stay allocated: a server of many resolutions must not fill up
_QUIET_STEPS = 8  # without num_inference_steps, a run this long that predicted nothing is worth a warning
_stamps = itertools.count(1)


class Model:
    """A module under one set of compile options; ``module`` is None where a function was compiled."""

    def __init__(self, module: torch.nn.Module | None, method: Method, options: CompileOptions) -> None:
        self._module = None if module is None else weakref.ref(module)
        self.method, self.options = method, options
        self.runs: dict[tuple[str, Hashable], Run] = {}
        self.steps = self.begun = 0
        self.computed: dict[tuple[str, str], int] = {}  # by context and group
        self.predicted: dict[tuple[str, str], int] = {}
        self.warnings: list[str] = []
        self.regions: dict[str, Region] = {}  # of all graphs, where it is many
        self.broken: set[str] = set()  # paths of modules with a graph break inside
        self._checked = False
        self._warned = False
        self._watched = options.num_inference_steps is None or method.needs_timestep
        self._callback: Callable[[], float] | None = getattr(method.config, "current_timestep_callback", None)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._hooks: tuple[Any, ...] = ()

    @property
    def module(self) -> torch.nn.Module | None:
        return None if self._module is None else self._module()

    # ---- runs -------------------------------------------------------------------------------------------------------

    def run(self, context: str, kind: Hashable) -> Run:
        """The run of a context with inputs of a kind; a run of a new kind may cost the oldest one its memory."""
        key = context, kind
        run = self.runs.get(key)
        if run is None:
            with self._lock:
                over = [r for r in self.runs.values() if r.context == context and (r.call is None or r.call.finished)]
                for old in sorted(over, key=lambda r: r.stamp)[: 1 - _KEPT_KINDS]:
                    del self.runs[context, old.kind]
                run = self.runs.setdefault(key, Run(context, kind, self.options.num_inference_steps))
        return run

    def latest(self, context: str) -> Run | None:
        """The run of a context that made the last step."""
        runs = [run for run in self.runs.values() if run.context == context and run.call is not None]
        return max(runs, key=lambda run: run.stamp, default=None)

    def enter(self, run: Run, call: Call) -> None:
        """A graph of ``call`` is about to run in a context: the first one in it decides whether a new run begins.

        Raises:
            ConcurrencyError: Another thread's call of the model is in the middle of a step of this run.
        """
        previous = run.call
        if previous is call:
            return
        timestep = call.read_timestep(self.read_timestep)
        if previous is not None and not previous.finished:
            if previous.hooked and previous.thread != call.thread:
                raise run.in_use()
            # The end of the first call could not be seen: it failed if this one repeats it.
            repeated = timestep is not None and timestep == run.timestep
            self.finish(previous, succeeded=not previous.hooked and not repeated)
        if run.clock.starts_run(timestep):
            self._end_run(run)
        run.call, run.timestep = call, timestep
        run.stamp = next(_stamps)
        run.computed, run.predicted, run.distance = set(), set(), None
        call.runs.append(run)

    def finish(self, call: Call, *, succeeded: bool) -> None:
        """A call is over. If it succeeded, every run that it is a step of goes on by one."""
        if call.finished:
            return
        call.finished = True
        runs, call.runs = call.runs, []  # no cycle is left: slots are freed with their model, not by a collector
        for run in runs if succeeded else ():
            if run.context.startswith(WARMUP):
                continue
            self._count(run)
            run.clock.commit(run.timestep)
            if run.clock.index == self.options.num_inference_steps:
                self._report(run)

    def _count(self, run: Run) -> None:
        with self._lock:
            self.begun += run.clock.index == 0
            self.steps += 1
            for counts, groups in ((self.computed, run.computed), (self.predicted, run.predicted)):
                for group in groups:
                    key = run.context, group
                    counts[key] = counts.get(key, 0) + 1
            if run.clock.index == 0:
                run.record.clear()
                run.distances.clear()
            run.record.append((run.computed, run.predicted))
            run.distances.append(run.distance)
            logger.debug("%s, step %d (timestep %s): computed %s, predicted %s", run.context, run.clock.index,
                         run.timestep, run.computed, run.predicted)  # fmt: skip
            run.predictions += bool(run.predicted)

    def settle(self) -> None:
        """Call the calls over whose end could not be seen."""
        for run in self.runs.values():
            if run.call is not None and not run.call.hooked:
                self.finish(run.call, succeeded=True)

    def forget_warmup(self) -> None:
        """Drop the runs of warm-up calls, with all that they keep."""
        self.settle()
        for key in [key for key in self.runs if key[0].startswith(WARMUP)]:
            del self.runs[key]

    def forget(self) -> None:
        """Drop all runs, with all that they keep."""
        self.settle()
        with self._lock:
            self.runs.clear()

    def reset(self) -> None:
        """End the current run in every context."""
        self.settle()
        for run in list(self.runs.values()):
            with run.exclusively():
                self._end_run(run)
                run.clock.forget()

    def _end_run(self, run: Run) -> None:
        if run.clock.index and run.clock.index != self.options.num_inference_steps:
            self._report(run)
        run.end()

    def _report(self, run: Run) -> None:
        """A run is over: tell of it, and warn once if nothing was predicted in it."""
        logger.info("run in %s over after %d steps: %s", run.context, run.clock.index, run.marks())
        if self._warned or not run.cached or run.predictions or self.method.measures:
            return
        if run.clock.index != self.options.num_inference_steps and run.clock.index < _QUIET_STEPS:
            return
        pair = guidance_partner(run.context) if self.method.guidance is not None else None
        partner = None if pair is None else self.latest(pair[1])
        if partner is None or partner.predictions == 0:
            self._warned = True
            warn(
                f"the cache never fired in a run of {run.clock.index} steps: "
                + self.method.why_idle(run.clock.seen), self.warnings, stacklevel=2,
            )  # fmt: skip

    def read_timestep(self, value: Any) -> float | None:
        """The timestep in the unit of the config's ranges; of a tensor of many, the highest (tokens or samples that
        are clean already have 0). On an accelerator reading it waits for the device once."""
        if not self._watched:
            return None
        if self._callback is not None:
            return float(self._callback())
        given = given_timestep()
        if given is not None:
            return given
        if isinstance(value, torch.Tensor):
            value = (value.amax() if value.numel() > 1 else value).item()
        return None if value is None else float(value) * self.options.timestep_scale

    # ---- calls of models that are many graphs -----------------------------------------------------------------------

    @property
    def current(self) -> Call | None:
        """The call that this thread is in."""
        call = getattr(self._local, "call", None)
        return None if call is None or call.finished else call

    def found(self, regions: Iterable[Region]) -> None:
        """Another graph of the model was captured: these regions are in it."""
        self.regions.update((region.id, region) for region in regions)
        self._checked = False

    def require_match(self) -> None:
        """Raise NoMatchError if the method finds nothing, or not enough, in all graphs that are known by now."""
        module = self.module
        if not self._checked and module is not None:
            try:
                self.method.check(list(self.regions.values()), [name for name, _ in module.named_modules()])
            except NoMatchError as error:
                breaks = f"; graphs break inside {listing(sorted(self.broken))}" if self.broken else ""
                raise NoMatchError(error.what, where=error.where, hint=(error.hint or "") + breaks) from None
            self._checked = True

    def watch(self, begun: _torch.ModuleCall) -> None:
        """See where calls of the module begin and end, from now on; it is in the middle of one."""
        if not self._hooks:
            self._hooks = watch_calls(begun.module, weakref.ref(self))
        if self.current is None:
            self._local.call = self._new_call(begun, hooked=False)

    def begin(self, begun: _torch.ModuleCall) -> None:
        """A call of the module begins.

        Raises:
            NoMatchError: All graphs of the last call are known, and the method finds nothing to cache in them.
        """
        self.require_match()
        self._local.call = self._new_call(begun, hooked=True)

    def _new_call(self, begun: _torch.ModuleCall, *, hooked: bool) -> Call:
        inputs = named_inputs(begun)
        name = find_timestep_input(inputs, self.options.timestep_input)
        values = list(inputs.values())
        kind = kind_of([values[i] for i in find_latents(list(inputs), values)])
        return Call(kind, None if name is None else inputs[name], hooked)


# ---- which model a graph belongs to ---------------------------------------------------------------------------------

_models: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakSet[Model]] = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()


def model_of(module: torch.nn.Module | None, method: Method, options: CompileOptions) -> Model:
    """The record of a module under these options: one for all graphs that are captured of it. None: a new one."""
    if module is None:
        return Model(None, method, options)
    with _registry_lock:
        records = _models.setdefault(module, weakref.WeakSet())
        for record in records:
            if record.options == options:
                return record
        record = Model(module, method, options)
        records.add(record)
        return record


def step_call(calls: Sequence[_torch.ModuleCall], timestep: str | None) -> _torch.ModuleCall:
    """Of nested calls of modules, from the compiled one outwards, the one that is a step: its module is the model.

    It is the innermost call with a timestep, or the one that hands its timestep on to it, if that is a module many
    times as large: a block. (One timestep for each token is told from an embedding of the timestep, which some blocks
    get under the same name, by standing further out.) Without a timestep, it is the outermost call.
    """
    inputs = [named_inputs(call) for call in calls]
    step: tuple[_torch.ModuleCall, Any] | None = None
    for call, named in zip(calls, inputs, strict=True):
        name = find_timestep_input(named, timestep, per_token=False)
        if name is not None and (step is None or (named[name] is step[1] and _is_part(step[0].module, call.module))):
            step = call, named[name]
    if step is not None:
        return step[0]
    for call, named in zip(reversed(calls), reversed(inputs), strict=True):
        if find_timestep_input(named, timestep) is not None:
            return call
    return calls[-1]


def _is_part(module: torch.nn.Module, model: torch.nn.Module) -> bool:
    """A block rather than a model in a wrapper: there are others of its class, or most parameters are elsewhere."""
    alike = sum(type(other) is type(module) for other in model.modules())
    own, whole = (sum(p.numel() for p in m.parameters()) for m in (module, model))
    return alike > 1 or 2 * own < whole
