"""Guided: calls whose batch is the conditional half of what the others of their run bring.

A pipeline may end its guidance in the middle of a run, or begin it late: such calls bring conditional samples alone.
The latents' batch tells them: it is half (or twice) that of the context's last run, which the timestep says is not
over. They are steps of that run. What is kept is the conditional half in either case, so attentions are forecast from
one history; there is no unconditional branch to estimate.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ..errors import warn
from ..methods import PLAIN, WHOLE, Route
from .calls import Model
from .context import guidance_partner
from .runs import Call, Run


def run_of(model: Model, context: str, call: Call) -> Run:
    """The run that a call is a step of: that of its latents' kind, or the one that goes on with another batch."""
    if model.method.guidance is None or guidance_partner(context) is not None:
        return model.run(context, call.kind)
    own, latest = model.runs.get((context, call.kind)), model.latest(context)
    timestep = call.read_timestep(model.read_timestep)
    if latest is not None and latest is not own and _differ_in_batch(call.kind, latest.kind):
        # Runs of two sizes may take turns. One that was given up made no step since the other one began.
        waits = own is not None and (own.stamp > latest.began or latest.clock.index == 1) and _goes_on(own, timestep)
        if _goes_on(latest, timestep) and not waits:
            return latest
    run = own or model.run(context, call.kind)
    if latest is not None and (run.clock.index == 0 or run.clock.starts_run(timestep)):
        run.began = latest.stamp
    return run


def comes_alone(model: Model, context: str, call: Call) -> bool:
    """The call brings conditional samples alone: its run has guidance batches, or had them in a run before, and this
    batch is odd."""
    run = run_of(model, context, call)
    if run.kind != call.kind:
        return is_half(call.kind, run.kind)
    return _is_odd(call.kind) and any(of == context and is_half(call.kind, kind) for of, kind in list(model.runs))


def route_of_alone(model: Model, run: Run, *, captured_alone: bool) -> Route | None:
    """The route of a call that brings conditional samples alone; None: it brings a guidance batch.

    A graph is captured for one of the two. Where calls of its size turn out to be both, nothing is predicted in those
    that it was not captured for.
    """
    call = run.call
    assert call is not None
    alone = is_half(call.kind, run.kind) or (captured_alone and _is_odd(call.kind))
    if alone == captured_alone:
        return WHOLE if alone else None
    ways = ("the conditional half of larger batches", "guidance batches")
    was, comes = ways if captured_alone else reversed(ways)
    message = (f"calls of one size are {was} first and {comes} later on: nothing is predicted in these. "
               "Call torch._dynamo.reset() in between")  # fmt: skip
    if message not in model.warnings:
        warn(message, model.warnings, stacklevel=6)
    return PLAIN


def is_half(kind: Hashable, whole: Hashable) -> bool:
    """Latents of a kind are half a batch of another one's: in their first dimension, or half as many samples."""
    few, many = _tensors(kind), _tensors(whole)
    if len(many) == 2 * len(few) > 0:
        return len({*few, *many}) == 1
    if not few or len(few) != len(many):
        return False
    doubled = [shape and ((2 * shape[0], *shape[1:]), *rest) for shape, *rest in few]
    return doubled == list(many)


def _tensors(kind: Hashable) -> tuple[Any, ...]:
    """Of each of the latents: shape, dtype, device."""
    return kind if isinstance(kind, tuple) and all(isinstance(one, tuple) for one in kind) else ()


def _is_odd(kind: Hashable) -> bool:
    tensors = _tensors(kind)
    batch = tensors[0][0][0] if len(tensors) == 1 and tensors[0][0] else len(tensors)
    return batch % 2 == 1


def _differ_in_batch(kind: Hashable, other: Hashable) -> bool:
    return is_half(kind, other) or is_half(other, kind)


def _goes_on(run: Run, timestep: float | None) -> bool:
    """A call with this timestep is another step of a run that has begun: in the direction in which its timesteps go."""
    clock, last = run.clock, run.timestep
    if clock.index == 0 or timestep is None or last is None or timestep == last or clock.starts_run(timestep):
        return False
    ascends = clock.seen is not None and clock.seen[0] < clock.seen[1] == last
    return (timestep > last) == ascends
