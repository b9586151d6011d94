"""Schedules: each value by table, their combinations against naive evaluation, MagCache against a stateful replay."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachepass.errors import ConfigError, TimestepError
from cachepass.schedule import (
    Always,
    And,
    Before,
    Every,
    Final,
    MagnitudeBudget,
    Mask,
    MaxSkips,
    Not,
    Or,
    Past,
    Preset,
    Refresh,
    Retention,
    Schedule,
    Step,
    Threshold,
    Timesteps,
    WarmUp,
)

HISTORY = Past(computed=(0,))


def plan(schedule: Schedule, steps: int, distances: list[float] | None = None, timesteps: list[float] | None = None):
    """A run as the runtime drives it: "1" for a computed step, "0" for a predicted one."""
    past, done = Past(), ""
    for index in range(steps):
        if schedule.refreshes(index):
            past = Past()
        step = Step(index, timesteps[index] if timesteps else None)
        distance = distances[index] if distances and past.computed else None
        if past.computed and schedule.predicts(step, past, distance):
            kept = (*past.distances, distance) if distance is not None else ()
            past = Past(past.computed, past.skipped + 1, past.streak + 1, kept, past.measured + max(distance or 0, 0))
            done += "0"
        else:
            past = Past((index, *past.computed)[:3], past.skipped, measured=past.measured + max(distance or 0, 0))
            done += "1"
    return done


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Always(), "1000000000"),
        (Every(1), "1111111111"),
        (Every(3), "1001001001"),
        (Every(3, offset=1), "1100100100"),
        (Every(4, offset=10), "1010001000"),
        (WarmUp(0), "1000000000"),
        (WarmUp(4), "1111000000"),
        (WarmUp(6, interval=2), "1010100000"),
        (WarmUp(5, interval=3), "1001000000"),
        (Before(4), "1000111111"),
        (Before(0), "1111111111"),
        (Final(3), "1000000111"),
        (Final(99), "1111111111"),
        (Final(0), "1000000000"),
        (Retention(0.25), "1110000000"),  # int(2.5 + 0.5)
        (Retention(0.0), "1000000000"),
        (Retention(1.0), "1111111111"),
        (Mask([1, 1, 0, 1, 0, 0]), "1101001111"),
        (Mask([1, 1, 0, 1, 0, 0], beyond=False), "1101000000"),
        (Mask.bins([2, 1], [3, 2]), "1100010011"),
        (Mask.bins([2, 1], [3]), "1100011111"),
        (MaxSkips(), "1000000000"),
        (MaxSkips(total=3), "1000111111"),
        (MaxSkips(total=0), "1111111111"),
        (MaxSkips(consecutive=2), "1001001001"),
        (MaxSkips(total=4, consecutive=3), "1000101111"),
        (~Every(3), "1110110110"),
        (Every(3) & WarmUp(5), "1111101001"),
        (Every(3) | Every(2), "1000001000"),
        (Every(4) & WarmUp(2) & Final(2), "1100100011"),
        (Refresh(WarmUp(2), at=5), "1100011000"),
        (Refresh(Every(3), at=4), "1001100100"),
        (Refresh(WarmUp(2), at=4, repeat=True), "1100110011"),
        (Refresh(MaxSkips(total=2), at=5), "1001110011"),
        (Refresh(Refresh(WarmUp(2), at=3), at=5), "1101111011"),
        (Refresh(Always(), at=4) & WarmUp(2) & Every(6), "1100101000"),
        (~Refresh(Before(2), at=5), "1100011000"),
    ],
    ids=str,
)
def test_runs_of_ten_steps(schedule, expected):
    assert plan(schedule.bind(10), 10) == expected
    assert (schedule.never_predicts(10) is None) == ("0" in expected)


def test_taylorseers_schedule_is_a_combination():
    from cachepass.config import TaylorSeerCacheConfig

    for interval, before, after in itertools.product(range(1, 7), range(5), (6, 13, None)):
        config = TaylorSeerCacheConfig(interval, before, after) if after is None or after > before else None
        if config is None:
            continue
        schedule = Every(interval, offset=before + 1) & WarmUp(before) & Before(99 if after is None else after)
        (group,) = config.recipe(None).groups
        for index in range(30):
            computed = index < before or (index - before - 1) % interval == 0 or (after is not None and index >= after)
            assert schedule.predicts(Step(index), HISTORY) == group.schedule.predicts(Step(index), HISTORY) != computed


def test_what_looks_back():
    """A plan is asked without what was done in the run; everything else, and what holds it, with that."""
    plans = Always(), Every(3), WarmUp(2), Before(5), Timesteps(0, 9), Mask([1, 0]), Every(2) & ~WarmUp(1)
    assert not any(schedule.looks_back for schedule in plans)
    backwards = MaxSkips(total=2), Threshold(0.1), MagnitudeBudget([1.0], 0.1, 3, 0), Refresh(Every(2), at=3)
    assert all(schedule.looks_back and (Every(2) & schedule).looks_back for schedule in backwards)
    assert (~MaxSkips(total=2)).looks_back


def test_a_step_without_a_timestep_says_so():
    with pytest.raises(TimestepError, match="step 3 has no timestep, which 100 < timestep < 800 reads"):
        Timesteps(100, 800).predicts(Step(3), HISTORY)


def test_timesteps_are_exclusive():
    schedule = Timesteps(100, 800)
    assert plan(schedule, 6, timesteps=[999, 800, 799.5, 500, 100.1, 100]) == "110001"
    assert schedule.needs_timestep and (Always() & ~schedule).needs_timestep and not Always().needs_timestep
    assert Refresh(schedule, at=2).needs_timestep
    assert Timesteps(-math.inf, math.inf).predicts(Step(1, 0.0), HISTORY) is True
    assert schedule.never_predicts(10) is None and (~schedule).never_predicts(10) is None


# --- masks


@pytest.mark.parametrize(
    ("name", "count", "mask"),
    [
        ("slow", 18, "1111111101110011100110010001"),
        ("medium", 15, "1111110110001100011000110001"),
        ("fast", 11, "1111110100010000100000100001"),
        ("ultra", 8, "1111001000001000000100000001"),
    ],
)
def test_presets_of_28_steps(name, count, mask):
    preset = Mask.preset(name)
    assert "".join(map(str, preset.computed)) == mask and mask.count("1") == count
    assert Preset(name).bind(28) == preset
    assert plan(preset, 28) == mask


@pytest.mark.parametrize("name", ["slow", "medium", "fast", "ultra"])
def test_presets_of_other_lengths(name):
    computed, longest = sum(Mask.preset(name).computed), {}
    for steps in range(4, 101):
        mask = Mask.preset(name, steps).computed
        assert len(mask) == steps and mask[0] == mask[-1] == 1
        assert sum(mask) == max(2, round(computed * steps / 28)) < steps
        assert sum(mask[: (steps + 1) // 2]) * 2 >= sum(mask), "the early half is computed at least as densely"
        longest[steps] = max(map(len, "".join(map(str, mask)).split("1")))
    assert max(longest.values()) <= longest[28] + 1, "a run of any length has gaps as long as the original's"
    assert Mask.preset(name, 1).computed == (1,)
    assert Mask.preset(name, 2).computed == (1, 1)


def test_masks_take_arrays_and_tensors():
    assert Mask(np.array([1, 0])) == Mask(torch.tensor([1, 0])) == Mask([1, 0]) == Mask((1, 0))  # pyright: ignore


# --- thresholds and caps


@pytest.mark.parametrize(
    ("threshold", "distances", "expected"),
    [
        (Threshold(0.2), [0, 0.1, 0.2, 0.19, 0.3, 0.0], "101010"),
        (Threshold(0.2, inclusive=True), [0, 0.1, 0.2, 0.2, 0.3, 0.0], "100010"),
        (Threshold(0.25, accumulate=True), [0, 0.125, 0.0625, 0.0625, 0.125, 0.125], "100101"),
        (Threshold(0.25, accumulate=True, inclusive=True), [0, 0.125, 0.0625, 0.0625, 0.125, 0.125], "100010"),
        (Threshold(1.0, coefficients=[2, 0, 0.5]), [0, 0.4, 0.6, 0.5, 0.0, -0.1], "101100"),
        (Threshold(1.0, accumulate=True, coefficients=[1, 0.25]), [0, 0.25, 0.125, 0.125, 0.0, 0.0], "100100"),
        (Threshold(0.0), [0, 0, 0], "111"),
        (Threshold(0.0, inclusive=True), [0, 0, 0], "100"),
        (Threshold(1.0), [0, math.nan, math.inf, -math.inf, 0.5], "11110"),
        (Threshold(1.0, coefficients=[-1, 0]), [0, math.inf, 1e308, -0.5], "1100"),
        (Threshold(1.0, coefficients=[-1e200, 0]), [0, 1e200, 1.0], "110"),
    ],
)
def test_threshold(threshold, distances, expected):
    assert plan(threshold, len(distances), distances) == expected
    assert threshold.predicts(Step(1), HISTORY) is None and threshold.never_predicts(10) is None


def test_the_polynomial_is_numpys():
    rng = random.Random(0)
    for _ in range(50):
        coefficients = [rng.uniform(-3, 3) for _ in range(rng.randint(1, 5))]
        past = Past((0,), distances=tuple(rng.uniform(0, 1) for _ in range(3)))
        accumulated, value, same, _ = Threshold(0.5, accumulate=True, coefficients=coefficients).bound(past)
        assert value == 0.5 and same == tuple(coefficients)
        assert accumulated == pytest.approx(sum(np.poly1d(coefficients)(d) for d in past.distances))


@given(
    st.floats(0, 2),
    st.lists(st.floats(-1, 2), max_size=4),
    st.floats(-1, 3),
    st.booleans(),
    st.booleans(),
    st.lists(st.floats(-4, 4), max_size=4),
)
def test_bound_decides_as_predicts_does(value, distances, distance, accumulate, inclusive, coefficients):
    threshold = Threshold(value, accumulate, inclusive, coefficients)
    past = Past((0,), distances=tuple(distances))
    accumulated, limit, polynomial, _ = threshold.bound(past)
    total = accumulated + (sum(c * distance**i for i, c in enumerate(polynomial[::-1])) if polynomial else distance)
    if abs(total - limit) > 1e-9 or not polynomial:
        assert threshold.predicts(Step(1), past, distance) == (total <= limit if inclusive else total < limit)


def test_the_cap_on_distance_counts_computed_steps_too():
    capped = Threshold(0.5) & MaxSkips(distance=1.0)
    assert plan(capped, 7, [0, 0.25, 0.5, 0.125, 0.125, 0.0, 0.0]) == "1010011"
    assert plan(Threshold(0.5) & MaxSkips(distance=1.0), 4, [0, -9.0, 0.25, 0.25]) == "1000"
    assert (~MaxSkips(distance=1.0)).never_predicts(10) is None
    assert MaxSkips(distance=0).never_predicts(10)


# --- MagCache


def magcache(ratios: list[float], max_error: float, most: int, retention: int, steps: int) -> str:
    """The hook's rule, with its state, step by step."""
    product, error, count, has_residual, done = 1.0, 0.0, 0, False, ""
    for index in range(steps):
        skip = False
        if index >= retention:
            product *= ratios[index] if index < len(ratios) else 1.0
            count += 1
            error += abs(1.0 - product)
            skip = has_residual and error <= max_error and count <= most
            if not skip:
                product, error, count = 1.0, 0.0, 0
        has_residual = has_residual or not skip
        done += "0" if skip else "1"
    return done


