"""State, clock, contexts, failures, threads: what happens around the programs (eager lowering, small models)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import math
import threading
import weakref

import pytest
import torch
from small_models import calls, transformer
from zoo import relative_error

import cachepass
from cachepass import TaylorSeerCacheConfig, cache_context
from cachepass.program import plan
from cachepass.program.roles import Next
from cachepass.recipe.vocabulary import WHOLE, Route
from cachepass.run.clock import Clock
from cachepass.testing import count_compiles

TAYLOR = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=None)
PAB = {"method": "pab", "spatial_attention_block_skip_range": 3}


def compiled(model, cache=TAYLOR, **options):
    options = {"lowering": "eager", "cache": cache, **options}
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)


def run(model, steps=9, **kwargs):
    return [model(x, t, **kwargs) for x, t in calls(steps)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [TAYLOR, PAB])
def test_a_rising_timestep_starts_a_new_run(cache):
    model = compiled(transformer(), cache)
    assert_same(run(model), run(model))
    assert cachepass.summary(model).runs == 2


def test_reset_starts_a_new_run_in_the_middle():
    model = compiled(transformer())
    first = run(model, 9)
    run(model, 5)
    cachepass.reset(model)
    assert_same(run(model, 9), first)
    assert cachepass.summary(model).runs == 3


def test_reset_takes_the_original_module_or_nothing():
    original = transformer()
    model = compiled(original, num_inference_steps=100)
    first = run(model)
    cachepass.reset(original)
    assert_same(run(model), first)
    cachepass.reset()
    assert_same(run(model), first)
    assert cachepass.summary(original).runs == cachepass.summary(model).runs == 3


def test_num_inference_steps_ends_a_run_without_a_timestep():
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformer()

        def forward(self, x):
            return self.inner(x, torch.full(x.shape[:1], 500.0))

    model = compiled(Blind().eval(), num_inference_steps=9)
    first = [model(x) for x, _ in calls(9)]
    assert_same([model(x) for x, _ in calls(9)], first)
    assert cachepass.summary(model).predicted == {"taylorseer": 10}


def test_num_inference_steps_and_a_timestep_that_stands_still():
    """Steps of one run and images of a model of one step look alike: computed, and said."""
    original = transformer()
    model = compiled(original, num_inference_steps=9)
    constant = [(x, torch.full_like(t, 500.0)) for x, t in calls(9)]
    with pytest.warns(cachepass.CachepassWarning, match="more than 8 times at the timestep 500: .*cache_context"):
        results = [model(*call) for call in constant]
    for result, call in zip(results, constant, strict=True):
        torch.testing.assert_close(result, original(*call))
    results = []
    for call, (_, t) in zip(constant, calls(9), strict=True):
        with cache_context("told", timestep=float(t[0])):
            results.append(model(*call))
    assert cachepass.summary(model).predicted == {"taylorseer": 5}


def test_ascending_timesteps_are_one_run():
    """Two rises in a row: the model's time runs upwards; a fall then ends the run."""
    model = compiled(transformer())
    for _ in range(2):
        for x, t in calls(12):
            model(x, 1000.0 - t)
    summary = cachepass.summary(model)
    assert summary.predicted["taylorseer"] >= 10
    assert summary.runs <= 4


def test_clock():
    clock = Clock()
    for timestep in (900.0, 600.0, 300.0):
        assert not clock.starts_run(timestep)
        clock.commit(timestep)
    assert clock.index == 3
    assert clock.seen == (300.0, 900.0)
    assert clock.starts_run(900.0)
    assert not clock.starts_run(300.0)  # the same step again, as in two calls per step
    counted = Clock(num_inference_steps=2)
    counted.commit(10.0)
    assert counted.starts_run(900.0)  # whichever comes first
    assert not counted.starts_run(5.0)
    counted.commit(9.0)
    assert counted.starts_run(5.0)


