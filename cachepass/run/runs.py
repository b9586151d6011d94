"""Runs and calls: the steps of one denoising loop.

Run     the steps of one trajectory: one latent's way through a denoising loop, under one conditioning. It has the clock
        and everything that is kept from step to step
Call    one call of the model: one step of a run
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConcurrencyError
from .clock import Clock
from .context import WARMUP
from .evidence import Given, Memory
from .invariants import InvariantState
from .rows.pool import Seat
from .state import OutputState, RunState

_RECORDED = 1000  # steps of a run that summaries show: a run whose end nobody tells must not fill up


@dataclass(eq=False)
class Call:
    """One call of a model.

    Attributes:
        kind: Shape, dtype and device of its latents.
        timestep: As the model got it, read when a run first asks.
        hooked: Its end will be seen. The call in which a model was first captured had begun before.
        finished: It is over, well or not.
        run: The run that it is a step of; None: nothing tells which, so nothing is kept and nothing predicted.
        joined: The run knows of it.
    """

    kind: Hashable
    timestep: Any = None
    hooked: bool = True
    finished: bool = False
    run: Run | None = None
    joined: bool = False
    thread: int = field(default_factory=threading.get_ident)
    _counts: dict[Hashable, int] = field(default_factory=dict)
    _read: list[float | None] = field(default_factory=list)

    def occurrence(self, key: Hashable) -> int:
        """How often this was asked before with the same key: a module called again has a state of its own."""
        count = self._counts.get(key, 0)
        self._counts[key] = count + 1
        return count

    def read_timestep(self, read: Callable[[Any], float | None]) -> float | None:
        if not self._read:
            self._read.append(read(self.timestep))
        return self._read[0]

    def read_again(self, read: Callable[[Any], float | None]) -> None:
        """Read the timestep though it was not to be read before."""
        self._read[:] = [read(self.timestep)]


class Run:
    """The steps of one trajectory, run after run, and what is kept from step to step for each graph that runs in them.

    Attributes:
        context: Its name.
        clock: Step index and timesteps.
        epoch: Counts the runs; a state of another epoch has a history that is over.
        call: The call that is or was its last step, and the timestep read in it.
        failed: That call raised: it was no step.
        memories: What the last call was given, for each kind of latents (shape, dtype, device).
        doubts: Inputs that were other tensors in the last call, where it is not known yet what that means.
        beside: Another call of its steps is given the same latents.
        unsure: It is not known yet whether timesteps ascend, or two runs began one after the other.
        computed, predicted: Schedules that did so in this call.
        predictions: Steps of this run in which something was predicted.
        cached: Some graph of this run may predict.
        called: Which call of its context's loop the last one was.
        stamp: Rises with every step of any run.
        record: What computed and what predicted, in each of its (last) steps.
        distance: What the probe measured in this call.
        distances: And in each of the (last) steps; None: it was not asked.
        grew: It began to keep more in this step.
        seats: Where it keeps it, in the pools of calls of several requests.
        dropped: What was kept in the middle of this run had to make room for others.
    """

    def __init__(self, context: str, num_inference_steps: int | None) -> None:
        self.context = context
        self.clock = Clock(num_inference_steps)
        self.epoch = 0
        self.call: Call | None = None
        self.timestep: float | None = None
        self.failed = False
        self.memories: dict[Hashable, Memory] = {}
        self.doubts: tuple[str, ...] = ()
        self.beside = self.unsure = False
        self.schedule: Callable[[], Any] | None = None
        self.computed: set[str] = set()
        self.predicted: set[str] = set()
        self.predictions = 0
        self.cached = self.dropped = self.grew = False
        self.stamp = self.called = 0
        self.record: deque[tuple[set[str], set[str]]] = deque(maxlen=_RECORDED)
        self.distance: float | None = None
        self.distances: deque[float | None] = deque(maxlen=_RECORDED)
        self.states: dict[Hashable, RunState] = {}
        self.outputs: dict[Hashable, OutputState] = {}
        self.invariants: dict[Hashable, InvariantState] = {}
        self.seats: dict[Hashable, Seat] = {}
        self._lock = threading.Lock()

    def acquire(self) -> None:
        """One call at a time; a second one in another thread raises instead of mixing two histories."""
        if not self._lock.acquire(blocking=False):
            raise self.in_use()

    def release(self) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def in_use(self) -> ConcurrencyError:
        return ConcurrencyError(
            "this context is in use by another call of the same model",
            where=f"cache context {self.context!r}",
            hint='give each thread its own: with cachepass.cache_context("name"): ...',
        )

    @property
    def in_step(self) -> bool:
        """A call of it has begun and not ended."""
        return self._lock.locked() or (self.call is not None and self.call.hooked and not self.call.finished)

    @property
    def is_idle(self) -> bool:
        """It was over, and no other has begun."""
        return self.call is not None and (self.clock.is_over or self.clock.index == 0) and not self.in_step

    def free(self) -> None:
        """Keep nothing: the next run of this context allocates anew."""
        for kept in (self.states, self.outputs, self.invariants, self.seats):
            kept.clear()

    @property
    def history_bytes(self) -> int:
        """Bytes of what forecasts are made of: all but what is kept for the run."""
        return sum(state.cache_bytes for states in (self.states, self.outputs) for state in states.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of all that it keeps."""
        kept = (self.states, self.outputs, self.invariants)
        return sum(state.cache_bytes for states in kept for state in states.values())

    @property
    def is_doubtful(self) -> bool:
        """What the last call was a step of will be known at the next one: nothing is predicted in it."""
        return self.unsure or bool(self.doubts)

    @property
    def warms_up(self) -> bool:
        return self.context.startswith(WARMUP)

    def end(self) -> None:
        """The next step is the first of a new run; what was kept is history."""
        self.epoch += 1
        self.predictions = 0
        self.doubts = ()
        self.dropped = False
        self.clock.restart()

    def forget(self) -> None:
        """The same, and no call is known again as one of this trajectory's."""
        self.end()
        self.clock.forget()
        self.timestep = self.schedule = None
        self.memories.clear()

    def had(self, timestep: float | None, given: Given, kind: Hashable) -> bool:
        """Its call of this step was made already: at the same timestep or, where that is not known, with the same
        latents."""
        if self.failed or self.timestep is None or timestep is None:
            memory = self.memories.get(kind)
            return not self.failed and memory is not None and memory.has_latents(given)
        return self.timestep == timestep

    def note(self, computed: Sequence[str], predicted: Sequence[str]) -> None:
        self.computed.update(computed)
        self.predicted.update(predicted)

    def marks(self) -> dict[str, str]:
        """What each group did in each of the recorded steps: ``"##..#"``, # computed, . predicted."""
        groups = dict.fromkeys(group for computed, predicted in self.record for group in (*computed, *predicted))
        return {
            group: "".join(
                "." if group in predicted else "#" if group in computed else " " for computed, predicted in self.record
            )
            for group in groups
        }
