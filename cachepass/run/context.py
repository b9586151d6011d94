"""Cache contexts: names for trajectories, from the user and from the model's library.

    cachepass.cache_context("request-1")     the user's; they nest
      model.cache_context("cond")            the library's (diffusers), inside
        model(...)                           belongs to "request-1/cond"

A context that the user named is one and the same in every thread. What only a library names, or nobody, belongs to the
thread that calls.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import BatchError, RowsError

DEFAULT = "default"
WARMUP = "cachepass.warmup"  # the first name of warm-up contexts: their runs are neither counted nor kept


@dataclass(frozen=True)
class RowNames:
    """The requests whose steps one call makes, in the order of its rows.

    Attributes:
        names: Of the requests.
        depth: How many names of contexts stand in front of theirs.
        timesteps: Of each, in the unit of the config's ranges; None: the model's input tells.
        dims: For inputs by name: the dimension in which the rows stand; None: the input is the same for all.
    """

    names: tuple[str, ...]
    depth: int
    timesteps: tuple[float, ...] | None
    dims: Mapping[str, int | None]


@dataclass(frozen=True)
class Told:
    """What a call's surroundings say of it.

    Attributes:
        names: The user's contexts, outermost first.
        library: The name that a model's library gave.
        module: The model that it gave it for, held weakly.
        timestep: In the unit of the config's ranges; a tensor is read where that costs no wait, or is needed anyway.
        step_index: The step of the run.
        num_inference_steps: The length of the run.
        schedule: The timesteps of the run, as an object: another one belongs to another run.
        before: What was said before the library said something.
        said_timestep: The timestep that the library said.
        rows: The requests of a call of several.
        is_row: The call is one of several that are made at once: its name alone tells whose step it is.
    """

    names: tuple[str, ...] = ()
    library: str | None = None
    module: weakref.ref[torch.nn.Module] | None = None
    timestep: Any = None
    step_index: int | None = None
    num_inference_steps: int | None = None
    schedule: Any = None
    before: Told | None = None
    said_timestep: Any = None
    rows: RowNames | None = None
    is_row: bool = False

    def row(self, index: int) -> Told:
        """What is said of one of the requests."""
        rows = self.rows
        assert rows is not None
        names = (*self.names[: rows.depth], *rows.names[index].split("/"), *self.names[rows.depth :])
        timestep = {} if rows.timesteps is None else {"timestep": rows.timesteps[index]}
        return _with(self, names=names, rows=None, is_row=True, **timestep)

    def without_timestep(self) -> Told:
        """The same; the model's input tells the timestep."""
        return _with(self, timestep=None)

    @property
    def context(self) -> str:
        """All names, joined by slashes."""
        names = self.names if self.library is None else (*self.names, self.library)
        return "/".join(names) or DEFAULT

    @property
    def warms_up(self) -> bool:
        return self.names[:1] == (WARMUP,)


_NOTHING = Told()
_told: contextvars.ContextVar[Told] = contextvars.ContextVar("cachepass_told", default=_NOTHING)


def told(model: torch.nn.Module | None) -> Told:
    """What the surroundings of the current code say of calls of a model; what a library says of another one is left
    out. None: the model is not known."""
    said = _told.get()
    if said.module is None or model is None:
        return said
    named = said.module()
    if named is model or (named is not None and _belong(named, model)):
        return said
    return _with(said, **_of_nobody(said))


def _of_nobody(said: Told) -> dict[str, Any]:
    """The fields that a library gave, as they are without its word."""
    before = said.before or _NOTHING
    timestep = before.timestep if said.timestep is said.said_timestep else said.timestep
    return {"library": None, "module": None, "timestep": timestep, "step_index": None, "num_inference_steps": None}


_pairs: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakKeyDictionary[torch.nn.Module, bool]]
_pairs = weakref.WeakKeyDictionary()


