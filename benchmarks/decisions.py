"""What methods that decide by the first block's residual decide on a case: found on the plain model, block by block.

The inputs of a benchmark's steps do not depend on what came out of the steps before, so the decisions of all subjects
are those that can be read off the plain model's first block; the threshold is put where rounding cannot move one.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from shapes import build, step_inputs

STEPS = 28
_WANTED = range(9, 14)  # computed steps


@dataclass(frozen=True)
class Decisions:
    """A threshold, the steps that are computed under it, and how far (relatively) the nearest distance is from it."""

    threshold: float
    computed: tuple[bool, ...]
    margin: float


@functools.cache
def decisions(shape: str, device: str, dtype: torch.dtype, warm_up: int) -> Decisions:
    """The threshold with the widest margin of those that compute 9 to 13 of 28 steps, the first ones (``warm_up``)
    among them."""
    residuals = _residuals(shape, device, dtype)
    distances = sorted(_distance(new, old) for i, new in enumerate(residuals) for old in residuals[max(0, i - 6) : i])
    found = (_decide(residuals, (a + b) / 2, warm_up) for a, b in itertools.pairwise(distances))
    return max((d for d in found if sum(d.computed) in _WANTED), key=lambda d: d.margin)


def _decide(residuals: list[torch.Tensor], threshold: float, warm_up: int) -> Decisions:
    computed, margin, kept = [], float("inf"), residuals[0]
    for step, residual in enumerate(residuals):
        near = False
        if step >= warm_up:
            distance = _distance(residual, kept)
            near, margin = distance < threshold, min(margin, abs(distance / threshold - 1))
        computed.append(not near)
        kept = kept if near else residual
    return Decisions(threshold, tuple(computed), margin)


def _distance(new: torch.Tensor, old: torch.Tensor) -> float:
    return float((new - old).abs().mean() / old.abs().mean())


def _residuals(shape: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """What the first block adds to the latents' stream, in each step."""
    model: Any = build(shape, device, dtype)
    blocks = next(child for child in model.children() if isinstance(child, torch.nn.ModuleList))
    found: list[torch.Tensor] = []

    def keep(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        outputs = output if isinstance(output, tuple) else (output,)
        found.append(next(o for o in outputs if o.shape == hidden.shape) - hidden)
        raise _Enough

    blocks[0].register_forward_hook(keep, with_kwargs=True)
    for step in range(STEPS):
        try:
            model(**step_inputs(shape, step, STEPS, device, dtype, guided=False))
        except _Enough:
            continue
    return found


class _Enough(Exception):
    """The first block has run."""
