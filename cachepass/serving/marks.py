"""Marks: what each step of a run will do, from what a model's schedule knows before it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import NotCompiledError

if TYPE_CHECKING:
    import torch

    from ..inspect.explain import Explanation
    from ..inspect.timeline import Lane


def phases_of(
    model: Explanation | torch.nn.Module | Callable[..., Any],
    num_inference_steps: int,
    *,
    timesteps: Sequence[float] | None = None,
    contexts: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The phases of a :class:`Request`: for each step a string with one mark for each context and group, such as
    ``"#"``, or ``"#."`` where one group is computed and another predicted.

    These are the marks of ``cachepass.explain(...).timeline(...)``: ``#`` computed, ``.`` predicted, ``?`` decided by
    what is measured in the run. A model whose schedule is known before a run has no ``?``.

    Args:
        model: What ``cachepass.explain`` found, or a compiled model after its warm-up or its first call.
        num_inference_steps: Steps of the request.
        timesteps: As the model gets them, one for each step. None: an even descent from 1000.
        contexts: Those that the model is called in within one step. None: as the model was explained or captured.

    Raises:
        NotCompiledError: No program of ``backend="cached_inductor"`` belongs to the model (yet).
        OptionError: There are more or fewer timesteps than steps.
        BatchError: The model was captured for guidance batches and the contexts are those of two calls, or the reverse.
    """
    lanes: Sequence[Lane]
    if callable(model):
        lanes = _compiled_lanes(model, num_inference_steps, timesteps, contexts)
    else:
        lanes = model.timeline(num_inference_steps, timesteps=timesteps, contexts=contexts)
    if not lanes:
        return ("#",) * num_inference_steps  # nothing is cached
    return tuple("".join(marks) for marks in zip(*(lane.marks for lane in lanes), strict=True))


def _compiled_lanes(
    model: Any, steps: int, timesteps: Sequence[float] | None, contexts: Sequence[str] | None
) -> tuple[Lane, ...]:
    """Those of every graph of a compiled model; the blocks of a model that share a graph, or have a graph each, have
    their groups in common."""
    from ..inspect.timeline import default_contexts, lanes, run_timesteps, simulate_calls
    from ..run.live import programs_of

    found: dict[tuple[str, str], Lane] = {}
    dispatchers = dict.fromkeys(dispatcher for dispatcher, _ in programs_of(model))
    for dispatcher in dispatchers:
        if dispatcher.program is not None:
            given = run_timesteps(steps, timesteps, dispatcher.options.timestep_scale)
            plan = dispatcher.program.plan
            calls = simulate_calls(dispatcher.method, plan, given, contexts or default_contexts(plan))
            found |= {(lane.context, lane.group): lane for lane in lanes(calls, plan)}
    if not found and not dispatchers:
        raise NotCompiledError(
            f"no cached_inductor program belongs to this {type(model).__name__}",
            where="phases_of",
            hint="call cachepass.warmup(model, ...) before, or give what cachepass.explain(model, ...) returns",
        )
    return tuple(found.values())
