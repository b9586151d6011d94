"""Trajectories: which run a call is a step of.

    find : what a call is given, timestep -> Run, or None: nothing tells which

Calls of one context are told apart by what they are given. The rules, in their order:

    the conditioning of one run, whose call of this step is yet to come    that run goes on
    the same, and all such runs had their call of this step                another run begins (for a third guider); of a
                                                                            solver of second order the run goes on
    conditioning of no run, and what is other stayed the same until now    another run begins
    ... and what is other is made anew in every step                       the first run that waits for its call goes on
    ... and it is not known yet which of the two it is                     it goes on, and nothing is predicted in it
    latents of no run's shape, but of another batch size                   the run goes on, if only one can be meant

Nothing that a run keeps is used in another one, so a run that begins without need costs computed steps and is right.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .context import DEFAULT, WARMUP
from .evidence import Given, Habits, Memory
from .runs import Call, Run

MOST_CALLS = 8  # of one step that are told apart; images of a model of one step may come by the thousand
_SETTLED = 2  # steps after which it is known how many calls a step has
_MOST_RUNS = 2 * MOST_CALLS  # that are remembered, in each context


def _nobody() -> None:
    return None


class Beginnings:
    """Where runs began, in the contexts of one loop: the two of guidance by two calls, or one by itself.

    Attributes:
        calls: How many calls there were.
        last: The call that began the last run, of those that followed another one.
    """

    def __init__(self) -> None:
        self.calls = self.last = 0


class Trajectories:
    """The runs of one context, of one thread where the user did not name it.

    Attributes:
        context: Its name. The second call of a step, if nobody named it, is ``"call 2"`` of it.
        names: The user's part of the name.
        runs: In the order of their first calls.
    """

    def __init__(
        self,
        context: str,
        names: tuple[str, ...],
        habits: Habits,
        beginnings: Beginnings,
        num_inference_steps: int | None,
        end: Callable[[Run, float | None], None],
    ) -> None:
        self.context, self.names, self.runs = context, names, list[Run]()
        self.beginnings = beginnings
        self._habits, self._steps = habits, num_inference_steps
        self._ending = weakref.WeakMethod(end)  # no cycle: slots are freed with their model, not by a collector
        self._thread: Callable[[], threading.Thread | None] = _nobody
        self._previous: Run | None = None

    @property
    def warms_up(self) -> bool:
        return self.names[:1] == (WARMUP,)

    def adopt(self, thread: threading.Thread) -> None:
        """A thread calls the model here."""
        if self._thread() is not thread:
            self._thread = weakref.ref(thread)

    def is_of(self, thread: threading.Thread) -> bool:
        """The runs are a thread's own: it made the last call, or the one that did is over."""
        owner = self._thread()
        return owner is thread or owner is None or not owner.is_alive()

    @property
    def settled(self) -> bool:
        """How many calls a step has is known, and whose they are: every run that was called since the last one began
        has two steps at least. Until then a timestep is waited for, wherever it lies: two or three times in a run."""
        going = [run.clock for run in self.runs if run.called >= self.beginnings.last]
        return bool(going) and all(clock.index >= _SETTLED and not clock.is_over for clock in going)

    def latest(self) -> Run | None:
        """The run that made the last step."""
        return max((run for run in self.runs if run.call is not None), key=lambda run: run.stamp, default=None)

    def first(self) -> Run:
        """The latest run, or one that is yet to begin."""
        return self.latest() or self._add(self.context)

    def find(self, call: Call, given: Given, timestep: float | None, *, is_row: bool = False) -> Run | None:
        """The run that a call is a step of, which may be a new one; None: nothing tells. What the call is given is
        remembered. ``is_row``: the name of the context tells, and what the call is given does not."""
        self.beginnings.calls += 1
        if is_row:
            return self._by_name(call, given, timestep)
        run = self._steady(call.kind, given, timestep)
        steady = run is not None
        if run is None:
            run = self._same(call.kind, given, timestep)
        if run is None:
            run = self._other(call.kind, given, timestep)
        if run is not None:
            memory = run.memories.get(call.kind)
            if memory is None:
                memory = run.memories[call.kind] = Memory()
            memory.keep(given, same=steady)
            run.unsure = run.clock.rises_again(timestep)
            run.called = self.beginnings.calls
        self._previous = run
        return run

    def _by_name(self, call: Call, given: Given, timestep: float | None) -> Run | None:
        """The run of this name, whose inputs lie in tensors that are made anew for each call of several requests. None:
        its call of this step was made already."""
        run = self.first()
        memory = run.memories.setdefault(call.kind, Memory())
        if run.clock.index and not run.clock.is_over and run.had(timestep, given, call.kind):
            return None
        if self._is_of_another_run(run, given, timestep):
            self._end(run, timestep)
        memory.keep(given)
        run.doubts = ()
        run.unsure = run.clock.rises_again(timestep)
        run.called = self.beginnings.calls
        return run

    def _steady(self, kind: Hashable, given: Given, timestep: float | None) -> Run | None:
        """The only run of the context, where its next step comes with the same conditioning, as nearly always: what
        ``_same`` finds, too, by looking at all."""
        run = self._previous
        if run is None or len(self.runs) != 1 or run.doubts:
            return None
        memory = run.memories.get(kind)
        if memory is None or not memory.is_same(given) or run.had(timestep, given, kind):
            return None
        if self._is_of_another_run(run, given, timestep):
            return None
        self._habits.note_same(given.names)
        return run

    def _same(self, kind: Hashable, given: Given, timestep: float | None) -> Run | None:
        """A run that was given the same, and whose call of this step is yet to come. None: there is none."""
        waiting = [
            run
            for run in self.runs
            if (known := run.memories.get(kind)) is not None
            and known.is_same(given)
            and not run.had(timestep, given, kind)
        ]
        if not waiting:
            return None
        if len(waiting) > 1:
            # Of calls that differ in a constant only, each has a graph of its own. Else the place in the step tells.
            placed = timestep is None
            waiting.sort(key=lambda run: (run.memories[kind].graph != given.graph, run.called if placed else 0))
        run = next((run for run in waiting if not self._is_of_another_run(run, given, timestep)), None)
        begins = run is None
        run = run or waiting[0]
        if begins and self._of_another_batch_size(kind, given, timestep) is self._previous is not None:
            return self._previous  # the run of the last call goes on, and an older one had batches of this size
        # What was in doubt stayed as it was: its run began in the last call.
        if (run.doubts and not run.failed) or begins:
            self._end(run, timestep)
            run.memories = {kind: run.memories[kind]}  # of this run it is not known yet which batches it has
        self._habits.note_same(given.names)
        return run

    def _other(self, kind: Hashable, given: Given, timestep: float | None) -> Run | None:
        """Where no such run waits: the one that is meant, or a new one."""
        known = [run for run in self.runs if kind in run.memories]
        same = [run for run in known if run.memories[kind].is_same(given)]
        waiting = [run for run in self._alike(known, kind, given) if not run.had(timestep, given, kind)]
        if waiting and timestep is None:
            return None
        if waiting and not self._is_of_another_run(waiting[0], given, timestep):
            self._go_on(waiting[0], given, kind, timestep)
            return waiting[0]
        if len(same) == 1 and self._evaluates_again(same[0], given, kind):
            return same[0]
        run = None if known else self._of_another_batch_size(kind, given, timestep)
        return run or self._begin(kind, given, timestep)

    def repeats(self, unseen: Call, call: Call, given: Given) -> bool:
        """A call is the last of all once more, with the same latents."""
        run = unseen.run
        memory = None if run is None or run is not self._previous else run.memories.get(call.kind)
        return memory is not None and memory.is_same(given) and memory.repeats_latents(given)

    @staticmethod
    def _evaluates_again(run: Run, given: Given, kind: Hashable) -> bool:
        """A solver of second order evaluates a timestep twice, with other latents."""
        return run.clock.moved and run.clock.repeats == 0 and not run.memories[kind].has_latents(given)

    def _alike(self, known: Sequence[Run], kind: Hashable, given: Given) -> list[Run]:
        """The runs that were given most of what a call is given, and nothing other that stays the same in a run."""
        stable, alike, most = self._habits.stable, list[Run](), -1
        for run in known:
            other = run.memories[kind].differences(given)
            if any(name in stable for name in other):
                continue
            score = len(given.names) - len(other)
            if score > most:
                alike, most = [], score
            if score == most:
                alike.append(run)
        return alike

    def _go_on(self, run: Run, given: Given, kind: Hashable, timestep: float | None) -> None:
        """A run goes on with inputs that are other tensors. What changed twice in a row is made anew in every step;
        what changed once, and stayed so, began a run when it changed."""
        other = run.memories[kind].differences(given)
        self._habits.note_same([name for name in given.names if name not in other])
        twice = [name for name in run.doubts if name in other]
        if len(twice) < len(run.doubts) and not run.failed:
            self._end(run, timestep)
        self._habits.note_fresh(twice)
        run.doubts = tuple(self._habits.unknown(other))

    def _is_of_another_run(self, run: Run, given: Given, timestep: float | None) -> bool:
        """A call that goes on with a trajectory begins a new run of it."""
        if given.step_index is not None and run.clock.index:
            return run.clock.is_over or run.clock.goes_back(given.step_index)
        if run.clock.index and run.timestep is None and run.called < self.beginnings.last:
            return True  # others began anew since its last step, whose timestep is not known
        if run.clock.index and given.schedule is not None:
            known = None if run.schedule is None else run.schedule()
            if known is given.schedule:
                self._habits.same_schedule = True
            elif self._habits.same_schedule:
                return True
        return run.clock.starts_run(timestep)

    def _of_another_batch_size(self, kind: Hashable, given: Given, timestep: float | None) -> Run | None:
        """The one run that goes on with more samples, or fewer: guidance begins or ends within it."""
        candidates = [
            run
            for run in self.runs
            if run.clock.index
            and kind not in run.memories
            and any(_same_samples(kind, known) for known in run.memories)
            and not (timestep is not None and run.timestep == timestep)
            and not self._is_of_another_run(run, given, timestep)
        ]
        return candidates[0] if len(candidates) == 1 else None

    # ---- new runs ---------------------------------------------------------------------------------------------------

    def _begin(self, kind: Hashable, given: Given, timestep: float | None) -> Run | None:
        """A run for a call that no other one is meant by. None: the step has more calls than are told apart.

        It takes the place, and the memory, of one that is over: it was counted to its end, its conditioning exists no
        more, or the timestep lies before its last one at this size.

        Raises:
            ConcurrencyError: Another thread is in the middle of a step of this context.
        """
        for run in self.runs:
            if run.in_step:
                raise run.in_use()
        had = [run for run in self.runs if any(run.had(timestep, given, known) for known in run.memories)]
        if len(had) >= MOST_CALLS:
            return None
        name = self.context if not had else f"call {len(had) + 1}"
        if had and self.context != DEFAULT:
            name = f"{self.context}/{name}"
        free = [run for run in self.runs if run not in had]
        over = [run for run in free if self._is_over(run, kind, timestep)]
        over.sort(key=lambda run: (run.context != name, kind not in run.memories))
        if not over and len(self.runs) >= _MOST_RUNS:
            over = sorted(free, key=lambda run: run.stamp)
        run = over[0] if over else self._add(name)
        if over:
            self._end(run, timestep)
            run.memories.clear()
            run.schedule, run.context = None, name
        beside = [other for other in had if kind in other.memories and other.memories[kind].has_latents(given)]
        run.beside = bool(beside)
        for other in beside:
            other.beside = True
        return run

    def _is_over(self, run: Run, kind: Hashable, timestep: float | None) -> bool:
        stable = self._habits.stable
        clock = run.clock
        if clock.index == 0 or clock.is_over or (kind in run.memories and clock.turns_back(timestep)):
            return True
        return any(memory.gone(stable) for memory in run.memories.values())

    def _end(self, run: Run, timestep: float | None) -> None:
        """A run is over, and a call at this timestep begins another; its model tells of it."""
        end = self._ending()
        assert end is not None, "a model outlives its trajectories"
        if run.clock.index:
            self.beginnings.last = self.beginnings.calls
        end(run, timestep)

    def _add(self, context: str) -> Run:
        run = Run(context, self._steps)
        self.runs.append(run)
        return run


def _same_samples(kind: Any, other: Any) -> bool:
    """Two kinds of latents that differ in the number of samples at most."""
    if len(kind) == len(other) == 1:
        (shape, *rest), (other_shape, *other_rest) = kind[0], other[0]
        return shape[1:] == other_shape[1:] and rest == other_rest
    return set(kind) == set(other)  # lists of samples
