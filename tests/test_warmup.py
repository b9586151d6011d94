"""Warm-up: all that a run can need is compiled before it, and nothing else happens."""

from __future__ import annotations

import pytest
import torch
from small_models import calls, transformer

import cachepass
from cachepass.run.live import programs_of
from cachepass.testing import count_compiles

TAYLOR = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": None}
PAB = {"method": "pab", "spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 3,
       "spatial_attention_timestep_skip_range": (100, 800),
       "cross_attention_timestep_skip_range": (100, 400)}  # fmt: skip
CONTEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


def compiled(model, cache, **options):
    torch._dynamo.reset()
    return torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": cache, "lowering": "eager", **options}
    )


def run(model, steps=9):
    return [model(*call, CONTEXT) for call in calls(steps)]


@pytest.mark.parametrize(("cache", "options", "timesteps", "variants"), [
    (TAYLOR, {}, None, {"compute", "predict"}),
    (TAYLOR, {"num_inference_steps": 2}, None, None),
    (TAYLOR, {"num_inference_steps": 9}, None, {"compute", "predict"}),
    (PAB, {}, None, {"compute", "predict", "predict:spatial", "predict:cross"}),
    (PAB, {}, [float(call[1][0]) for call in calls(9)], {"compute", "predict:spatial", "predict:cross"}),
])  # fmt: skip
def test_what_a_run_can_reach_is_compiled(cache, options, timesteps, variants):
    if variants is None:
        with pytest.warns(cachepass.CachepassWarning, match="never fires"):
            summary = cachepass.warmup(
                compiled(transformer(cross=True), cache, **options), *calls(1)[0], CONTEXT, progress=False
            )
        assert summary.variants == {}
        return
    model = compiled(transformer(cross=True), cache, **options)
    summary = cachepass.warmup(model, *calls(1)[0], CONTEXT, timesteps=timesteps, progress=False)
    assert set(summary.variants) == variants | {"once"}
    run(model)
    assert set(cachepass.summary(model).variants) == set(summary.variants)


def test_it_leaves_no_trace():
    model = compiled(transformer(cross=True), TAYLOR)
    expected = run(model)
    for again in (1, 2):
        cachepass.reset(model)
        summary = cachepass.warmup(model, *calls(1)[0], CONTEXT, progress=False)
        assert (summary.runs, summary.steps, summary.contexts) == (again, 9 * again, ("default",))
        assert all("warmup" not in run.context for _, instance in programs_of(model) for run in instance.model.runs)
        torch.testing.assert_close(run(model), expected, rtol=0, atol=0)


def test_in_the_middle_of_a_run_it_does_not_disturb_it():
    model = compiled(transformer(cross=True), TAYLOR)
    expected = run(model)
    cachepass.reset(model)
    results = []
    for step, call in enumerate(calls(9)):
        if step == 4:
            cachepass.warmup(model, *calls(1)[0], CONTEXT, progress=False)
        results.append(model(*call, CONTEXT))
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_nothing_is_captured_anew_afterwards():
    model = compiled(transformer(cross=True), TAYLOR)
    with count_compiles() as counts:
        cachepass.warmup(model, *calls(1)[0], CONTEXT, progress=False)
        run(model)
    assert (counts.graphs, counts.recompiles) == (1, 0)


def test_blocks_compiled_one_by_one():
    model = transformer(cross=True)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="cached_inductor", options={"cache": TAYLOR, "lowering": "eager"})
    summary = cachepass.warmup(model, *calls(1)[0], CONTEXT, progress=False)
    assert set(summary.variants) == {"compute", "predict"} and summary.steps == 0
    run(model)
    assert cachepass.summary(model).steps == 9


@pytest.mark.parametrize("two_calls", [False, True])
def test_guidance(two_calls):
    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformer()

        def forward(self, hidden_states, timestep):
            return self.inner(hidden_states.flatten(2), timestep).view_as(hidden_states)

    faster = {
        "method": "fastercache",
        "tensor_format": "BCHW",
        "spatial_attention_block_skip_range": 2,
        "unconditional_batch_skip_range": 3,
    }
    model = compiled(Image().eval().requires_grad_(False), faster)
    x, t = torch.randn(4, 4, 2, 4), torch.full((4,), 500.0)
    if two_calls:
        for context in ("cond", "uncond"):
            with cachepass.cache_context(context):
                summary = cachepass.warmup(model, x, t, progress=False)
        assert {name.split("/")[0] for name in summary.variants} >= {"cond", "uncond", "answer"}
    else:
        summary = cachepass.warmup(model, x, t, timesteps=[900.0 - 40 * s for s in range(20)], progress=False)
        assert {"both", "half", "half/predict"} <= set(summary.variants)
    assert summary.steps == 0


def test_a_model_that_is_not_ours_is_refused():
    with pytest.raises(cachepass.NotCompiledError):
        cachepass.warmup(torch.compile(transformer(), backend="eager"), *calls(1)[0], progress=False)


@pytest.mark.inductor
def test_kernels_are_there_when_it_ends():
    model = compiled(transformer(cross=True), TAYLOR, lowering="specialize")
    expected = compiled(transformer(cross=True), TAYLOR)
    reference = run(expected)
    torch._dynamo.reset()
    cachepass.warmup(model, *calls(1)[0], CONTEXT)
    for result, value in zip(run(model), reference, strict=True):
        torch.testing.assert_close(result, value, atol=1e-5, rtol=1e-5)
    assert set(cachepass.summary(model).variants) == {"once", "compute", "predict"}
