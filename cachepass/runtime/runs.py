"""Runs and calls: the steps of one denoising loop.

Run     a model's steps in one cache context with latents of one kind (shape, dtype, device): the clock, the states
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
from .invariants import InvariantState
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
        runs: The runs that it is a step of: one for each context that graphs are called in.
    """

    kind: Hashable
    timestep: Any = None
    hooked: bool = True
    finished: bool = False
    thread: int = field(default_factory=threading.get_ident)
    runs: list[Run] = field(default_factory=list)
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


class Run:
    """The steps of one context. Also what is kept from step to step, for each graph that runs in them.

    Attributes:
        clock: Step index and timesteps.
        epoch: Counts the runs; a state of another epoch has a history that is over.
        call: The call that is or was its last step, and the timestep read in it.
        computed, predicted: Schedules that did so in this call.
        predictions: Steps of this run in which something was predicted.
        cached: Some graph of this run may predict.
        stamp: Rises with every step of any run.
        record: What computed and what predicted, in each of its (last) steps.
        distance: What the probe measured in this call.
        distances: And in each of the (last) steps; None: it was not asked.
    """

    def __init__(self, context: str, kind: Hashable, num_inference_steps: int | None) -> None:
        self.context, self.kind = context, kind
        self.clock = Clock(num_inference_steps)
        self.epoch = 0
        self.call: Call | None = None
        self.timestep: float | None = None
        self.computed: set[str] = set()
        self.predicted: set[str] = set()
        self.predictions = 0
        self.cached = False
        self.stamp = self.began = 0
        self.record: deque[tuple[set[str], set[str]]] = deque(maxlen=_RECORDED)
        self.distance: float | None = None
        self.distances: deque[float | None] = deque(maxlen=_RECORDED)
        self.states: dict[Hashable, RunState] = {}
        self.outputs: dict[Hashable, OutputState] = {}
        self.invariants: dict[Hashable, InvariantState] = {}
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
            "this context is in use by another call of the same model", where=f"cache context {self.context!r}",
            hint='give each thread its own: with cachepass.cache_context("name"): ...',
        )  # fmt: skip

    def end(self) -> None:
        """The next step is the first of a new run; what was kept is history."""
        self.epoch += 1
        self.predictions = 0
        self.clock.restart()

    def note(self, computed: Sequence[str], predicted: Sequence[str]) -> None:
        self.computed.update(computed)
        self.predicted.update(predicted)

    def marks(self) -> dict[str, str]:
        """What each group did in each of the recorded steps: ``"##..#"``, # computed, . predicted."""
        groups = dict.fromkeys(group for computed, predicted in self.record for group in (*computed, *predicted))
        return {
            group: "".join("." if group in predicted else "#" if group in computed else " "
                           for computed, predicted in self.record)
            for group in groups
        }  # fmt: skip
