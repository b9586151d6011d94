"""One class per failure. Every message says what is wrong, where (option, field or module path) and what to do.

All of them are ``ValueError``s too, so a caller needs no import to catch them. Raised while torch.compile is tracing,
they reach the caller as they are (``_torch.raise_unwrapped``), not wrapped in Dynamo's ``BackendCompilerFailed``.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import FrameType


class CachepassError(ValueError):
    """Base of every error that cachepass raises for a mistake of its user."""

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        """Not made of ``args``: to those Dynamo appends advice on debugging Dynamo."""
        message = f"{self.where}: {self.what}" if self.where else self.what
        return f"{message}\n  hint: {self.hint}" if self.hint else message


class OptionError(CachepassError):
    """A compile option that does not exist or has a value that cannot be used."""


class ConfigError(CachepassError):
    """A field of a method's config that does not exist or has a value that cannot be used."""


class NoMatchError(CachepassError):
    """A pattern or a method that finds no module to cache in the traced model."""


class TimestepError(CachepassError):
    """The schedule needs the timestep and none can be read."""


class BatchError(CachepassError):
    """The model's inputs carry no batch of unconditional and conditional samples that could be halved."""


class OutputError(CachepassError):
    """The model's output is not what the method's settings say it is."""


class PartialGraphError(CachepassError):
    """The method needs the whole model in one graph and was given a part of it."""


class TrainingError(CachepassError):
    """The model is in training mode or gradients are required: caching is for inference."""


class ConcurrencyError(CachepassError):
    """Two calls used the same state (model instance and cache context) at the same time."""


class CaptureError(CachepassError):
    """The caller captures a CUDA graph around the model: every replay would be the one step that was captured."""


class RowsError(CachepassError):
    """A call of several requests at once (``cachepass.rows``) that cannot be made, or not of this model."""


class PoolError(CachepassError):
    """A request needs memory in a pool in which every place is taken."""


class NotCompiledError(CachepassError):
    """``summary`` was asked about a model that no ``cached_inductor`` program belongs to."""


class ExportError(CachepassError):
    """A model, or something in its recipe, that cannot be taken along as an archive."""


class ArchiveError(CachepassError):
    """An archive that cannot be loaded here, weights that do not fit it, or a call that it has no program for."""


class CachepassWarning(UserWarning):
    """A setting that works but surely is not what was meant: a cache that never fires, an overridden pattern."""


_heard: ContextVar[list[str] | None] = ContextVar("cachepass_heard", default=None)


# Packages that no warning points at: they lie between the line that the user wrote and what is found wrong.
_BETWEEN = {"accelerate", "cachepass", "contextlib", "diffusers", "functools", "peft", "threading", "torch", "wrapt"}
_COMPILED = "torch._dynamo.eval_frame"  # below it runs what was compiled, with lines of its own


def _users_frame() -> FrameType:
    """The frame of the user's line: outside of what is compiled, and of the packages between."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    names = [str(frame.f_globals.get("__name__")) for frame in frames]
    outermost = max((i for i, name in enumerate(names) if name == _COMPILED), default=0)
    outside = (i for i in range(outermost, len(frames)) if names[i].partition(".")[0] not in _BETWEEN)
    return frames[next(outside, outermost)]


def warn(message: str, heard: list[str] | None = None) -> None:
    """Warn, at the user's line, and write it down for ``summary``: in ``heard``, or in the list of the
    :func:`hearing` around."""
    into = _heard.get() if heard is None else heard
    if into is not None and message not in into:
        into.append(message)
    frame = _users_frame()
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        message, CachepassWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__"), registry
    )


@contextlib.contextmanager
def hearing(heard: list[str]) -> Iterator[None]:
    """Write down the warnings that come while a graph is compiled."""
    token = _heard.set(heard)
    try:
        yield
    finally:
        _heard.reset(token)


def closest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'x'? known: a, b, x"`` for a hint."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = "known: " + ", ".join(names)
    return f"did you mean {near[0]!r}? {listing}" if near else listing


def listing(names: Iterable[str], limit: int = 24) -> str:
    """Names for a message, cut to ``limit`` with the count of the rest."""
    names = list(names)
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "(none)") + more