# ---- contexts, instances, threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [TAYLOR, PAB])
def test_interleaved_contexts_equal_two_models(cache):
    shared = compiled(transformer(), cache)
    alone = {name: compiled(transformer(), cache) for name in ("cond", "uncond")}
    for _ in range(2):
        for x, t in calls(9):
            for name, value in (("cond", x), ("uncond", -2 * x)):
                with cache_context(name):
                    together = shared(value, t)
                assert_same([together], [alone[name](value, t)])
    summary = cachepass.summary(shared)
    assert set(summary.contexts) == {"cond", "uncond"}
    assert summary.runs == 4
    assert summary.cache_bytes == 2 * summary.planned_bytes


def test_one_graph_serves_instances_with_a_state_each():
    """Dynamo may call one graph with the parameters of several modules: blocks compiled one by one."""

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = torch.nn.ModuleList([transformer(seed=s) for s in (1, 2)])

        def forward(self, x, timestep):
            for stage in self.stages:
                x = stage(x, timestep)
            return x

    outer, reference = Outer(), Outer()
    for stage in outer.stages:
        stage.compile(backend="cached_inductor", options={"cache": TAYLOR, "lowering": "eager"})
    separate = [compiled(stage) for stage in reference.stages]
    with count_compiles() as counts:
        for x, t in calls(9):
            expected = separate[1](separate[0](x, t), t)
            torch.testing.assert_close(outer(x, t), expected)
    assert counts.graph_breaks == 0
    for stage in outer.stages:
        assert cachepass.summary(stage).predicted == {"taylorseer": 5}


def test_deepcopy_has_its_own_state():
    original = transformer()
    model = compiled(original)
    first = run(model)
    twin = compiled(copy.deepcopy(original))
    run(model, 4)
    assert_same(run(twin), first)


def test_same_context_in_two_threads_raises_and_separate_contexts_work():
    model = compiled(transformer())
    expected = run(model)
    cachepass.reset(model)
    results, failures = {}, []

    def work(name):
        try:
            with torch.no_grad(), cache_context(name):
                results[name] = run(model)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"user-{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for result in results.values():
        assert_same(result, expected)

    with _run(model).exclusively(), pytest.raises(cachepass.ConcurrencyError, match="cache_context"):
        run(model, 1)


def _dispatcher(model):
    from cachepass.run.live import programs_of

    return next(programs_of(model))[0]


def _run(model, context="default"):
    from cachepass.run.live import programs_of

    return next(programs_of(model))[1].model.latest(context)


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [TAYLOR, PAB])
@pytest.mark.parametrize("lowering", ["eager", "cond"])
@pytest.mark.parametrize("failing", [1, 3, 4])
@pytest.mark.covering(strength=2)
def test_a_failed_step_leaves_the_next_one_right(cache, lowering, failing):
    """A step runs, its slots are damaged and it raises; repeated, it and all later ones are right."""
    model = compiled(transformer(), cache, lowering=lowering)
    expected = run(model)
    cachepass.reset(model)
    results = []
    for step, (x, t) in enumerate(calls(9)):
        if step == failing:
            with failing_program(_dispatcher(model).program), pytest.raises(RuntimeError, match="injected"):
                model(x, t)
        results.append(model(x, t))
    assert_same(results, expected)
    assert cachepass.summary(model).steps == 18


@contextlib.contextmanager
def failing_program(program):
    """Every variant runs, fills the slots that it may write with nan, and raises."""
    whole = dict(program._by_phase)

    def failing(lowered):
        def run(inputs):
            roles = dict(zip(map(id, inputs[len(program.full.inputs) :]), lowered.inputs, strict=True))
            slots = [x for x in inputs if id(x) in roles and isinstance(roles[id(x)], Next)]
            lowered.run(inputs)
            for slot in slots:
                slot.fill_(math.nan)
            raise RuntimeError("injected")

        return dataclasses.replace(lowered, run=run)

    program._by_phase = {phase: failing(lowered) for phase, lowered in whole.items()}
    try:
        yield
    finally:
        program._by_phase = whole