@settings(max_examples=300)
@given(
    st.lists(st.floats(0.5, 1.5), min_size=1, max_size=35),
    st.floats(0, 0.6),
    st.integers(0, 6),
    st.integers(0, 12),
)
def test_magnitude_budget_is_magcaches_rule(ratios, max_error, most, retention):
    schedule = MagnitudeBudget(ratios, max_error, most, retention)
    expected = magcache(ratios, max_error, most, retention, 30)
    assert plan(schedule, 30) == expected
    if "0" in expected:
        assert schedule.never_predicts(30) is None


def test_magnitude_budget_by_hand():
    assert plan(MagnitudeBudget([1.0, 0.75, 0.75, 1.0, 1.0], 0.25, 3, 0), 8) == "10100010"
    assert plan(MagnitudeBudget(torch.ones(28), 0.06, 3, 6), 14) == "11111100010001"  # pyright: ignore
    # What another schedule has computed begins the sum anew.
    assert plan(MagnitudeBudget([1.0], 0.1, 3, 1) & Every(3), 8) == "10010010"
    assert MagnitudeBudget([1.0], 0.1, 3, 0).predicts(Step(4), Past()) is False


def test_refresh_shifts_what_a_magnitude_budget_sees():
    budget = MagnitudeBudget([1.0, 1.0, 0.5, 1.0, 0.9, 0.9, 1.0], 0.2, 2, 2)
    assert plan(Refresh(budget, at=5), 12) == plan(budget, 5) + plan(budget, 7)


