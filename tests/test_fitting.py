"""Tuning by numbers alone: Gram matrices, fitted weights, schedules; the values ``Fitted`` and ``KeySteps``."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cachepass import ConfigError
from cachepass.forecast import Fit, Fitted, Lagrange, Taylor
from cachepass.schedule import KeySteps, Mask, Past, Step
from cachepass.tuning.candidates import fitted, fixed_methods, step_errors, table_of
from cachepass.tuning.cuts import as_many_flops
from cachepass.tuning.fitting import fit_jointly, kept_at, squared_error
from cachepass.tuning.gram import gram, recording_bytes, sketch
from cachepass.tuning.schedules import descend, grown, neighbours, shortest_paths, spread_evenly, step_lengths

STEPS = 9
TIMES = tuple(1000.0 - 100 * i for i in range(STEPS))


def curve(steps: int = STEPS, width: int = 40, seed: int = 0) -> torch.Tensor:
    """Values of a run that moves smoothly: ``[steps, width]``."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.randn(5, width, dtype=torch.float64, generator=generator)
    t = torch.linspace(0, 2, steps, dtype=torch.float64)[:, None]
    return sum(torch.sin((k + 1) * t + k) * ways[k] / (k + 1) for k in range(5))  # pyright: ignore[reportReturnType]


# ---- Gram matrices --------------------------------------------------------------------------------------------------


def test_a_gram_matrix_is_that_of_all_numbers_of_a_step():
    values = [[torch.randn(2, 3), torch.randn(4)] for _ in range(3)]
    whole = torch.stack([torch.cat([v.flatten() for v in step]) for step in values]).double()
    assert torch.equal(gram([sketch(step) for step in values]), whole @ whole.T)


def test_a_sketch_keeps_distances_as_well_as_it_says():
    """Also of values whose tokens are nearly alike, and with a channel that is a hundred times as large."""
    generator = torch.Generator().manual_seed(1)
    size, token = 4093, torch.randn(1, 64, generator=generator)
    steps = [token + 0.1 * torch.randn(3000, 64, generator=generator) for _ in range(4)]
    for step in steps:
        step[:, 7] *= 100
    exact, found = gram([s.flatten() for s in steps]), gram([sketch([s[:1000], s[1000:]], size) for s in steps])
    for i, j in itertools.combinations(range(4), 2):
        distances = [g[i, i] - 2 * g[i, j] + g[j, j] for g in (exact, found)]
        assert abs(distances[1] / distances[0] - 1) < 4 * math.sqrt(2 / size)


def test_what_recording_keeps_is_bounded():
    assert recording_bytes(100, 50) == 4 * 100 * 50
    flux, video = 4608 * 3072, 9 * 30 * 52 * 1536  # FLUX.1 at 1024 x 1024; Wan 1.3B, 33 frames at 480p
    assert recording_bytes(flux, 50) == recording_bytes(video, 50) < 50 * 2**20


# ---- weights --------------------------------------------------------------------------------------------------------


def test_a_joint_fit_is_least_squares_over_the_values_themselves():
    values, computed, depth, spread = curve(), (0, 1, 4, 6), 3, 0.4
    scale = [0.5 + 0.1 * k for k in range(STEPS)]
    found = fit_jointly(values @ values.T, computed, depth, scale, spread)
    forecast = list(kept_at(computed, STEPS, depth))
    # The same problem written out: one equation for the sum of all errors, one for each step.
    ways = [(k, older) for k, kept in forecast for older in kept[1:]]
    newest = {k: kept[0] for k, kept in forecast}
    columns = []
    for k, older in ways:
        change = scale[k] * (values[older] - values[newest[k]])
        own = [math.sqrt(spread) * change if k == other else torch.zeros_like(change) for other, _ in forecast]
        columns.append(torch.cat([change, *own]))
    errors = {k: scale[k] * (values[k] - values[n]) for k, n in newest.items()}
    right = torch.cat([sum(errors.values()), *(math.sqrt(spread) * e for e in errors.values())])
    solution = torch.linalg.lstsq(torch.stack(columns, 1), right[:, None]).solution[:, 0]
    expected = float((right - torch.stack(columns, 1) @ solution).square().sum())
    assert found.error == pytest.approx(expected, rel=1e-4, abs=1e-6 * float(right.square().sum()))
    assert all(sum(w) == pytest.approx(1.0) for w in found.weights if w is not None)
    assert [k for k, w in enumerate(found.weights) if w is None] == list(computed)


def test_with_a_large_spread_each_step_is_fitted_by_itself():
    values = curve()
    inner = values @ values.T
    found = fit_jointly(inner, (0, 3, 5), 2, [1.0] * STEPS, 1e8)
    for k, kept in kept_at((0, 3, 5), STEPS, 2):
        if len(kept) == 2:
            a, b = values[k] - values[kept[0]], values[kept[1]] - values[kept[0]]
            assert found.weights[k][1] == pytest.approx(float(a @ b / (b @ b)), rel=1e-3)  # pyright: ignore


