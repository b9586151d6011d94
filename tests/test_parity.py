"""Equal to diffusers' own hooks, step by step over two runs, on every model of the zoo (eager lowering).

The hooks are the oracle: fp32, 1e-5 relative (seen: 3e-7). Modules are compared too: cuts where they hook.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from zoo import (
    ZOO,
    build,
    first_tensor,
    pab_oracle,
    relative_error,
    taylorseer_oracle,
    timestep_scale,
    trajectory,
)

import cachepass
from cachepass.inspect.summary import programs_of

STEPS = 9
SCHEDULE = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
SUBMODULES = [r".*\.(attn\d?|attention|ff|ffn|feed_forward|ff_context)"]
BLOCKS = [r"[^.]*(blocks|layers)\.\d+"]


def cut_regions(compiled) -> set[str]:
    """Paths of the modules that a compiled model cuts."""
    dispatcher = next(programs_of(compiled))[0]
    assert dispatcher.program is not None
    return {cut.region.split("@")[0] for cut in dispatcher.program.plan.cuts}


def assert_parity(name, make_oracle, cache, *, tolerance=1e-5, now=None, dtype=torch.float32, **options):
    """Two runs, step by step. ``make_oracle`` gets the paths of the modules that are cut."""
    compiled = torch.compile(
        build(name).to(dtype), backend="cached_inductor", fullgraph=True,
        options={"cache": cache, "lowering": "eager", "num_inference_steps": STEPS, **options},
    )  # fmt: skip
    oracle = None
    for run in range(2):
        for step, (timestep, call) in enumerate(trajectory(name, STEPS, dtype)):
            if now is not None:
                now[0] = timestep
            result = first_tensor(compiled(**call))
            if oracle is None:
                oracle = make_oracle(cut_regions(compiled))
                oracle.model.to(dtype)
            error = relative_error(result, oracle(**call))
            assert error < tolerance, f"run {run}, step {step}: {error:.1e}"
        assert oracle is not None
        oracle.reset()
    summary = cachepass.summary(compiled)
    assert sum(summary.predicted.values()) > 0
    assert summary.runs == 2
    assert summary.cache_bytes == summary.planned_bytes


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ZOO)
def test_taylorseer_default_identifiers(name, order):
    """Where diffusers' default patterns match nothing, the attentions found by what they do are the oracle's list."""
    fields = {**SCHEDULE, "max_order": order}

    def make_oracle(cut):
        oracle = taylorseer_oracle(name, **fields)
        if not oracle.hooked():
            return taylorseer_oracle(name, **fields, cache_identifiers=[re.escape(path) for path in sorted(cut)])
        assert set(oracle.hooked()) == cut
        return oracle

    assert_parity(name, make_oracle, {"method": "taylorseer", **fields})


@pytest.mark.parametrize("name", ZOO)
def test_taylorseer_custom_identifiers(name):
    fields = {**SCHEDULE, "cache_identifiers": SUBMODULES, "max_order": 2}
    assert_parity(name, lambda _: taylorseer_oracle(name, **fields), {"method": "taylorseer", **fields})


@pytest.mark.parametrize("name", ZOO)
def test_taylorseer_lite(name):
    fields = {**SCHEDULE, "use_lite_mode": True}
    cache = {"method": "taylorseer", **fields}
    with warnings.catch_warnings():  # models without proj_out: the warning has a test of its own
        warnings.simplefilter("ignore", cachepass.CachepassWarning)
        if name.startswith("ZImage"):  # neither proj_out nor a block by diffusers' patterns: its hooks do nothing
            assert not taylorseer_oracle(name, **fields).hooked()
            with pytest.raises(cachepass.NoMatchError, match="proj_out"):
                assert_parity(name, None, cache)
            return
        if name.startswith("SD3"):  # diffusers' hook fails on the last block, which returns None beside a tensor;
            # the forecast of proj_out does not depend on what the blocks return, so this is the same function
            oracle = taylorseer_oracle(name, **SCHEDULE, cache_identifiers=["proj_out"])
        else:
            oracle = taylorseer_oracle(name, **fields)
        assert_parity(name, lambda _: oracle, cache)


# diffusers gives these cross-attentions no flag, so its hooks take them for spatial ones.
UNFLAGGED_CROSS = {"LTXVideoTransformer3DModel"}


@pytest.mark.parametrize("name", ZOO)
def test_pab(name):
    spatial, cross = (3, 3) if name in UNFLAGGED_CROSS else (2, 3)
    fields = {"spatial_attention_block_skip_range": spatial, "cross_attention_block_skip_range": cross,
              "temporal_attention_block_skip_range": 4}  # fmt: skip
    now = [0.0]

    def make_oracle(cut):
        oracle = pab_oracle(name, now, **fields)
        assert set(oracle.hooked()) == cut
        return oracle

    with warnings.catch_warnings():  # kinds that the model does not have
        warnings.simplefilter("ignore", cachepass.CachepassWarning)
        assert_parity(name, make_oracle, {"method": "pab", **fields}, now=now, timestep_scale=timestep_scale(name))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel"])
@pytest.mark.parametrize("method", ["taylorseer", "pab"])
def test_bf16(name, method):
    """bf16 rounds at 2**-8; predictions are summed in fp32 here and in bf16 there: 3e-2 relative."""
    now = [0.0]
    if method == "pab":
        fields = {"spatial_attention_block_skip_range": 2}
        oracle = pab_oracle(name, now, **fields)
    else:
        fields = {**SCHEDULE, "taylor_factors_dtype": torch.bfloat16, "cache_identifiers": SUBMODULES}
        oracle = taylorseer_oracle(name, **fields)
    cache = {"method": method, **fields}
    assert_parity(name, lambda _: oracle, cache, tolerance=3e-2, now=now, dtype=torch.bfloat16,
                  timestep_scale=timestep_scale(name))  # fmt: skip


def test_diffusers_config_objects_are_accepted():
    from diffusers import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

    name, now = "FluxTransformer2DModel", [0.0]
    theirs = TaylorSeerCacheConfig(**SCHEDULE, max_order=1)
    assert_parity(name, lambda _: taylorseer_oracle(name, **SCHEDULE, max_order=1), theirs)
    fields = {"spatial_attention_block_skip_range": 2}
    theirs = PyramidAttentionBroadcastConfig(**fields, current_timestep_callback=lambda: now[0])
    assert_parity(name, lambda _: pab_oracle(name, now, **fields), theirs, now=now)


def test_cooldown_and_uneven_gaps():
    """Warm-up, interval and cool-down give gaps of 1, 2 and 4 steps between computed ones."""
    name = "FluxTransformer2DModel"
    fields = {"cache_interval": 4, "disable_cache_before_step": 1, "disable_cache_after_step": 8, "max_order": 2,
              "taylor_factors_dtype": torch.float32}  # fmt: skip
    assert_parity(name, lambda _: taylorseer_oracle(name, **fields), {"method": "taylorseer", **fields})
