"""What ``summary`` says of runs: FLOPs and warnings. Counts, bytes and compile seconds have tests where they arise."""

from __future__ import annotations

import pytest
import torch
from small_models import calls, transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cachepass
from cachepass.inspect.tables import human_flops

CACHE = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 1}
TOKENS, WIDTH, BATCH = 4, 8, 2
ATTENTION = 2 * 2 * BATCH * TOKENS * TOKENS * WIDTH  # scores and values, a multiply-add counted as two


def linear(inputs: int, outputs: int) -> int:
    return 2 * BATCH * TOKENS * inputs * outputs


REST = 2 * (linear(WIDTH, 2 * WIDTH) + linear(2 * WIDTH, WIDTH)) + linear(WIDTH, WIDTH)  # feed-forwards, proj_out
ATTENTIONS = 2 * (linear(WIDTH, WIDTH) + linear(WIDTH, 2 * WIDTH) + ATTENTION + linear(WIDTH, WIDTH))


def run(model, steps=5, **options):
    torch._dynamo.reset()
    options = {"cache": CACHE, "lowering": "eager", "num_inference_steps": steps} | options
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
    for call in calls(steps):
        compiled(*call)
    return compiled


def test_flops_of_computed_and_predicted_steps():
    """Of five steps 0 and 2 are computed."""
    found = cachepass.summary(run(transformer()))
    assert (found.computed["taylorseer"], found.predicted["taylorseer"]) == (2, 3)
    assert found.plain_flops == 5 * (REST + ATTENTIONS)
    assert found.flops == 5 * REST + 2 * ATTENTIONS
    assert found.saved == pytest.approx(3 * ATTENTIONS / (5 * (REST + ATTENTIONS)))
    assert f"{100 * found.saved:.0f} % saved" in str(found)


def test_plain_flops_are_what_torch_counts():
    model = transformer()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*calls(1)[0])
    assert cachepass.summary(run(model)).plain_flops == 5 * counter.get_total_flops()


def test_what_is_computed_once_counts_once_per_run():
    model, text = transformer(cross=True), torch.ones(BATCH, TOKENS, WIDTH)
    torch._dynamo.reset()
    options = {"cache": "invariant", "lowering": "eager", "num_inference_steps": 5}
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
    for _ in range(2):
        for x, timestep in calls(5):
            compiled(x, timestep, text)
    found, keys_and_values = cachepass.summary(compiled), 2 * linear(WIDTH, 2 * WIDTH)
    assert found.plain_flops - found.flops == (2 * 5 - 2) * keys_and_values


def test_warm_up_is_not_counted():
    compiled = torch.compile(
        transformer(),
        backend="cached_inductor",
        fullgraph=True,
        options={"cache": CACHE, "lowering": "eager", "num_inference_steps": 5},
    )
    found = cachepass.warmup(compiled, *calls(1)[0], progress=False)
    assert (found.flops, found.plain_flops, found.saved) == (0, 0, 0)


def test_warnings_are_kept():
    with pytest.warns(cachepass.CachepassWarning):
        compiled = run(
            transformer(),
            cache={
                "method": "pab",
                "spatial_attention_block_skip_range": 2,
                "spatial_attention_timestep_skip_range": (0, 1),
                "temporal_attention_block_skip_range": 2,
            },
        )
    found = cachepass.summary(compiled)
    assert [message.split(":")[0] for message in found.warnings] == [
        "PyramidAttentionBroadcastConfig.temporal_attention_block_skip_range has no effect",
        "the cache never fired in a run of 5 steps",
    ]
    assert all(f"warning: {message}\n" in str(found) for message in found.warnings)


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 FLOP"), (999, "999 FLOP"), (1500, "1.5 kFLOP"), (2.5e9, "2.5 GFLOP"), (3e15, "3000.0 TFLOP"),
])  # fmt: skip
def test_human_flops(count, text):
    assert human_flops(count) == text


def test_contexts_are_told_apart():
    """Two contexts of one model, the second one with a run more; the last run of each is shown step by step."""
    torch._dynamo.reset()
    options = {"cache": CACHE, "lowering": "eager", "num_inference_steps": 5}
    compiled = torch.compile(transformer(), backend="cached_inductor", fullgraph=True, options=options)
    for context, runs in (("cond", 1), ("uncond", 2)):
        with cachepass.cache_context(context):
            for _ in range(runs):
                for call in calls(5):
                    compiled(*call)
    with cachepass.cache_context("uncond"):
        compiled(*calls(1)[0])
    found = cachepass.summary(compiled)
    assert found.by_context == {"cond": {"taylorseer": (2, 3)}, "uncond": {"taylorseer": (4 + 1, 6)}}
    assert (found.computed, found.predicted) == ({"taylorseer": 7}, {"taylorseer": 9})
    assert found.last_runs == {"cond": {"taylorseer": "#.#.."}, "uncond": {"taylorseer": "#"}}
    rows = [line.split() for line in str(found).splitlines()]
    assert ["cond", "taylorseer", "2", "3", "60", "%", "#.#.."] in rows


# ---- several configs on one module ----------------------------------------------------------------------------------


PAB = {"method": "pab", "spatial_attention_block_skip_range": 2}


def compiled_with(model, cache):
    return torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": cache, "lowering": "eager"}
    )


def test_each_compiled_config_has_figures_of_its_own():
    torch._dynamo.reset()
    model = transformer()
    taylorseer, pab = compiled_with(model, CACHE), compiled_with(model, PAB)
    for call in calls(5):
        taylorseer(*call)
    for call in calls(3):
        pab(*call)
    one, other = cachepass.summary(taylorseer), cachepass.summary(pab)
    assert (one.steps, other.steps) == (5, 3)
    assert (set(one.computed), set(other.computed)) == ({"taylorseer"}, {"spatial"})
    assert (one.cache_bytes, other.cache_bytes) == (one.planned_bytes, other.planned_bytes)
    assert (
        one.config == "taylorseer(cache_interval=3, disable_cache_before_step=1)"
        and other.config == "pab(spatial_attention_block_skip_range=2)"
    )
    assert (one.others, other.others) == ((other.config,), (one.config,))
    assert "compiled as well: pab(" in str(one)
    assert cachepass.summary(model) == other  # which was called last
    taylorseer(*calls(6)[5])
    assert cachepass.summary(model).config == one.config


def test_after_an_error_nothing_is_said_of_the_config_before():
    torch._dynamo.reset()
    model = transformer()
    compiled_with(model, CACHE)(*calls(1)[0])
    wrong = compiled_with(model, {**CACHE, "cache_identifiers": ["nothing"]})
    with pytest.raises(cachepass.NoMatchError):
        wrong(*calls(1)[0])
    with pytest.raises(cachepass.NotCompiledError):
        cachepass.summary(wrong)


def test_modules_that_are_compiled_in_place():
    torch._dynamo.reset()
    model = transformer()
    compiled_with(model, CACHE)(*calls(1)[0])
    model.compile(backend="cached_inductor", options={"cache": PAB, "lowering": "eager"})
    model(*calls(1)[0])
    compiled_with(model, CACHE)(*calls(2)[1])
    assert cachepass.summary(model).config.startswith("pab")


def test_a_recipe_is_called_by_its_groups():
    found = cachepass.summary(run(transformer(), cache=cachepass.TaylorSeerCacheConfig().recipe(5)))
    assert found.config == "recipe(taylorseer)"