# --- combinations


@dataclass(frozen=True)
class Says(Schedule):
    answer: bool | None

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:
        return self.answer


def test_kleenes_truth_table():
    order = {False: 0, None: 1, True: 2}
    for a, b in itertools.product(order, order):
        both, either = min(a, b, key=order.__getitem__), max(a, b, key=order.__getitem__)
        assert (Says(a) & Says(b)).predicts(Step(1), HISTORY) is both
        assert (Says(a) | Says(b)).predicts(Step(1), HISTORY) is either
    assert [(~Says(a)).predicts(Step(1), HISTORY) for a in (False, None, True)] == [True, None, False]


PLAIN = st.one_of(
    st.builds(Every, st.integers(1, 4), st.integers(0, 3)),
    st.builds(WarmUp, st.integers(0, 6), st.integers(1, 2)),
    st.builds(MaxSkips, st.integers(0, 3), st.integers(0, 3)),
    st.builds(Mask, st.lists(st.integers(0, 1), min_size=1, max_size=8), st.booleans()),
    st.just(Always()),
)
WITHOUT = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda a, at, r: Refresh(a, at, r), inner, st.integers(1, 5), st.booleans()),
    ),
    max_leaves=6,
)
PASTS = st.builds(Past, st.just((0,)), st.integers(0, 4), st.integers(0, 4), st.lists(st.floats(0, 1)).map(tuple))