def test_errors_by_step_are_those_of_the_forecasts():
    values = curve()
    candidate = fitted("", (0, 2, 5), values @ values.T, 2, [1.0] * STEPS, 1.0)
    errors = step_errors(values @ values.T, candidate)
    for k, kept in kept_at((0, 2, 5), STEPS, 2):
        forecast = sum(w * values[j] for w, j in zip(candidate.weights[k], kept, strict=True))  # pyright: ignore
        expected = float((values[k] - forecast).norm() / values[k].norm())
        assert errors[k] == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert [k for k, error in enumerate(errors) if error == 0] == [0, 2, 5]


# ---- schedules ------------------------------------------------------------------------------------------------------


def test_the_shortest_path_is_the_best_of_all_schedules():
    values = curve(seed=3)
    inner, scale = values @ values.T, [1.0 + 0.2 * k for k in range(STEPS)]

    def error(computed: tuple[int, ...]) -> float:
        total = 0.0
        for k, kept in kept_at(computed, STEPS, 2):
            weights = [1.0]
            if len(kept) == 2:
                a, b = values[k] - values[kept[0]], values[kept[1]] - values[kept[0]]
                weights = [1 - float(a @ b / (b @ b)), float(a @ b / (b @ b))]
            total += scale[k] ** 2 * squared_error(inner, k, kept, weights)
        return total

    for count, path in shortest_paths(inner, [1, 2, 3, 5], scale).items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
        assert len(path) == count
        assert error(path) == pytest.approx(min(map(error, every)), rel=1e-6)


@pytest.mark.parametrize("count", range(1, STEPS + 1))
@pytest.mark.parametrize("last", [False, True])
def test_steps_that_are_spread(count, last):
    for warm_up in range(1, count + 1):
        steps = spread_evenly(count, STEPS, warm_up, last=last)
        assert len(steps) == count and set(range(warm_up)) <= set(steps)
        assert not last or count == warm_up or steps[-1] == STEPS - 1


def test_moves_of_a_schedule():
    near = list(neighbours((0, 2, 5), STEPS))
    assert all(len(steps) == 3 and steps[0] == 0 and len(set(steps) & {0, 2, 5}) == 2 for steps in near)
    assert set(near) == {(0, a, 5) for a in (1, 3, 4)} | {(0, 2, b) for b in (3, 4, 6, 7, 8)}
    inner = (values := curve()) @ values.T

    def error(steps: tuple[int, ...]) -> float:
        return fit_jointly(inner, steps, 2, [1.0] * STEPS, 1.0).error

    better = descend((0, 1, 2), error, STEPS)
    assert error(better) < error((0, 1, 2)) and len(better) == 3
    assert set(grown((0, 4), 4, inner, [1.0] * STEPS)) > {0, 4}


def test_lengths_of_steps_are_shares_of_the_way():
    assert step_lengths((1000.0, 800.0, 500.0)) == [200 / 800, 300 / 800, 300 / 800]
    assert step_lengths((500.0,)) == [1.0]
    assert step_lengths((500.0, 500.0)) == [0.5, 0.5]  # a model that is given one timestep throughout


def test_fixed_methods_have_their_own_weights():
    every = list(fixed_methods(4, 28))
    assert len({(c.computed, c.weights) for c in every}) > 20
    assert all(len(c.computed) <= 4 for c in every)
    taylor = next(c for c in every if c.name == "even, warm-up 2, taylor(1)")
    for k, kept in kept_at(taylor.computed, 28, 2):
        assert taylor.weights[k] == Taylor(1).weights(kept, k)
    assert any(c.name.startswith("preset ultra") for c in fixed_methods(8, 28))


@pytest.mark.parametrize("other", [0.02, 0.1, 0.5])
def test_as_many_flops(other):
    count = as_many_flops(20, 50, 0.02, other)
    assert count + other * (50 - count) <= 20 + 0.02 * 30 < count + 1 + other * (49 - count)


# ---- the values -----------------------------------------------------------------------------------------------------


def tuned() -> Fitted:
    values = curve()
    return table_of(fitted("", (0, 1, 4, 6), values @ values.T, 3, [1.0] * STEPS, 0.3), TIMES)


@pytest.mark.parametrize("by", ["step", "timestep"])
def test_in_its_own_run_a_table_gives_what_it_holds(by):
    rule = tuned().bind(STEPS if by == "step" else None)
    assert rule.spacing == by
    for entry in rule.table:
        nodes, at = entry.kept, float(entry.step)
        if by == "timestep":
            nodes, at = [TIMES[step] for step in entry.kept], TIMES[entry.step]
        assert rule.weights(list(nodes), at)[: len(entry.weights)] == entry.weights


