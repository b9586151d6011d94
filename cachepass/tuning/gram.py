"""Gram matrices: inner products of what cuts were worth in the steps of a run.

    G[i, j] = <r_i, r_j>

It is all that a search needs: the squared error of forecasting step i by any weights from any steps is a quadratic form
in G. Values of more than ``SKETCH`` numbers are sketched (a count sketch, Charikar et al. 2002: each number is added,
with a random sign, to one of so many sums): a linear map that keeps inner products up to a relative standard deviation
of ``sqrt(2 / SKETCH)``, 0.3 %, so a run of 50 steps keeps 50 MiB whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SKETCH = 262_139  # numbers kept of a step's values; a prime, so that those of one channel do not meet in few sums
_CHUNK = 1 << 24  # numbers worked on at a time


def sketch(values: Sequence[torch.Tensor], size: int = SKETCH) -> torch.Tensor:
    """The values of one step, one after the other: as they are, or a sketch of ``size`` numbers (fp32, on their
    device)."""
    total = sum(value.numel() for value in values)
    if total <= size:
        return torch.cat([value.detach().flatten().float() for value in values])
    sums = torch.zeros(size, device=values[0].device)
    generator = torch.Generator(device=sums.device)
    generator.manual_seed(0)  # the same signs in each step
    rows = max(1, _CHUNK // size)
    for value in values:
        for part in value.detach().flatten().split(rows * size):
            signs = torch.empty(part.numel(), dtype=torch.int8, device=sums.device).random_(2, generator=generator)
            signed = part.float() * (2 * signs - 1)
            whole = signed.numel() // size * size
            sums += signed[:whole].view(-1, size).sum(0)
            sums[: signed.numel() - whole] += signed[whole:]
    return sums


def gram(steps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of the vectors of all steps: ``[n, n]``, fp64 on the CPU."""
    rows = torch.stack([step.cpu() for step in steps]).double()
    return rows @ rows.T


def recording_bytes(numbers: int, steps: int, trajectories: int = 1) -> int:
    """What recording a run keeps: ``numbers`` are those of one step's values."""
    return 4 * min(numbers, SKETCH) * steps * trajectories