@st.composite
def with_one_threshold(draw):
    schedule = draw(st.builds(Threshold, st.floats(0, 1), st.booleans(), st.booleans()))
    for _ in range(draw(st.integers(0, 3))):
        other = draw(WITHOUT)
        schedule = draw(st.sampled_from([schedule & other, schedule | other, other & schedule, other | schedule]))
    return schedule


def naive(schedule: Schedule, index: int, past: Past, answer: bool | None) -> bool | None:
    """The schedule's logic, with ``answer`` for its threshold."""
    if isinstance(schedule, Threshold):
        return answer
    if isinstance(schedule, And):
        values = [naive(part, index, past, answer) for part in schedule.parts]
        return False if any(v is False for v in values) else None if any(v is None for v in values) else True
    if isinstance(schedule, Or):
        values = [naive(part, index, past, answer) for part in schedule.parts]
        return True if any(v is True for v in values) else None if any(v is None for v in values) else False
    if isinstance(schedule, Not):
        return {True: False, False: True, None: None}[naive(schedule.part, index, past, answer)]
    if isinstance(schedule, Refresh):
        at = schedule.at
        shifted = index % at if schedule.repeat else index - at if index >= at else index
        return naive(schedule.schedule, shifted, past, answer)
    return schedule.predicts(Step(index), past)


@settings(max_examples=300)
@given(with_one_threshold() | WITHOUT, st.integers(0, 12), PASTS, st.floats(0, 2))
def test_combinations_against_naive_evaluation(schedule, index, past, distance):
    step, threshold = Step(index), schedule.threshold
    unknown, known = schedule.predicts(step, past), schedule.predicts(step, past, distance)
    answer = None if threshold is None else threshold.predicts(step, past, distance)
    assert unknown is naive(schedule, index, past, None)
    assert known is naive(schedule, index, past, answer)
    assert known in (True, False)
    assert known is (answer if unknown is None else unknown), "undecided means that the threshold decides"


@settings(max_examples=200)
@given(WITHOUT, st.integers(1, 14))
def test_never_predicts_is_never_wrong(schedule, steps):
    """A reason is only given for runs that predict nothing; without it, plain schedules do predict."""
    assert (schedule.never_predicts(steps) is None) == ("0" in plan(schedule, steps))


@given(WITHOUT, WITHOUT, WITHOUT)
def test_values_are_equal_and_hashable(a, b, c):
    assert (a & b) & c == a & (b & c) and hash((a & b) & c) == hash(a & (b & c))
    assert (a | b) | c == a | (b | c)
    assert ~~a == a


def test_refresh_hides_what_was_computed_before_it():
    budget = MagnitudeBudget([1.0], 0.1, 3, 0)
    assert Refresh(budget, at=5).predicts(Step(6), Past((4, 3))) is False
    assert Refresh(budget, at=5).predicts(Step(6), Past((5, 4, 3))) is True


