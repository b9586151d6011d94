"""Runs that measure: on a model that returns what its last block does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import cachepass

STEPS = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x) * time)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, timestep[:, None, None] / 1000)
        return x


def run(model):
    """Every output, from latents that follow them."""
    x, outputs = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        for step in range(STEPS):
            outputs.append(model(x, torch.tensor([1000.0 - 100 * step])))
            x = x - outputs[-1] / STEPS
    return outputs


def bare() -> Bare:
    torch.manual_seed(0)
    return Bare().eval().requires_grad_(False)


def test_a_fit_measures_what_the_model_returns():
    model = bare()
    outputs = run(model)
    changes = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in itertools.pairwise(outputs)]
    fit = cachepass.fit_teacache(model, run, degree=2)
    assert fit.changes == pytest.approx(changes, rel=1e-4)
    assert len(fit.coefficients) == 3 and len(fit.distances) == STEPS - 1
    torch.testing.assert_close(run(model), outputs)
