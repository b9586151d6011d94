"""Contexts: the trajectories of one model, by the names of the contexts that it is called in.

Without the user's word for it a context belongs to the thread that calls: a library's names are the same in all of
them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from .context import Told, guidance_partner
from .counts import Counts
from .evidence import Habits
from .runs import Run
from .trajectories import Beginnings, Trajectories

_MOST_CONTEXTS = 256  # that are remembered: a server may name one for each request
_IDLE_CONTEXTS = 2  # whose memory waits for a next run when another context begins: a pair of guidance calls

Key = tuple[int | None, str]


class Contexts:
    """The trajectories of all contexts. ``end_run`` is told of a run that is over, and the timestep of the call that
    begins another, if one does."""

    def __init__(
        self, num_inference_steps: int | None, counts: Counts, end_run: Callable[[Run, float | None], None]
    ) -> None:
        self._steps, self._counts = num_inference_steps, counts
        self._end_run: Any = weakref.WeakMethod(end_run)
        self._known: dict[Key, Trajectories] = {}
        self._habits = Habits()
        self._lock = threading.RLock()

    @property
    def runs(self) -> list[Run]:
        """The runs of all contexts."""
        with self._lock:
            return [run for trajectories in self._known.values() for run in trajectories.runs]

    def trajectories(self, said: Told) -> Trajectories:
        """The trajectories of a context, which may be new."""
        context = said.context
        key = (None if said.names else threading.get_ident()), context
        found = self._known.get(key)
        thread = threading.current_thread()
        if found is not None and (said.names or found.is_of(thread)):
            found.adopt(thread)
            return found
        with self._lock:
            for other, known in list(self._known.items()) if not said.names else ():
                if other[0] is not None and other[1] == context and known.is_of(thread):  # of a thread that is over
                    found = self._known.pop(other)
            if found is None:
                self._make_room()
                pair = guidance_partner(context)
                both = self._known.get((key[0], pair[1])) if pair is not None else None
                beginnings = Beginnings() if both is None else both.beginnings
                found = Trajectories(context, said.names, self._habits, beginnings, self._steps, self._end_run())
            found.adopt(thread)
            return self._known.setdefault(key, found)

    def _make_room(self) -> None:
        """Make room for another context: what the least recently used ones keep, and their names in the counts."""
        free = [(key, t) for key, t in self._known.items() if not any(run.in_step for run in t.runs)]
        free.sort(key=lambda item: max((run.stamp for run in item[1].runs), default=0))
        for key, _ in free[: max(len(self._known) - _MOST_CONTEXTS + 1, 0)]:
            self.drop(key)
        idle = [t for key, t in free if key in self._known and t.runs and all(run.is_idle for run in t.runs)]
        for run in [run for t in idle[: max(len(idle) - _IDLE_CONTEXTS, 0)] for run in t.runs]:
            run.free()

    def drop(self, key: Key) -> None:
        """Know nothing of a context any more; what was counted in it stays."""
        with self._lock:
            trajectories = self._known.pop(key, None)
            if trajectories is not None:
                self._counts.merge({run.context for run in trajectories.runs})

    def forget(self, *, warmup: bool = False) -> None:
        """Drop all contexts, with all that is kept in them, or those of warm-up calls."""
        with self._lock:
            for key, trajectories in list(self._known.items()):
                if trajectories.warms_up or not warmup:
                    del self._known[key]

    def named(self, names: tuple[str, ...]) -> list[tuple[Key, Trajectories]]:
        """The contexts that begin with these names of the user's."""
        name = "/".join(names)
        with self._lock:
            return [(key, t) for key, t in self._known.items() if t.names and f"{t.context}/".startswith(f"{name}/")]

    def meant(self, said: Told, context: str | None) -> list[tuple[Key, Trajectories]]:
        """The contexts of this name (``"request-1/cond"``), or in it. None: those that the caller stands in or, where
        it stands in none, all that this thread made, or a thread that is over."""
        thread = threading.current_thread()
        rows = range(0 if said.rows is None else len(said.rows.names))
        stands_in = [said.row(i).names for i in rows] or [said.names]

        def is_meant(trajectories: Trajectories) -> bool:
            if context is not None:
                named = f"{trajectories.context}/".startswith(f"{context}/")
                return named and bool(trajectories.names or trajectories.is_of(thread))
            begin = [names for names in stands_in if trajectories.names[: len(names)] == names]
            return any(names or trajectories.is_of(thread) for names in begin)

        with self._lock:
            return [(key, trajectories) for key, trajectories in self._known.items() if is_meant(trajectories)]
