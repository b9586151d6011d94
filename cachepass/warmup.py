"""Warm-up: every program that a run can need is compiled before the first run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.progress import Progress

from .inspect.summary import Summary, summary
from .program.progress import shown_elsewhere
from .run.context import warming_up
from .run.live import programs_of
from .run.reach import WARMING, Warming


def warmup(
    model: Callable[..., Any],
    *args: Any,
    timesteps: Sequence[float] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Summary:
    """Compile every phase that a run can reach, with the inputs of one step: ``model(*args, **kwargs)``.

    Without it each phase is compiled in the first step that needs it. Here the kernels of one are compiled by
    Inductor's workers while the next is lowered, and no later step waits for a compiler. The model is called once, in
    a cache context of its own that is gone afterwards: clocks, histories and counts stay as they are. A model that is
    called twice per step for guidance is warmed up in both of its contexts. Inputs must be as later calls bring them,
    strides included: ``t.expand(1)`` and ``torch.tensor([t])`` are two captures to Dynamo.

    Args:
        model: Compiled with ``backend="cached_inductor"``.
        timesteps: Those of a run, as the model gets them: only what they reach is compiled. None: what
            ``num_inference_steps`` reaches where the schedule is one of steps alone, else every phase of the plan.
        progress: Show a progress bar.

    Returns:
        The summary, whose ``variants`` are the programs and their compile seconds.

    Raises:
        NotCompiledError: ``model`` is not compiled with ``backend="cached_inductor"``.
    """
    with Progress(disable=not progress, transient=True) as bar, shown_elsewhere(), torch.no_grad():
        token = WARMING.set(Warming(None if timesteps is None else tuple(map(float, timesteps)), bar))
        try:
            with warming_up():
                model(*args, **kwargs)
        finally:
            WARMING.reset(token)
            for record in dict.fromkeys(instance.model for _, instance in programs_of(model)):
                record.forget_warmup()
    return summary(model)