def test_refresh_replays_the_inner_schedule():
    inner = Every(4) & WarmUp(6, interval=2) & MaxSkips(total=5)
    assert plan(Refresh(inner, at=11), 30) == plan(inner, 11) + plan(inner, 19)
    assert plan(Refresh(inner, at=9, repeat=True), 30) == plan(inner, 9) * 3 + plan(inner, 3)
    distances = [0.04 * (i % 5) for i in range(30)]
    refreshed = Refresh(Threshold(0.2, accumulate=True) & WarmUp(3), at=12)
    alone = refreshed.schedule
    assert plan(refreshed, 30, distances) == plan(alone, 12, distances) + plan(alone, 18, distances[12:])
    once, more = Refresh(Always(), at=4), Refresh(Always(), at=4, repeat=True)
    assert [i for i in range(13) if once.refreshes(i)] == [4]
    assert [i for i in range(13) if (more & WarmUp(1)).refreshes(i)] == [4, 8, 12]
    assert [i for i in range(13) if Refresh(more, at=6).refreshes(i)] == [4, 6, 10]


# --- binding, reasons, errors, names


def test_bind():
    assert Final(2).bind(28) == Before(26) and Retention(0.2).bind(28) == WarmUp(6)
    both = (Every(5) & Final(2)) | ~Preset("fast")
    assert both.needs_steps and not both.bind(20).needs_steps and both.bind(20) == both.bind(20).bind(None)
    assert both.bind(20) == (Every(5) & Before(18)) | ~Mask.preset("fast", 20)
    for schedule in (Final(2), Retention(0.1), Preset("slow"), Every(5) & Final(1), ~Final(1)):
        for use in (schedule.bind, schedule.never_predicts, lambda _, s=schedule: s.predicts(Step(1), HISTORY)):
            with pytest.raises(ConfigError, match="needs the number of steps"):
                use(None)
    with pytest.raises(ConfigError, match=r"Final.num_inference_steps: 0 is out of range"):
        Final(2).bind(0)


def test_reasons():
    assert (Every(1) & WarmUp(3)).never_predicts(28) == "every 1 computes each of 28 steps"
    assert (WarmUp(5) & Final(5)).never_predicts(10) == "warm-up 5 & final 5 computes each of 10 steps"
    assert Always().never_predicts(1) == "a run of one step has nothing to predict from"
    assert WarmUp(1000).never_predicts(None) == "warm-up 1000 computes each of the first 1000 steps"
    assert WarmUp(999).never_predicts(None) is None
    assert (Threshold(0.1) & WarmUp(28)).never_predicts(28) == "warm-up 28 computes each of 28 steps"
    assert Refresh(WarmUp(3), at=3, repeat=True).never_predicts(28)


