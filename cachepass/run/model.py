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
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import _torch
from ..capture.inputs import conditioning_of, find_latents, find_timestep_input, kind_of, named_inputs
from ..errors import NoMatchError, listing, warn
from ..method import Method
from ..options import CompileOptions
from ..recipe.vocabulary import Region
from .clock import scale_of
from .context import Told, guidance_partner, told
from .contexts import Contexts
from .counts import Counts
from .evidence import Given, schedule_of
from .hooks import watch_calls
from .review import Review, called_twice, untold
from .room import Room
from .rows.pools import Pools
from .runs import Call, Run
from .trajectories import Trajectories

logger = logging.getLogger(__name__)
_stamps = itertools.count(1)


def is_far(value: torch.Tensor) -> bool:
    """Reading it waits for a device."""
    return value.device.type != "cpu"


class Model:
    """A module under one set of compile options; ``module`` is None where a function was compiled."""

    def __init__(self, module: torch.nn.Module | None, method: Method, options: CompileOptions) -> None:
        self._module = None if module is None else weakref.ref(module)
        self.method, self.options = method, options
        self.counts = Counts()
        self.warnings: list[str] = []
        self.regions: dict[str, Region] = {}  # of all graphs, where it is many
        self.broken: set[str] = set()  # paths of modules with a graph break inside
        self.room = Room(options.max_cache_bytes)
        self._checked = False
        self._warned: set[str] = set()
        self._watched = options.num_inference_steps is None or method.needs_timestep
        self._scale = options.timestep_scale
        self._callback: Callable[[], float] | None = getattr(method.config, "current_timestep_callback", None)
        self._contexts = Contexts(options.num_inference_steps, self.counts, self._end_run)
        self._review = Review(method, options.num_inference_steps)
        self._unseen: Call | None = None  # the call in which the model was first captured: hooks see no end of it
        self._local = threading.local()
        self._lock = threading.RLock()
        self._hooks: tuple[Any, ...] = ()
        self.pools = Pools(self.room)

    @property
    def module(self) -> torch.nn.Module | None:
        return None if self._module is None else self._module()

    # ---- runs -------------------------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Run]:
        """The runs of all contexts."""
        return self._contexts.runs

    def trajectories(self, said: Told) -> Trajectories:
        """The trajectories of a context."""
        return self._contexts.trajectories(said)

    def find_run(self, call: Call, given: Given) -> None:
        """Find out which run a call is a step of, from its context and from what it is given."""
        said = told(self.module)
        trajectories = self.trajectories(said)
        together = self.options.process_group is not None and not trajectories.settled
        timestep = call.read_timestep(lambda value: self.read_timestep(value, said, unless=trajectories))
        given.step_index = said.step_index
        given.schedule = schedule_of(call.timestep) if said.schedule is None else said.schedule
        with self._lock:
            unseen = self._unseen
            if unseen is not None and unseen.thread == call.thread:
                # The model is called anew, so that call is over; it failed if this one repeats it.
                self._unseen = None
                self.finish(unseen, succeeded=not trajectories.repeats(unseen, call, given))
            if not call.hooked:
                self._unseen = call
            run = call.run = trajectories.find(call, given, timestep, is_row=said.is_row)
            if run is not None:
                if timestep is None and run.clock.index == 0:  # where the next run begins is told by where this one did
                    call.read_again(lambda value: self.read_timestep(value, said, wait=True))
                if run.schedule is None or run.schedule() is not given.schedule:
                    run.schedule = None if given.schedule is None else weakref.ref(given.schedule)
                if said.num_inference_steps is not None:
                    run.clock.num_inference_steps = said.num_inference_steps
                if said.step_index is not None:
                    run.clock.tell(said.step_index)
        if together:
            self._doubt_together(run, given.latents.device)
        if run is None:
            message = called_twice(trajectories.context, timestep) if said.is_row else None
            self.warn_once("untold", message or untold(self.module, trajectories.context, timestep))

    def free_idle(self) -> None:
        """Free what runs keep that are over and none of whose calls is going on."""
        for run in self.runs:
            if run.seats and run.is_idle:
                run.free()

    def _doubt_together(self, run: Run | None, device: torch.device) -> None:
        """Ranks that run one model together compute a step if one of them is in doubt whose it is: the tensors that
        they are given may be made anew on some of them only."""
        doubtful = run is None or run.is_doubtful
        if _torch.any_of_ranks(doubtful, self.options.process_group, device) and run is not None:
            run.unsure = True

    def make_room(self, needed: int, device: torch.device, own: Run) -> None:
        """A step of a run is about to keep so many bytes more on a device, as far as sizes are known ahead, or has done
        so (0)."""
        with self._lock:
            self.room.make(needed, device, self.runs, own)
        own.grew = True
        if own.dropped and own.clock.index:
            self.warn_once(
                "room",
                f"what is kept would take more than {self.room.limit} bytes, so the history of {own.context!r} "
                "was dropped in the middle of its run, which computes until it has one again: run fewer at a time, or "
                'give options["max_cache_bytes"]',
            )

    def latest(self, context: str) -> Run | None:
        """The run of a context that made the last step."""
        runs = [run for run in self.runs if run.context == context and run.call is not None]
        return max(runs, key=lambda run: run.stamp, default=None)

    def partner(self, context: str) -> Run:
        """The run of the other call of a guidance step."""
        said = told(self.module)
        names, library = said.names, context.rpartition("/")[2]
        if said.library is None:  # the user's own name may be of several parts, too
            own = guidance_partner(names[-1])
            names, library = (*names[:-1], library if own is None else own[1]), None
        with self._lock:
            return self.trajectories(Told(names, library)).first()

    def enter(self, call: Call) -> None:
        """A graph of ``call`` is about to run; the first one of the call enters its run.

        Raises:
            ConcurrencyError: Another thread's call of the model is in the middle of a step of this run.
        """
        run = call.run
        if call.joined or run is None:
            return
        previous = run.call
        timestep = call.read_timestep(lambda value: self.read_timestep(value, told(self.module)))
        if previous is not None and not previous.finished:
            if previous.hooked and previous.thread != call.thread:
                raise run.in_use()
            self.finish(previous, succeeded=not previous.hooked)
        call.joined = True
        run.call, run.timestep, run.failed = call, timestep, False
        run.stamp = next(_stamps)
        run.computed, run.predicted, run.distance = set(), set(), None

    def finish(self, call: Call, *, succeeded: bool) -> None:
        """A call is over. If it succeeded, the run that it is a step of goes on by one."""
        if call.finished:
            return
        call.finished = True
        run = call.run if call.joined else None
        call.run = None  # no cycle is left: slots are freed with their model, not by a collector
        if run is None:
            return
        run.failed = not succeeded
        if not succeeded or run.warms_up:
            return
        self._count(run)
        run.clock.commit(run.timestep)
        if run.clock.is_over:
            self._report(run)

    def _count(self, run: Run) -> None:
        with self._lock:
            self.counts.add(run.context, run.computed, run.predicted, first=run.clock.index == 0)
            if run.clock.index == 0:
                run.record.clear()
                run.distances.clear()
            run.record.append((run.computed, run.predicted))
            run.distances.append(run.distance)
            if logger.isEnabledFor(logging.DEBUG):  # asked in every step
                logger.debug(
                    "%s, step %d (timestep %s): computed %s, predicted %s",
                    run.context,
                    run.clock.index,
                    run.timestep,
                    run.computed,
                    run.predicted,
                )
            run.predictions += bool(run.predicted)

    def settle(self) -> None:
        """Call the calls over whose end could not be seen."""
        for run in self.runs:
            if run.call is not None and not run.call.hooked:
                self.finish(run.call, succeeded=True)

    def forget_warmup(self) -> None:
        """Drop the runs of warm-up calls, with all that they keep."""
        self.settle()
        self._contexts.forget(warmup=True)

    def forget(self) -> None:
        """Drop all runs, with all that they keep."""
        self.settle()
        self._contexts.forget()
        self.pools.clear()

    def reset(self, context: str | None = None) -> None:
        """End the runs of a context, and of those in it. None: of the contexts that the caller stands in or, where it
        stands in none, all that this thread made, or a thread that is over.

        Raises:
            ConcurrencyError: One of them is in the middle of a step.
        """
        self.settle()
        for _, trajectories in self._contexts.meant(told(self.module), context):
            for run in trajectories.runs:
                with run.exclusively():
                    self._end_run(run)
                    run.forget()

    def release(self, names: tuple[str, ...]) -> None:
        """End the runs of a context of these names, and of those in it, and free all that they keep.

        Raises:
            ConcurrencyError: One of them is in the middle of a step.
        """
        self.settle()
        for key, trajectories in self._contexts.named(names):
            for run in trajectories.runs:
                with run.exclusively():
                    self._end_run(run)
                    run.forget()
                    run.free()
            self._contexts.drop(key)

    def _end_run(self, run: Run, timestep: float | None = None) -> None:
        """A run is over: a call at this timestep begins another or, without one, the user says so."""
        if run.clock.index and not run.clock.is_over:
            self._report(run)
        for about, message in self._review.of_length(run, timestep):
            self.warn_once(about, message)
        run.end()

    def _report(self, run: Run) -> None:
        """A run is over: tell of it."""
        logger.info("run in %s over after %d steps: %s", run.context, run.clock.index, run.marks())
        pair = guidance_partner(run.context) if self.method.guidance is not None else None
        for about, message in self._review.of_run(run, None if pair is None else self.latest(pair[1])):
            self.warn_once(about, message)

    def warn_once(self, about: str, message: str) -> None:
        """Say something of this model that the user should know, once."""
        if about not in self._warned:
            self._warned.add(about)
            warn(message, self.warnings)

    @property
    def watches_time(self) -> bool:
        """Timesteps are read in every step, wherever they lie."""
        return self._watched

    def read_timestep(
        self, value: Any, said: Told, *, wait: bool = False, unless: Trajectories | None = None
    ) -> float | None:
        """The timestep in the unit of the config's ranges; of a tensor of many, the highest (tokens or samples that
        are clean already have 0). None: it lies on a device that would have to be waited for, and neither the schedule
        nor the caller asks to ``wait``, which it does ``unless`` it is known whose calls a step has."""
        if self._callback is not None:
            return float(self._callback())
        scale = self._scale
        if said.timestep is not None:
            value, scale = said.timestep, 1.0
        if isinstance(value, torch.Tensor):
            value = value.detach() if value.requires_grad else value
            if is_far(value):
                if not (self._watched or wait or (unless is not None and not unless.settled)):
                    return None
                value = (value.amax() if value.numel() > 1 else value).item()
            else:  # without an operation on the tensor: this is asked in every step
                value = value.tolist() if value.numel() == 1 else value.amax().tolist()
                while isinstance(value, list):
                    value = value[0]
        if value is None:
            return None
        if scale is None:
            scale = self._scale = scale_of(value)
        return float(value) if scale is None else float(value) * scale

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

    def attach(self) -> None:
        """Programs were put into blocks of the module: its calls are seen from now on. What is cut in them was checked
        when they were made."""
        module = self.module
        if module is not None and not self._hooks:
            self._hooks = watch_calls(module, weakref.ref(self))
        self._checked = True

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
        latents = find_latents(list(inputs), values)
        call = Call(kind_of([values[i] for i in latents]), None if name is None else inputs[name], hooked)
        declared = (*self.options.varying_inputs, *self.options.invariant_inputs)
        varying = {name, *(list(inputs)[i] for i in latents), *declared}
        conditioning = conditioning_of({name: value for name, value in inputs.items() if name not in varying})
        first = values[latents[0]] if latents else None
        while isinstance(first, (list, tuple)) and first:  # of a list of samples one is enough
            first = first[0]
        self.find_run(call, Given(first, tuple(conditioning), list(conditioning.values())))
        return call