def test_after_a_failed_step_the_schedule_may_move_on():
    """PAB keeps one output; a failed computation destroys it, so a step that would reuse it is computed instead."""
    model = compiled(transformer(), {"method": "pab", "spatial_attention_block_skip_range": 5})
    steps = calls(9)
    for x, t in steps[:2]:
        model(x, t)
    with failing_program(_dispatcher(model).program), pytest.raises(RuntimeError, match="injected"):
        model(steps[2][0], torch.full((2,), 801.0))
    reference = transformer()(*steps[3])
    torch.testing.assert_close(model(*steps[3]), reference, rtol=1e-5, atol=1e-6)


def test_a_graph_that_the_caller_captures_is_refused(monkeypatch):
    """It would repeat one step for ever. Where nothing is on CUDA, nobody asks."""
    model, asked = compiled(transformer()), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(asked.append(None)) or len(asked) == 2)
    expected = run(model, 3)
    assert not asked
    cachepass.reset(model)
    monkeypatch.setattr(_dispatcher(model).program, "on_cuda", True)
    (x, timestep), *rest = calls(3)
    results = [model(x, timestep)]
    with pytest.raises(cachepass.CaptureError, match="would repeat this one step"):
        model(*rest[0])
    assert_same(results + [model(*call) for call in rest], expected)  # the refused call is no step


def test_routes_have_programs_up_to_their_decisions():
    model = compiled(transformer(), cachepass.FirstBlockCacheConfig(threshold=0.1))
    run(model, 2)
    program, other = _dispatcher(model).program, Route("other")
    decisions = [program.compile_decision(route) for route in (WHOLE, other, WHOLE)]
    assert [lowered.name for lowered in decisions] == ["decide", "other/decide", "decide"]
    assert decisions[0] is decisions[2] and set(program.variants) >= {"decide", "other/decide"}


def test_nan_of_a_diverged_run_does_not_reach_the_next():
    model = compiled(transformer())
    expected = run(model)
    for x, t in calls(6):
        model(x * math.nan, t)
    cachepass.reset(model)
    assert_same(run(model), expected)


def test_outputs_are_the_callers():
    """A predicted output is not a slot's memory: later steps do not change it."""
    model = compiled(
        transformer(),
        {
            "method": "taylorseer",
            "cache_identifiers": ["proj_out"],
            "max_order": 0,
            "taylor_factors_dtype": None,
            "cache_interval": 3,
            "disable_cache_before_step": 1,
        },
    )
    outputs = run(model)
    frozen = [output.clone() for output in outputs]
    for output in outputs:
        output.fill_(7.0)
    run(model)
    again = run(model)
    assert_same(again, frozen)


# ---- memory and shapes ----------------------------------------------------------------------------------------------


def test_a_new_shape_starts_a_fresh_state():
    model = compiled(transformer())
    small, large = calls(9), calls(9, batch=3)
    expected_small = [model(*call) for call in small]
    cachepass.reset(model)
    expected_large = [model(*call) for call in large]
    cachepass.reset(model)
    torch._dynamo.reset()
    fresh = compiled(transformer())
    mixed = [fresh(*call) for call in small[:5]] + [fresh(*call) for call in large]
    for a, b in zip(mixed, expected_small[:5] + expected_large, strict=True):
        assert relative_error(a, b) < 1e-6


def test_dynamic_shapes_share_one_graph():
    options = {"cache": TAYLOR, "lowering": "eager"}
    model = torch.compile(transformer(), backend="cached_inductor", fullgraph=True, dynamic=True, options=options)
    with count_compiles() as counts:
        results = [[model(*call) for call in calls(9, batch=b)] for b in (2, 3, 5)]
    assert counts.graphs == 1
    for batch, result in zip((2, 3, 5), results, strict=True):
        torch._dynamo.reset()
        static = compiled(transformer())
        for a, b in zip(result, [static(*call) for call in calls(9, batch=batch)], strict=True):
            assert relative_error(a, b) < 1e-6


