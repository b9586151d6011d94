"""The unit of timesteps is told by the first one of a run, alike for every method that reads them."""

from __future__ import annotations

import pytest
import torch
from small_models import calls, transformer

import cachepass
from cachepass import PyramidAttentionBroadcastConfig, SeaCacheConfig
from cachepass.run.clock import scale_of

STEPS = 10
PAB = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)
SEA = SeaCacheConfig(threshold=0.6)


def run(cache, times, **options):
    options = {"cache": cache, "lowering": "eager", "num_inference_steps": STEPS, **options}
    torch._dynamo.reset()
    model = torch.compile(transformer(), backend="cached_inductor", fullgraph=True, options=options)
    outputs = [model(x, time) for (x, _), time in zip(calls(STEPS), times, strict=True)]
    return torch.stack(outputs), cachepass.summary(model)


def falling(first, dtype=torch.float32):
    return [torch.full((2,), first * (1 - step / STEPS), dtype=dtype) for step in range(STEPS)]


@pytest.mark.parametrize("cache", [PAB, SEA], ids=["pab", "sea_cache"])
def test_from_1_to_0(cache):
    given, expected = run(cache, falling(1.0), timestep_scale=1000), run(cache, falling(1.0))
    assert torch.equal(given[0], expected[0])
    assert given[1].last_runs == expected[1].last_runs and sum(expected[1].predicted.values()) > 0


@pytest.mark.parametrize("times", [falling(1000.0), falling(1000, torch.int64)], ids=["floats", "ints"])
def test_from_1000_to_0(times):
    given, expected = run(PAB, times, timestep_scale=1), run(PAB, times)
    assert torch.equal(given[0], expected[0]) and sum(expected[1].predicted.values()) > 0


def test_a_run_that_begins_at_0_ascends_in_the_unit_of_its_second_step():
    times = [torch.full((2,), step / STEPS) for step in range(STEPS)]
    assert run(PAB, times)[1].last_runs == run(PAB, times, timestep_scale=1000)[1].last_runs


def test_the_unit_stays():
    """Whatever comes later: here steps that go on below 1."""
    model = transformer()
    options = {"cache": PAB, "lowering": "eager"}
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
    for first in (1000.0, 1.0):
        for (x, _), time in zip(calls(STEPS), falling(first), strict=True):
            compiled(x, time)
    marks = cachepass.summary(compiled).last_runs["default"]["spatial"]
    assert "." in marks[:STEPS] and set(marks[STEPS:]) == {"#"}  # 1 to 0.1 of 1000


@pytest.mark.parametrize(("timestep", "scale"), [(1.0, 1000.0), (0.3, 1000.0), (1, 1.0), (1.5, 1.0), (0.0, None)])
def test_what_the_first_timestep_tells(timestep, scale):
    assert scale_of(timestep) == scale


def test_explain_takes_the_same_unit():
    x, _ = calls(1)[0]
    plan = cachepass.explain(transformer(), x, torch.ones(2), cache=PAB)
    by_thousand, by_one = (plan.timeline(timesteps=[first * (1 - s / 9) for s in range(9)]) for first in (1000, 1))
    assert [str(lane) for lane in by_thousand] == [str(lane) for lane in by_one]


# ---- many configs on one model --------------------------------------------------------------------------------------


def test_a_model_is_compiled_anew_as_often_as_one_likes():
    model, (x, time) = transformer(), calls(1)[0]
    for interval in range(2, 14):
        cache = cachepass.TaylorSeerCacheConfig(cache_interval=interval)
        compiled = cachepass.recompile(model, cache, lowering="eager")
        compiled(x, time)
        found = cachepass.summary(compiled)
        assert found.config == cache.label and found.others == () and found.steps == 1


def test_recompile_drops_nothing_where_the_config_is_wrong():
    model, (x, time) = transformer(), calls(1)[0]
    compiled = cachepass.recompile(model, "taylorseer", lowering="eager")
    compiled(x, time)
    with pytest.raises(cachepass.OptionError):
        cachepass.recompile(compiled, "taylorser")
    assert cachepass.summary(model).steps == 1