@pytest.mark.parametrize(
    ("make", "where", "what"),
    [
        (lambda: Every(0), "Every.interval", "0 is out of range"),
        (lambda: Every(True), "Every.interval", "expected an int"),
        (lambda: Every(2.0), "Every.interval", "expected an int"),
        (lambda: Every(2, -1), "Every.offset", "-1 is out of range"),
        (lambda: WarmUp(-1), "WarmUp.steps", "out of range"),
        (lambda: WarmUp(3, 0), "WarmUp.interval", "out of range"),
        (lambda: Before(-1), "Before.step", "out of range"),
        (lambda: Final("2"), "Final.steps", "expected an int"),
        (lambda: Retention(1.5), "Retention.ratio", "out of range"),
        (lambda: Retention(True), "Retention.ratio", "expected a finite number"),
        (lambda: Timesteps(800, 100), "Timesteps.low", "empty or reversed"),
        (lambda: Timesteps(100, 100), "Timesteps.low", "empty or reversed"),
        (lambda: Timesteps(math.nan, 1), "Timesteps.low", "expected a number"),
        (lambda: Timesteps(0, "1"), "Timesteps.high", "expected a number"),
        (lambda: Mask([]), "Mask.computed", "expected at least one"),
        (lambda: Mask([1, 2]), "Mask.computed", "2 is out of range"),
        (lambda: Mask([True]), "Mask.computed", "expected an int"),
        (lambda: Mask("101"), "Mask.computed", "expected a list of numbers"),
        (lambda: Mask([1], beyond=1), "Mask.beyond", "expected a bool"),
        (lambda: Mask.bins([1], [1, 1]), "Mask.bins", "cannot alternate"),
        (lambda: Mask.bins([1, 0], [1]), "Mask.bins", "out of range"),
        (lambda: Mask.preset("fats"), "Mask.preset", "there is no preset 'fats'"),
        (lambda: Mask.preset("fast", 0), "Mask.num_inference_steps", "out of range"),
        (lambda: Mask.preset("fast", None), "Mask.num_inference_steps", "expected an int"),
        (lambda: Preset("quick"), "Preset.name", "there is no preset"),
        (lambda: Preset(["fast"]), "Preset.name", "there is no preset"),
        (lambda: MaxSkips(total=-1), "MaxSkips.total", "out of range"),
        (lambda: MaxSkips(consecutive=1.5), "MaxSkips.consecutive", "expected an int"),
        (lambda: MaxSkips(distance=math.nan), "MaxSkips.distance", "expected a finite number"),
        (lambda: Threshold(-0.1), "Threshold.value", "out of range"),
        (lambda: Threshold(math.inf), "Threshold.value", "expected a finite number"),
        (lambda: Threshold(0.1, accumulate=1), "Threshold.accumulate", "expected a bool"),
        (lambda: Threshold(0.1, inclusive="no"), "Threshold.inclusive", "expected a bool"),
        (lambda: Threshold(0.1, coefficients=[1, math.nan]), "Threshold.coefficients", "expected a finite number"),
        (lambda: Threshold(0.1, coefficients=2.0), "Threshold.coefficients", "expected a list of numbers"),
        (lambda: MagnitudeBudget([], 0.1, 3, 2), "MagnitudeBudget.ratios", "expected at least one"),
        (lambda: MagnitudeBudget(["1"], 0.1, 3, 2), "MagnitudeBudget.ratios", "expected a finite number"),
        (lambda: MagnitudeBudget([1.0], -1, 3, 2), "MagnitudeBudget.max_error", "out of range"),
        (lambda: MagnitudeBudget([1.0], 0.1, -1, 2), "MagnitudeBudget.max_consecutive", "out of range"),
        (lambda: MagnitudeBudget([1.0], 0.1, 3, None), "MagnitudeBudget.retention_steps", "expected an int"),
        (lambda: Refresh(Always(), 0), "Refresh.at", "out of range"),
        (lambda: Refresh(Always(), 3, repeat=1), "Refresh.repeat", "expected a bool"),
        (lambda: Refresh(3, 3), "Refresh.schedule", "expected a schedule"),
        (lambda: Refresh(Every(2) & Final(2), 3), "Refresh.schedule", "depends on the length of the run"),
        (lambda: And(()), "And.parts", "no schedule is given"),
        (lambda: Or((Always(), 1)), "Or.parts", "expected a schedule"),
        (lambda: Not(True), "Not.part", "expected a schedule"),
        (lambda: ~Threshold(0.1), "Not.part", "cannot be negated"),
        (lambda: ~(Every(3) & Refresh(Threshold(0.1), 5)), "Not.part", "cannot be negated"),
        (lambda: Threshold(0.1) & Threshold(0.2), "And.parts", "more than one distance threshold"),
        (lambda: (Threshold(0.1) & Every(2)) | Threshold(0.1), "Or.parts", "more than one distance threshold"),
    ],
)
def test_errors(make, where, what):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.where == where and what in caught.value.what
    assert "hint" in str(caught.value) or "expected" in what


def test_only_schedules_combine():
    for combine in (lambda: Always() & True, lambda: Always() | 3):
        with pytest.raises(TypeError):
            combine()
    with pytest.raises(FrozenInstanceError):
        Every(3).interval = 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [
        (Every(5) & WarmUp(3), "every 5 & warm-up 3"),
        (Every(5, 4) & (WarmUp(8, 2) | Final(2)), "every 5 from 4 & (warm-up 8 by 2 | final 2)"),
        (Every(5) & Always() | Before(9), "every 5 & always | before step 9"),
        (~(Every(5) | Always()), "~(every 5 | always)"),
        (Timesteps(100, 800), "100 < timestep < 800"),
        (Mask([1, 0, 0, 1]), "mask 1001"),
        (Mask([1, 0], beyond=False), "mask 10, then predicted"),
        (Mask.preset("fast", 100), "mask of 100 steps, 39 computed"),
        (Preset("fast"), "preset fast"),
        (Retention(0.2), "retention 0.2"),
        (MaxSkips(10, 3, 0.4), "skips at most 10 in all, 3 in a row, 0.4 of distance"),
        (MaxSkips(), "skips without a cap"),
        (Threshold(0.12), "distance < 0.12"),
        (Threshold(0.3, True, True, (1, 2)), "sum of p(distance) <= 0.3"),
        (MagnitudeBudget([1.0], 0.06, 3, 6), "magnitude error <= 0.06, 3 in a row at most, from step 6"),
        (Refresh(Every(5) & WarmUp(3), 10), "refresh at 10 (every 5 & warm-up 3)"),
        (Refresh(Every(5), 10, repeat=True), "refresh every 10 (every 5)"),
    ],
)
def test_names(schedule, shown):
    assert str(schedule) == shown
