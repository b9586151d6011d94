"""Diffusers' own hooks on a GPU that is not there: what a computed and a predicted step of theirs launch.

    counted : shape, method, its settings, GPU -> launches of a computed and of a predicted step

The hooks are enabled as users do it, and the model is given to ``torch.compile``, whose graph breaks where they decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from counting import Counting
from shapes import SHAPES, build, step_inputs
from subjects import taylor_phase

from cachepass.gpu.program import Launch, seconds_of
from cachepass.gpu.table import Gpu

CONFIGS = {
    "taylorseer": "TaylorSeerCacheConfig",
    "pab": "PyramidAttentionBroadcastConfig",
    "first_block_cache": "FirstBlockCacheConfig",
}
_DIFFERENCES = {"compute": float("inf"), "predict": 0.0}  # what the first block's hook measures, and decides by
_WITHIN = 500.0  # a timestep at which PAB predicts


def counted(shape: str, method: str, settings: dict[str, Any], gpu: Gpu) -> dict[str, Any]:
    """What is launched without the hooks, and with them in the last computed and the last predicted call of a run."""
    (plain,) = _steps(shape, None, {}, gpu, ["compute"])
    phases = _phases(method, settings)
    steps = list(_steps(shape, method, settings, gpu, phases))
    last = dict(zip(phases, steps, strict=True))
    return {
        "method": method,
        **{name: launched(last.get(name, plain), gpu) for name in ("plain", "compute", "predict")},
    }


def _phases(method: str, settings: dict[str, Any]) -> list[str]:
    """The calls of a run, until both kinds have come with all that they keep; PAB has calls of neither kind."""
    if method == "taylorseer":
        return [taylor_phase(step, settings) for step in range(17)]
    if method == "first_block_cache":
        return ["compute", "compute", "predict", "compute", "predict"]
    due = [{call % skip == 0 for skip in settings.values()} for call in range(8)]
    return ["compute" if all(of) else "some" if any(of) else "predict" for of in due]


def _steps(
    shape: str, method: str | None, settings: dict[str, Any], gpu: Gpu, phases: Sequence[str]
) -> Iterator[list[Launch]]:
    """What each call of a run launches."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    torch._dynamo.reset()
    model: Any = build(shape, "meta", torch.bfloat16).to_empty(device="cpu")  # memory that nobody touches
    if method is not None:
        _enable(model, shape, method, settings)
    counting = Counting(gpu)
    compiled = torch.compile(model, backend=counting.backend, dynamic=False)
    for step, phase in enumerate(phases):
        if method is not None:
            _set_cache_context(model, CacheContext("counted"))
        counting.answer = _DIFFERENCES.get(phase, 0.0)
        inputs = step_inputs(shape, step, len(phases), "cpu", torch.bfloat16)
        with counting.step() as launches, torch.no_grad():
            compiled(**inputs)
        yield launches


def _enable(model: Any, shape: str, method: str, settings: dict[str, Any]) -> None:
    import diffusers

    more: dict[str, dict[str, Any]] = {
        "taylorseer": {"cache_identifiers": [SHAPES[shape].attention]},  # by default they find none of Wan's
        "pab": {"current_timestep_callback": lambda: _WITHIN},
    }
    model.enable_cache(getattr(diffusers, CONFIGS[method])(**settings, **more.get(method, {})))


def launched(launches: Sequence[Launch], gpu: Gpu) -> dict[str, Any]:
    """What a call launches, as the tables have it."""
    return {
        "launches": len(launches),
        "fused": sum(launch.fused for launch in launches),
        "bytes": sum(launch.bytes_moved for launch in launches),
        "flops": sum(launch.flops for launch in launches),
        "seconds": seconds_of(launches, gpu),
    }