def _belong(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """One of two modules is in the other: a model in a wrapper that was compiled, or a part of a model."""
    known = _pairs.setdefault(one, weakref.WeakKeyDictionary())
    if other not in known:
        known[other] = any(one is part for part in other.modules()) or any(other is part for part in one.modules())
    return known[other]


@contextlib.contextmanager
def telling(**more: Any) -> Iterator[None]:
    """Add to what is said of calls inside this block."""
    with saying(_with(_told.get(), **more)):
        yield


@contextlib.contextmanager
def saying(told: Told) -> Iterator[None]:
    """Say this of calls inside this block, and nothing else."""
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


def _with(known: Told, **more: Any) -> Told:
    """``dataclasses.replace`` without its checks: this runs once per call of a model."""
    new = object.__new__(Told)
    new.__dict__.update(known.__dict__)
    new.__dict__.update(more)
    return new


@contextlib.contextmanager
def cache_context(name: str, *, timestep: float | None = None) -> Iterator[None]:
    """Give calls of compiled models inside this block a state of their own, called ``name``.

    A loop that calls its model twice per step (conditional, then unconditional) tells the two apart::

        with cachepass.cache_context("cond"):
            velocity = compiled(latents, t, prompt)
        with cachepass.cache_context("uncond"):
            baseline = compiled(latents, t, empty)

    Each context has its own history, clock and runs, for every method. Contexts nest: around the call of a pipeline,
    ``cache_context("request-1")`` gives ``"request-1/cond"`` where the pipeline says ``"cond"``. A block is in force in
    its own thread or task, and a name means the same in all of them: a run may go on in another one, but not in two at
    once.

    ``timestep``, in the unit of the config's ranges, is what the model's own timestep input says: given here, nothing
    is read from the device. A config's ``current_timestep_callback`` goes before it.

    For methods that skip the unconditional branch, ``"cond"`` and ``"uncond"`` are the two calls of one step, as are
    ``"<name>/cond"`` and ``"<name>/uncond"``.

    Raises:
        TypeError: ``name`` is not a string, or empty.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"cache_context takes a name such as 'cond', got {name!r}")
    known = _told.get()
    more = {} if timestep is None else {"timestep": timestep}
    with telling(names=(*known.names, name), **more):
        yield


def check_names(names: tuple[Any, ...]) -> None:
    """Raise unless they are names of requests, each once.

    Raises:
        TypeError: One is not a string, or empty, or there is none.
        RowsError: One is there twice.
    """
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"rows takes names such as 'req-7', one for each row, got {', '.join(map(repr, names))}")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise RowsError(
            f"{twice!r} is there twice: one call makes one step of a request",
            where="cachepass.rows",
            hint="name the two calls of guidance 'a/cond' and 'a/uncond'",
        )


def unparted() -> RowsError:
    """The error for a call of several requests that was not parted into them."""
    return RowsError(
        "a call in a block of rows was not parted into its rows",
        where="cachepass.rows",
        hint="compile the module itself: torch.compile(model, ...), or enable_cache. One that was compiled in place "
        "(model.compile) is parted after it was called once: cachepass.warmup(model, **inputs_of_one_request)",
    )


def surroundings() -> Told:
    """What is said of calls of whatever model."""
    return _told.get()


@contextlib.contextmanager
def warming_up() -> Iterator[None]:
    """Give calls inside this block states that nobody else has."""
    known = _told.get()
    rows = None if known.rows is None else dataclasses.replace(known.rows, depth=known.rows.depth + 1)
    with telling(names=(WARMUP, *known.names), rows=rows):
        yield


def hear(module: torch.nn.Module, context: Any) -> None:
    """The library of a model opened a context (an object with ``name`` and, if it knows them, ``step_index``,
    ``num_inference_steps`` and ``timestep``), or closed it (None). It takes the place of one that the same model left
    open; nothing of another one is left in it."""
    known = _told.get()
    if context is None:
        _told.set(known.before or known)
        return
    fields = ("step_index", "num_inference_steps", "timestep")
    said = {name: value for name in fields if (value := getattr(context, name, None)) is not None}
    left_open = known.module is not None and known.module() in (None, module)
    own = {
        "library": str(context.name),
        "module": weakref.ref(module),
        "said_timestep": said.get("timestep"),
        "before": known.before if left_open else known,
    }
    _told.set(_with(known, **_of_nobody(known) | own | said))


def context_of(model: torch.nn.Module | None) -> str:
    """The name of the context that a call of a model is in."""
    return told(model).context


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
