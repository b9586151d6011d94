"""Dynamic mode decomposition from inner products alone, against signals it is exact for and against the full SVD."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachepass.forecast import DMD, Taylor


def outputs(signals, times, seed: int = 0, width: int = 300) -> torch.Tensor:
    """(len(times), width): each signal of time along a random direction of its own."""
    directions = torch.randn(len(signals), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor([[signal(t) for signal in signals] for t in times], dtype=torch.float64) @ directions


def predict(rule: DMD, signals, nodes, at) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rule says of the signals at ``at``, and what they are."""
    kept = outputs(signals, nodes)
    weights = rule.weights(nodes, at, kept @ kept.T)
    assert len(weights) == rule.history
    return torch.tensor(weights[: len(nodes)], dtype=torch.float64) @ kept, outputs(signals, [at])[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def slow(kept: torch.Tensor, rank: int, ridge: float, horizon: float) -> torch.Tensor:
    """The textbook on the snapshots themselves: ``kept`` is (n, width), newest first."""
    snapshots = kept.flip(0).T
    before, after = snapshots[:, :-1], snapshots[:, 1:]
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    r = rank or int((s > 1e-4 * s[0]).sum())
    inverse = torch.diag(1 / (s[:r] + ridge)).to(torch.complex128)
    u, v = u[:, :r].to(torch.complex128), vh[:r].T.to(torch.complex128)
    after = after.to(torch.complex128)
    factors, vectors = torch.linalg.eig(u.T @ after @ v @ inverse)
    modes = after @ v @ inverse @ vectors
    amplitudes = torch.linalg.lstsq(modes, snapshots[:, -1:].to(torch.complex128)).solution[:, 0]
    return (modes @ (factors**horizon * amplitudes)).real


@pytest.mark.parametrize("step", [3, -20.5], ids=["rising", "falling"])
@pytest.mark.parametrize("horizon", [1 / 3, 0.5, 1, 5 / 3, 4])
@settings(max_examples=20, deadline=None)
@given(st.floats(0.7, 1.05), st.floats(0.3, 1.2), st.floats(0.3, 0.6))
def test_damped_oscillations_are_exact(step, horizon, radius, angle, decay):
    """An oscillation, a decay and a constant: four directions, five gaps. Per gap, so that any spacing will do."""
    signals = [
        lambda t: radius ** (t / step) * math.cos(angle * t / step),
        lambda t: radius ** (t / step) * math.sin(angle * t / step),
        lambda t: decay ** (t / step),
        lambda t: t**0,
    ]
    nodes = [step * i for i in (5, 4, 3, 2, 1, 0)]
    forecast, truth = predict(DMD(6), signals, nodes, nodes[0] + horizon * step)
    assert distance(forecast, truth) < 1e-6


@pytest.mark.parametrize("count", [4, 5, 6])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("horizon", [0.25, 1.0, 2.5])
def test_equal_to_the_svd_of_the_outputs(count, rank, horizon):
    """On outputs that no few modes explain: what is left out counts as much as what is kept."""
    nodes = [10.0 - i for i in range(count)]
    signals = [math.sin, lambda t: 1 + t / 10, lambda t: math.exp(-t / 4), lambda t: 1 / (1 + t), math.cos]
    noise = torch.randn(count, 300, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    kept = outputs(signals, nodes) + 0.1 * noise
    weights = DMD(6, rank=rank).weights(nodes, 10.0 + horizon, (kept @ kept.T).tolist())
    forecast = torch.tensor(weights[:count], dtype=torch.float64) @ kept
    assert distance(forecast, slow(kept, rank, 1e-8, horizon)) < 1e-6
    assert weights[count - 1 :] == (0.0,) * (7 - count)  # the oldest output is only where the map starts from


def test_only_the_evenly_spaced_tail_is_fitted():
    signals = [lambda t: 0.9**t, lambda t: 0.6**t, lambda t: t**0]
    nodes = [14, 12, 10, 8, 5, 4]
    kept = outputs(signals, nodes)
    gram = kept @ kept.T
    weights = DMD(6).weights(nodes, 15, gram)
    assert weights == (*DMD(4).weights(nodes, 15, gram), 0.0, 0.0)
    assert distance(torch.tensor(weights, dtype=torch.float64) @ kept, outputs(signals, [15])[0]) < 1e-6


@pytest.mark.parametrize("nodes", [[9], [9, 6], [9, 6, 3], [9, 6, 3, 2], [9, 8, 6, 4, 2, 0], [9, 9, 7, 5]], ids=str)
def test_too_few_even_gaps_are_a_line(nodes):
    """No Gram matrix is asked for then."""
    expected = Taylor(1).weights(sorted(set(nodes), reverse=True), 11)
    weights = DMD(6).weights(nodes, 11)
    assert sorted(filter(None, weights)) == sorted(filter(None, expected))
    assert len(weights) == 6


NODES = [6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inner_products_that_are_not_finite_reuse_the_newest_output(value):
    assert DMD(6).weights(NODES, 7, [[value] * 6] * 6) == (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_forecast_that_overflows_reuses_the_newest_output():
    kept = outputs([lambda t: 10.0**t], NODES)
    assert DMD(6).weights(NODES, 5000, kept @ kept.T) == (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_outputs_of_zeros_are_forecast_as_zeros():
    weights = DMD(6).weights(NODES, 7, torch.zeros(6, 6))
    assert all(map(math.isfinite, weights))


def test_more_modes_than_inner_products_resolve_are_left_out():
    signals = [lambda t: 0.9**t, lambda t: t**0]
    forecast, truth = predict(DMD(6, rank=5), signals, NODES, 8.5)
    assert distance(forecast, truth) < 1e-6


def test_the_gram_matrix_is_required_and_large_enough():
    with pytest.raises(ValueError, match="needs the Gram matrix"):
        DMD(6).weights(NODES, 7)
    with pytest.raises(ValueError, match="at least 6 rows"):
        DMD(6).weights(NODES, 7, torch.eye(5))
    larger = torch.eye(8)
    assert DMD(6).weights(NODES, 7, larger) == DMD(6).weights(NODES, 7, larger[:6, :6])