def test_a_new_batch_size_in_the_middle_of_a_run_never_meets_the_old_history():
    options = {"cache": TAYLOR, "lowering": "eager", "num_inference_steps": 9}
    model = torch.compile(transformer(), backend="cached_inductor", fullgraph=True, dynamic=True, options=options)
    for call in calls(5):  # the next step would be predicted
        model(*call)
    larger = calls(9, batch=3)
    results = [model(*call) for call in larger]
    torch._dynamo.reset()
    fresh = compiled(transformer())
    for result, call in zip(results, larger, strict=True):
        assert relative_error(result, fresh(*call)) < 1e-6


def test_inference_mode_and_no_grad_share_state():
    model = compiled(transformer())
    expected = run(model)
    cachepass.reset(model)
    with torch.inference_mode():
        first = run(model, 9)
    for a, b in zip(first, expected, strict=True):
        assert relative_error(a, b) < 1e-6


def test_models_that_share_all_parameters_have_states_of_their_own_which_die_with_them():
    first, alone = compiled(transformer()), run(compiled(transformer()))
    original = first._orig_mod
    second = copy.deepcopy(original, {id(p): p for p in original.parameters()})
    other = compiled(second)
    pairs = [(first(x, t), other(x, t)) for x, t in calls(9)]
    assert_same([a for a, _ in pairs], alone)
    assert_same([b for _, b in pairs], alone)
    dispatcher = _dispatcher(first)
    assert dispatcher is _dispatcher(other)
    assert len(dispatcher.instances) == 2
    del second, other
    gc.collect()
    assert len(dispatcher.instances) == 1


def test_models_and_slots_are_freed():
    original = transformer()
    model = compiled(original)
    run(model)
    slot = weakref.ref(next(iter(_run(model).states.values())).rings[0][0])
    parameter = weakref.ref(original.proj_out.weight)
    dispatcher = weakref.ref(_dispatcher(model))
    twin = compiled(original)
    run(twin)
    torch._dynamo.reset()
    assert dispatcher() is None  # at once: a summary after a reset counts nothing twice
    assert slot() is None
    del original, model, twin
    gc.collect()
    assert parameter() is None


@pytest.mark.parametrize(("cache", "steps", "expected"), [
    (TAYLOR, 9, {"taylorseer": 5}),
    (PAB, 9, {"spatial": 5}),
    ({"method": "pab", "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (400, 700)},
     9, {"spatial": 3}),
    ({"method": "pab", "mlp_block_skip_range": 2}, 9, {"mlp": 3}),
])  # fmt: skip
def test_summary_counts(cache, steps, expected):
    model = compiled(transformer(), cache)
    run(model, steps)
    summary = cachepass.summary(model)
    assert summary.predicted == expected
    assert summary.computed == {group: steps - count for group, count in expected.items()}
    assert summary.steps == steps
    assert summary.runs == 1
    assert set(summary.variants) == {"compute", "predict"}
    assert next(iter(expected)) in str(summary)


@pytest.mark.parametrize("order", [1, 2])
def test_dead_slots_change_memory_and_not_a_bit_of_the_outputs(order, monkeypatch):
    """A chain of blocks keeps the last one's history; kept for all of them, every output is the same."""
    cache = {
        "method": "taylorseer",
        "max_order": order,
        "cache_interval": 3,
        "disable_cache_before_step": 2,
        "taylor_factors_dtype": None,
        "cache_identifiers": [r"blocks\.\d+"],
    }
    results, sizes = [], []
    for dead in (False, True):
        if dead:
            monkeypatch.setattr(plan, "live_markers", lambda _graph, group_of, _groups: set(group_of))
        torch._dynamo.reset()
        model = torch.compile(
            transformer(depth=6),
            backend="cached_inductor",
            fullgraph=True,
            options={"cache": cache, "lowering": "eager", "num_inference_steps": 9},
        )
        results.append([model(*call) for call in calls(9)])
        sizes.append(cachepass.summary(model).cache_bytes)
    assert sizes[1] == 6 * sizes[0]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
