"""Fitting: weights of forecasts from a Gram matrix.

All weights of a forecast sum to 1. Without that they shrink towards zero, which is best for one step and adds up over a
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

Weights = tuple[float, ...]
_RIDGE = 1e-9  # of the mean of the diagonal: outputs that are nearly alike


def kept_at(computed: Sequence[int], steps: int, depth: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each forecast step of a run, and the steps whose outputs are kept then, newest first."""
    kept: list[int] = []
    chosen = set(computed)
    for step in range(steps):
        if step in chosen:
            kept = [step, *kept][:depth]
        else:
            yield step, tuple(kept)


def squared_error(gram: torch.Tensor, step: int, kept: Sequence[int], weights: Sequence[float]) -> float:
    """Of a forecast: ``|r_step - sum_j w_j r_j|^2``."""
    at = [step, *kept]
    signs = torch.tensor([1.0, *(-w for w in weights)], dtype=torch.float64)
    return max(float(signs @ gram[at][:, at] @ signs), 0.0)


@dataclass(frozen=True)
class JointFit:
    """The weights of all forecasts of a run, and what they leave.

    Attributes:
        weights: By step; None: the step is computed.
        error: ``|sum_k s_k e_k|^2 + spread * sum_k |s_k e_k|^2``, where ``e_k`` is the error of step k.
    """

    weights: tuple[Weights | None, ...]
    error: float


def fit_jointly(
    gram: torch.Tensor, computed: Sequence[int], depth: int, scale: Sequence[float], spread: float
) -> JointFit:
    """Least squares for all steps of a run at once.

    Errors of steps add up along a run, so it is their sum that has to be small: those of neighbouring steps may cancel.
    ``spread`` is the share of each step's own error, which bounds how far the run departs in between; with a large one
    every step is fitted by itself.

    Args:
        gram: Inner products, ``[n, n]``.
        computed: The computed steps, rising, with 0 among them.
        depth: Outputs kept.
        scale: What an error of each step is worth at the end: the length of the sampler's step.
        spread: See above, > 0.
    """
    steps = len(gram)
    forecast = list(kept_at(computed, steps, depth))
    rows = [(k, kept[0], older) for k, kept in forecast for older in kept[1:]]
    base = torch.zeros(len(forecast), steps, dtype=torch.float64)  # errors of reusing the newest output
    for i, (k, kept) in enumerate(forecast):
        base[i, k] += scale[k]
        base[i, kept[0]] -= scale[k]
    total = base.sum(0)
    if not rows:
        own = ((base @ gram) * base).sum()
        return JointFit(_spelled(forecast, steps, []), float(total @ gram @ total + spread * own))
    line = torch.arange(len(rows))
    step_of = torch.tensor([k for k, _, _ in rows])
    scales = torch.tensor([scale[k] for k, _, _ in rows], dtype=torch.float64)
    ways = torch.zeros(len(rows), steps, dtype=torch.float64)  # what a unit of each weight changes
    ways[line, torch.tensor([older for _, _, older in rows])] += scales
    ways[line, torch.tensor([newest for _, newest, _ in rows])] -= scales
    index_of = {k: i for i, (k, _) in enumerate(forecast)}
    base_of = base[torch.tensor([index_of[k] for k, _, _ in rows])]
    products = ways @ gram
    together = products @ ways.T
    same_step = (step_of[:, None] == step_of[None, :]).double()
    matrix = together + spread * together * same_step
    right = products @ total + spread * (products * base_of).sum(1)
    ridge = _RIDGE * matrix.diagonal().mean()
    solution = torch.linalg.solve(matrix + ridge * torch.eye(len(rows), dtype=torch.float64), right)
    left = base.index_add(0, torch.tensor([index_of[k] for k, _, _ in rows]), -solution[:, None] * ways)
    whole = left.sum(0)
    error = float(whole @ gram @ whole + spread * ((left @ gram) * left).sum())
    return JointFit(_spelled(forecast, steps, solution.tolist()), error)


def _spelled(
    forecast: Sequence[tuple[int, tuple[int, ...]]], steps: int, solution: Sequence[float]
) -> tuple[Weights | None, ...]:
    """The solution's numbers as weights: that of the newest output is what the others leave of 1."""
    weights: list[Weights | None] = [None] * steps
    numbers = iter(solution)
    for step, kept in forecast:
        older = [next(numbers) for _ in kept[1:]]
        weights[step] = (1.0 - sum(older), *older)
    return tuple(weights)
