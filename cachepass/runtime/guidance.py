"""Guidance in the run: which other call a step has, and which way a call takes through the model."""

from __future__ import annotations

from ..methods import WHOLE, Method, Route, Step
from .calls import Model
from .context import current_context, guidance_partner, other_guidance
from .decide import route_of
from .runs import Run
from .state import OutputState


def partner_of(method: Method, model: Model, *, halved: bool) -> Run | None:
    """The run of the other call of a two-call guidance step; None for a guidance batch, or without guidance.

    Raises:
        BatchError: The model was captured for the other way of calling than it is called in.
    """
    if method.guidance is None:
        return None
    context = current_context()
    pair = guidance_partner(context)
    if (pair is None) == halved:
        return None if pair is None else model.partner(pair[1])
    raise other_guidance(context, two_calls=not halved)


def route_in(method: Method, model: Model, run: Run, partner: Run | None, output: OutputState | None,
             step: Step) -> Route:  # fmt: skip
    """The way of a call, whose run keeps ``output``, through the model."""
    if output is None:
        return WHOLE
    known = bool(output.group.steps) and not run.is_doubtful
    if partner is None:
        if run.beside:
            _warn_calls(method, model)
        return route_of(method, step, known=known and not run.beside)
    pair = guidance_partner(current_context())
    assert pair is not None, "a call with a partner has a context of guidance"
    follows = partner.clock.index == run.clock.index + 1
    return route_of(method, step, known=known, side=pair[0], follows=follows)


def _warn_calls(method: Method, model: Model) -> None:
    """Each call of a step is taken for a guidance batch: half of it would be answered from the other half."""
    model.warn_once(
        "calls", f"{type(method.config).__name__}: the model is called more than once per step, with equal latents, "
        "and every call is taken for a batch of [uncond, cond] samples: computed without a cache. Call it in "
        'cachepass.cache_context("cond") and then in cachepass.cache_context("uncond")', stacklevel=7,
    )  # fmt: skip
