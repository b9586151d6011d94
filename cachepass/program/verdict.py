"""Verdict: a decision that a program takes by itself (the cond lowering), and the numbers that it takes it by."""

from __future__ import annotations

import torch

from ..recipe.schedule import MAX_DEGREE, Bound

BOUND_NUMBERS = 4 + MAX_DEGREE + 1  # forced, accumulated, value, inclusive, and the coefficients, highest first


def numbers_of(bound: Bound) -> tuple[float, ...]:
    """The bound of a decision that is not forced, for ``verdict``."""
    coefficients = bound.coefficients or (1.0, 0.0)
    return (
        0.0,
        bound.accumulated,
        bound.value,
        float(bound.inclusive),
        *(0.0,) * (MAX_DEGREE + 1 - len(coefficients)),
        *coefficients,
    )


def verdict(distance: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """(1 for predict, 0 for compute; the distance), on the host."""
    d = distance.to(torch.float64)
    rescaled = torch.zeros_like(d)
    for i in range(4, BOUND_NUMBERS):
        rescaled = rescaled * d + bound[i]
    total = bound[1] + rescaled
    near = (total < bound[2]) | ((total == bound[2]) & (bound[3] > 0))
    near = near & torch.isfinite(total)
    predict = torch.where(bound[0] == 0, near, bound[0] > 0)
    return torch.stack([predict.to(torch.float64), d]).cpu()


def is_predicted(told: torch.Tensor) -> torch.Tensor:
    return told[0] > 0.5


def quotient(means: torch.Tensor) -> torch.Tensor:
    """The distance, of the two means: parts of equal size on all ranks leave it to sums of both."""
    return (means[0] / means[1]).mean()
