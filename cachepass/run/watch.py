"""Watch: who wants to see what each step kept, such as a tuner that compares the values of all steps."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

from ..recipe.schedule import Step
from .runs import Run
from .state import RunState


class Watcher(Protocol):
    """Called in the thread of the call, after a step of one graph was committed."""

    def saw(self, run: Run, state: RunState, step: Step) -> None:
        """A step is over. ``state.newest(group)`` has what it kept, which the next steps write over."""
        ...


WATCHER: ContextVar[Watcher | None] = ContextVar("cachepass_watcher", default=None)
