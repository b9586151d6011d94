"""Cache contexts: separate states for calls that belong to different runs, such as "cond" and "uncond"."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from ..errors import BatchError

DEFAULT = "default"
WARMUP = "cachepass.warmup"  # how the names of warm-up contexts begin: their runs are neither counted nor kept
_current: contextvars.ContextVar[str] = contextvars.ContextVar("cachepass_context", default=DEFAULT)
_timestep: contextvars.ContextVar[float | None] = contextvars.ContextVar("cachepass_timestep", default=None)


@contextlib.contextmanager
def cache_context(name: str, *, timestep: float | None = None) -> Iterator[None]:
    """Give calls of compiled models inside this block a state of their own, called ``name``.

    A pipeline that calls its model twice per step (conditional, then unconditional) must keep the two apart::

        with cachepass.cache_context("cond"):
            velocity = compiled(latents, t, prompt)
        with cachepass.cache_context("uncond"):
            baseline = compiled(latents, t, empty)

    Each context has its own history, clock and runs, for every method. Contexts are per thread and per task. Calls
    outside any context use one default state.

    ``timestep``, in the unit of the config's ranges, is what the model's own timestep input says: given here, nothing
    is read from the device. A config's ``current_timestep_callback`` goes before it.

    For methods that skip the unconditional branch, ``"cond"`` and ``"uncond"`` are the two calls of one step, as are
    ``"<name>/cond"`` and ``"<name>/uncond"``.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"cache_context takes a name such as 'cond', got {name!r}")
    token, time = _current.set(name), _timestep.set(timestep)
    try:
        yield
    finally:
        _current.reset(token)
        _timestep.reset(time)


def current_context() -> str:
    return _current.get()


def given_timestep() -> float | None:
    return _timestep.get()


def guidance_partner(context: str) -> tuple[str, str] | None:
    """For a context of two-call guidance: ``"cond"`` or ``"uncond"``, and the other call's context."""
    prefix, slash, name = context.rpartition("/")
    if name not in ("cond", "uncond"):
        return None
    return name, prefix + slash + ("uncond" if name == "cond" else "cond")


def other_guidance(context: str, *, two_calls: bool) -> BatchError:
    """The error for a model that was captured for two calls per step (or for guidance batches) and is called as for
    the other."""
    ways = ("two calls per step (in the cache contexts 'cond' and 'uncond')", "guidance batches (in one call per step)")
    captured, called = ways if two_calls else reversed(ways)
    return BatchError(
        f"the model was captured for {captured} at this size and is called as for {called}",
        where=f"cache context {context!r}",
        hint="call torch._dynamo.reset() before changing the way of calling",
    )
