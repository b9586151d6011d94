"""Progress: what is being compiled, on a terminal. Elsewhere the log has a line for each program (level INFO)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar

from rich.console import Console

#: Somebody else shows a progress bar, which tells of compiling, too.
ELSEWHERE: ContextVar[bool] = ContextVar("cachepass_progress_elsewhere", default=False)


@contextlib.contextmanager
def compiling(what: str, *, shown: bool) -> Iterator[None]:
    """Show a line while this block runs."""
    if not shown or ELSEWHERE.get() or not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(f"cachepass: {what}"):
        yield


@contextlib.contextmanager
def shown_elsewhere() -> Iterator[None]:
    """Show nothing in this block."""
    token = ELSEWHERE.set(True)
    try:
        yield
    finally:
        ELSEWHERE.reset(token)