def test_elsewhere_what_is_damped_is_damped_alike():
    """A table of a polynomial's own weights is that polynomial at any positions."""
    exact = tuple(
        Fit(step, kept, Lagrange(2).weights(kept, step)[: len(kept)]) for step, kept in kept_at((0, 1, 4, 6), STEPS, 3)
    )
    rule = Fitted(3, TIMES, exact)
    for nodes, at in (((620.0, 880.0, 990.0), 480.0), ((410.0, 590.0, 880.0), 310.0), ((910.0, 990.0), 830.0)):
        expected = Lagrange(2).weights(nodes, at)
        assert rule.weights(nodes, at) == pytest.approx(expected, abs=1e-6)
    damped = Fitted(2, TIMES, (Fit(5, (4, 1), (1 + 0.5 / 3, -0.5 / 3)),))  # half of a line
    assert damped.weights((700.0, 800.0), 500.0) == pytest.approx((2.0, -1.0))
    assert damped.weights((700.0,), 500.0) == (1.0, 0.0)


def test_a_step_that_was_computed_beside_changes_nothing():
    rule = tuned().bind(STEPS)
    entry = next(entry for entry in rule.table if entry.kept == (1, 0))
    alone = rule.weights(entry.kept, entry.step)
    assert rule.weights((1, 0.5, 0), entry.step) == (alone[0], 0.0, alone[1])
    last = next(entry for entry in rule.table if entry.kept == (6, 4, 1))
    lost = rule.weights((6, 4, 2), last.step)  # step 2 is kept instead of 1: nearly the same
    assert lost == pytest.approx(rule.weights((6, 4, 1), last.step), abs=0.3) and sum(lost) == pytest.approx(1.0)


def test_an_empty_table_is_a_line():
    assert Fitted(2, TIMES, ()).weights((700.0, 800.0), 500.0) == pytest.approx((3.0, -2.0))  # a line


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ((Fit(3, (4,), (1.0,)),), "cannot be forecast from"),
        ((Fit(3, (1, 2), (1.0, 0.0)),), "newest first"),
        ((Fit(30, (1,), (1.0,)),), "cannot be forecast from"),
        ((Fit(3, (2, 1), (1.0,)),), "1 weights for 2 outputs"),
        ((Fit(5, (4, 3, 2), (1.0, 0.0, 0.0)),), "at most 2"),
        ((3,), "of the type Fit"),
    ],
)
def test_a_table_that_makes_no_sense(table, words):
    with pytest.raises(ConfigError, match=words):
        Fitted(2, TIMES, table)


def walk(schedule: KeySteps, times: tuple[float, ...]) -> list[int]:
    """The computed steps of a run with these timesteps."""
    kept: list[int] = []
    for index, time in enumerate(times):
        past = Past(computed=tuple(kept), timesteps=tuple(times[i] for i in kept))
        if not kept or not schedule.predicts(Step(index, time), past):
            kept.insert(0, index)
    return kept[::-1]


def test_key_steps_by_timestep():
    schedule = KeySteps((0, 1, 4, 6), TIMES)
    assert walk(schedule, TIMES) == [0, 1, 4, 6]
    assert walk(schedule, TIMES[3:]) == [0, 1, 3]  # the end of a run: those at the timesteps 600 and 400
    half = tuple(1000.0 - 200 * i for i in range(5))
    assert walk(schedule, half) == [0, 1, 2, 3]  # at or behind 1000, 900, 600, 400
    rising = tuple(-t for t in TIMES)
    assert walk(KeySteps((0, 1, 4, 6), rising), rising) == [0, 1, 4, 6]


def test_key_steps_in_a_run_of_their_length_are_a_mask():
    schedule = KeySteps((0, 1, 4, 6), TIMES)
    assert schedule.bind(STEPS) == Mask([1, 1, 0, 0, 1, 0, 1, 0, 0])
    assert schedule.bind(5) is schedule and schedule.bind(None) is schedule
    assert schedule.needs_timestep and not schedule.bind(STEPS).needs_timestep
    assert schedule.never_predicts(None) is None
    assert "4 steps" in str(KeySteps(range(STEPS), TIMES).bind(STEPS).never_predicts(4))


@pytest.mark.parametrize(
    ("computed", "times", "words"),
    [
        ((), TIMES, "no key step"),
        ((0, 9), TIMES, "9"),
        ((0, 4, 2), TIMES, "rise"),
        ((0,), ("x",), "numbers"),
        (3, TIMES, "list"),
    ],
)
def test_key_steps_that_make_no_sense(computed, times, words):
    with pytest.raises(ConfigError, match=words):
        KeySteps(computed, times)
