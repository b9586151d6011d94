"""Guidance in the run: which other call a step has, and which way a call takes through the model.

A pipeline may end its guidance in the middle of a run, or begin it late: such calls bring conditional samples alone.
The latents' batch tells them: it is half of what other calls of their run bring. What is kept is the conditional half
in either case, so attentions are forecast from one history; there is no unconditional branch to estimate.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ..method import Method
from ..recipe.schedule import Step
from ..recipe.vocabulary import PLAIN, WHOLE, Route
from .context import context_of, guidance_partner, other_guidance, told
from .decide import route_of
from .model import Model
from .runs import Run
from .state import OutputState


def partner_of(model: Model, *, two_calls: bool) -> Run | None:
    """The run of the other call of a guidance step, where the model was captured for two calls per step.

    Raises:
        BatchError: It was captured for the other way of calling than it is called in.
    """
    context = context_of(model.module)
    pair = guidance_partner(context)
    if (pair is None) == two_calls:
        raise other_guidance(context, two_calls=two_calls)
    return None if pair is None else model.partner(pair[1])


def route_in(
    method: Method, model: Model, run: Run, partner: Run | None, output: OutputState | None, step: Step
) -> Route:
    """The way of a call, whose run keeps ``output``, through the model."""
    if method.guidance is None:
        return WHOLE
    if partner is None:
        alone = _route_alone(model, run, captured_alone=output is None)
        if alone is not None:
            return alone
    assert output is not None, "a model captured for guidance keeps its output"
    known = bool(output.group.steps) and not run.is_doubtful
    if partner is None:
        if run.beside:
            _warn_calls(method, model)
        return route_of(method, step, known=known and not run.beside)
    pair = guidance_partner(context_of(model.module))
    assert pair is not None, "a call with a partner has a context of guidance"
    follows = partner.clock.index == run.clock.index + 1
    return route_of(method, step, known=known, side=pair[0], follows=follows)


def _warn_calls(method: Method, model: Model) -> None:
    """Each call of a step is taken for a guidance batch: half of it would be answered from the other half."""
    model.warn_once(
        "calls",
        f"{type(method.config).__name__}: the model is called more than once per step, with equal latents, "
        "and every call is taken for a batch of [uncond, cond] samples: computed without a cache. Call it in "
        'cachepass.cache_context("cond") and then in cachepass.cache_context("uncond")',
    )


# ---- conditional samples alone --------------------------------------------------------------------------------------


def comes_alone(model: Model, kind: Hashable, timestep: Any) -> bool:
    """A call that is about to be captured brings conditional samples alone: it goes on with a run of guidance batches,
    or its batch is odd, and the context had runs of guidance batches."""
    known = model.trajectories(told(model.module)).runs
    runs = [run for run in known if any(is_half(kind, whole) for whole in run.memories)]
    now = model.read_timestep(timestep, told(model.module))
    goes_on = [run for run in runs if run.clock.index and run.timestep != now and not run.clock.starts_run(now)]
    return bool(goes_on) or (bool(runs) and _is_odd(kind))


def _route_alone(model: Model, run: Run, *, captured_alone: bool) -> Route | None:
    """The route of a call that brings conditional samples alone; None: it brings a guidance batch.

    A graph is captured for one of the two. Where calls of its size turn out to be both, nothing is predicted in those
    that it was not captured for.
    """
    assert run.call is not None
    kind = run.call.kind
    alone = any(is_half(kind, known) for known in run.memories) or (captured_alone and _is_odd(kind))
    if alone == captured_alone:
        return WHOLE if alone else None
    ways = ("the conditional half of larger batches", "guidance batches")
    was, comes = ways if captured_alone else reversed(ways)
    model.warn_once(
        "alone",
        f"calls of one size are {was} first and {comes} later on: nothing is predicted in these. "
        "Call torch._dynamo.reset() in between",
    )
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
    """Shape, dtype and device of each of the latents."""
    return kind if isinstance(kind, tuple) and all(isinstance(one, tuple) for one in kind) else ()


def _is_odd(kind: Hashable) -> bool:
    tensors = _tensors(kind)
    batch = tensors[0][0][0] if len(tensors) == 1 and tensors[0][0] else len(tensors)
    return batch % 2 == 1
