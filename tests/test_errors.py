"""Bad input gets a clear error, of its own class, before anything is compiled."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from small_models import calls, transformer
from torch import nn

import cachepass
from cachepass import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

PAB = {"method": "pab", "spatial_attention_block_skip_range": 2}


def call(cache, model=None, **options):
    model = model if model is not None else transformer()
    options = {"cache": cache, "lowering": "eager", **options}
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
    return compiled(*calls(1)[0])


@pytest.mark.parametrize(("make", "where", "says"), [
    (lambda: TaylorSeerCacheConfig(cache_intervl=3), "TaylorSeerCacheConfig", "did you mean 'cache_interval'"),
    (lambda: TaylorSeerCacheConfig(cache_interval=0), "cache_interval", "allowed: >= 1"),
    (lambda: TaylorSeerCacheConfig(cache_interval=2.5), "cache_interval", "expected an int"),
    (lambda: TaylorSeerCacheConfig(cache_interval=True), "cache_interval", "expected an int"),
    (lambda: TaylorSeerCacheConfig(max_order=-1), "max_order", "allowed: 0 to 4"),
    (lambda: TaylorSeerCacheConfig(max_order=5), "max_order", "allowed: 0 to 4"),
    (lambda: TaylorSeerCacheConfig(disable_cache_before_step=-1), "disable_cache_before_step", ">= 0"),
    (lambda: TaylorSeerCacheConfig(disable_cache_after_step=2), "disable_cache_after_step", "no step is left"),
    (lambda: TaylorSeerCacheConfig(taylor_factors_dtype=torch.int8), "taylor_factors_dtype", "floating-point"),
    (lambda: TaylorSeerCacheConfig(taylor_factors_dtype="float33"), "taylor_factors_dtype", "floating-point"),
    (lambda: TaylorSeerCacheConfig(cache_identifiers="attn"), "cache_identifiers", "list of regex strings"),
    (lambda: TaylorSeerCacheConfig(cache_identifiers=["a("]), "cache_identifiers", "is not a regex"),
    (lambda: TaylorSeerCacheConfig(use_lite_mode=1), "use_lite_mode", "expected a bool"),
    (lambda: PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=0), "spatial_attention", ">= 1"),
    (lambda: PyramidAttentionBroadcastConfig(cross_attention_timestep_skip_range=(800, 100)), "cross", "reversed"),
    (lambda: PyramidAttentionBroadcastConfig(mlp_timestep_skip_range=(5, 5)), "mlp_timestep", "empty"),
    (lambda: PyramidAttentionBroadcastConfig(temporal_attention_timestep_skip_range=3), "temporal", "two numbers"),
    (lambda: PyramidAttentionBroadcastConfig(spatial_attention_block_identifiers=None), "spatial", "list of regex"),
    (lambda: PyramidAttentionBroadcastConfig(current_timestep_callback=5), "current_timestep", "function"),
])  # fmt: skip
def test_config_fields(make, where, says):
    with pytest.raises(cachepass.ConfigError, match=re.escape(says)) as caught:
        make()
    assert where in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("cache", "options", "says"), [
    ("taylorser", {}, "did you mean 'taylorseer'"),
    ({"cache_interval": 3}, {}, 'needs the key "method"'),
    ({"method": "magic"}, {}, "there is no method 'magic'"),
    (7, {}, "cannot be read as a cache config"),
    ("taylorseer", {"lowerin": "eager"}, "did you mean 'lowering'"),
    ("taylorseer", {"max_autotun": True}, "did you mean 'max_autotune'"),
    ("taylorseer", {"mode": "max-autotun"}, "did you mean 'max-autotune'"),
    ("taylorseer", {"lowering": "fast"}, "there is no lowering 'fast'"),
    ("taylorseer", {"num_inference_steps": 0}, "expected an int >= 1"),
    ("taylorseer", {"timestep_input": 3}, "expected the name of a model input"),
    ("taylorseer", {"timestep_scale": -1}, "positive number"),
])  # fmt: skip
def test_options(cache, options, says):
    with pytest.raises(cachepass.OptionError, match=re.escape(says)):
        call(cache, **options)


def test_dict_fields_are_checked_like_keywords():
    with pytest.raises(cachepass.ConfigError, match="did you mean 'max_order'"):
        call({"method": "taylorseer", "max_ordre": 1})


@pytest.mark.parametrize("cache", [
    {"method": "taylorseer", "cache_identifiers": ["blocks.*attn", "blok.*"]},
    {"method": "taylorseer", "skip_predict_identifiers": ["nothing"]},
    {**PAB, "spatial_attention_block_identifiers": ["nothing"]},
    {"method": "pab", "temporal_attention_block_skip_range": 2},
    {"method": "pab", "cross_attention_block_skip_range": 2},
])  # fmt: skip
def test_patterns_that_match_nothing_list_the_candidates(cache):
    with pytest.raises(cachepass.NoMatchError, match="matches no module that the model calls") as caught:
        call(cache)
    if "cross" not in str(caught.value):
        assert "blocks.0.attn" in str(caught.value)


def test_a_kind_that_the_model_lacks_warns_beside_one_it_has():
    with pytest.warns(cachepass.CachepassWarning, match="cross_attention_block_skip_range has no effect"):
        call({**PAB, "cross_attention_block_skip_range": 2})


def test_a_timestep_that_cannot_be_found_lists_the_inputs():
    class Nameless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformer()

        def forward(self, x, noise_level):
            return self.inner(x, noise_level)

    model = Nameless().eval()
    with pytest.raises(cachepass.TimestepError, match="inputs: x, noise_level"):
        call(PAB, model)
    with pytest.raises(cachepass.TimestepError, match="no tensor input 'level'"):
        call(PAB, model, timestep_input="level")
    call(PAB, model, timestep_input="noise_level")
    call({**PAB, "current_timestep_callback": lambda: 500.0}, model)
    with pytest.warns(cachepass.CachepassWarning, match="the end of a run cannot be seen"):
        call("taylorseer", model)
    call("taylorseer", model, num_inference_steps=20)


def test_training_mode():
    with pytest.raises(cachepass.TrainingError, match=r"call model.eval\(\)"):
        call("taylorseer", transformer().train())


def test_gradients():
    with torch.enable_grad(), pytest.raises(cachepass.TrainingError, match="no_grad"):
        call("taylorseer", transformer().requires_grad_(True))


def test_bad_input_leaves_state_alone():
    """An error in one call does not touch the history of the runs before it."""
    model = transformer()
    options = {"cache": "taylorseer", "lowering": "eager"}
    good = torch.compile(model, backend="cached_inductor", options=options)
    expected = [good(*c) for c in calls(9)]
    steps = calls(9)
    again = [good(*c) for c in steps[:5]]
    with pytest.raises(cachepass.OptionError):
        call("nothing", model)
    with pytest.raises(Exception):  # noqa: B017, PT011 (a wrong shape: torch's own error)
        good(torch.randn(2, 4, 5), steps[5][1])
    again += [good(*c) for c in steps[5:]]
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_summary_of_a_model_that_was_not_compiled():
    with pytest.raises(cachepass.NotCompiledError, match="cached_inductor"):
        cachepass.summary(transformer())
    with pytest.raises(TypeError, match="expected a module"):
        cachepass.summary("model")
    cachepass.reset(transformer())


def test_context_names():
    with pytest.raises(TypeError, match="takes a name"), cachepass.cache_context(""):
        pass


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_without_a_cache_it_is_plain_inductor_and_says_so():
    model = torch.compile(transformer(), backend="cached_inductor")
    methods = "Methods: .*fastercache.*invariant.*pab.*taylorseer"  # and what other tests have registered
    with pytest.warns(cachepass.CachepassWarning, match=f"nothing is cached.*{methods}"):
        result = model(*calls(1)[0])
    torch.testing.assert_close(result, transformer()(*calls(1)[0]))


@pytest.mark.parametrize(("cache", "options", "says"), [
    ({"method": "taylorseer", "cache_interval": 1}, {}, "cache_interval=1 computes every step"),
    ({"method": "taylorseer", "disable_cache_before_step": 30}, {"num_inference_steps": 20}, "num_inference_steps=20"),
    ({**PAB, "spatial_attention_block_skip_range": 1}, {}, "every skip range is 1"),
])  # fmt: skip
def test_a_schedule_that_cannot_fire_warns_at_once(cache, options, says):
    with pytest.warns(cachepass.CachepassWarning, match=says):
        call(cache, **options)


def test_a_cache_that_never_fires_in_a_run_warns_once():
    cache = {**PAB, "spatial_attention_timestep_skip_range": (0, 1)}
    options = {"cache": cache, "lowering": "eager", "num_inference_steps": 5}
    model = torch.compile(transformer(), backend="cached_inductor", options=options)
    with pytest.warns(cachepass.CachepassWarning, match=r"never fired in a run of 5 steps.*620 to 900") as caught:
        for step in calls(5):
            model(*step)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", cachepass.CachepassWarning)
        for step in calls(5):
            model(*step)
    assert cachepass.summary(model).predicted.get("spatial", 0) == 0


def test_lite_mode_without_proj_out_and_with_patterns():
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = transformer().blocks

        def forward(self, x, timestep):
            for block in self.blocks:
                x = block(x, timestep)
            return x

    with pytest.warns(cachepass.CachepassWarning, match="matches no module of this model"):
        call({"method": "taylorseer", "use_lite_mode": True}, Headless().eval())
    with pytest.warns(cachepass.CachepassWarning, match="overrides cache_identifiers"):
        call({"method": "taylorseer", "use_lite_mode": True, "cache_identifiers": ["blocks.*attn"]})


def test_pab_without_any_range_warns_and_uses_spatial_two():
    with pytest.warns(cachepass.CachepassWarning, match="spatial_attention_block_skip_range=2"):
        call("pab")


# ---- parts of models -------------------------------------------------------------------------------------------------


def by_blocks(cache, **options):
    """A model whose blocks are compiled one by one."""
    model = transformer()
    for block in model.blocks:
        block.compile(backend="cached_inductor", options={"cache": cache, "lowering": "eager", **options})
    return model


def test_blocks_that_share_a_graph_are_cut_alike():
    x, t = calls(1)[0]
    mixed = {"method": "taylorseer", "cache_identifiers": [r"blocks\.0\.(attn|ff)", r"blocks\.1\.attn"]}
    with pytest.raises(cachepass.ConfigError, match=r"blocks.1 is cut in some .*not in blocks.1.ff"):
        by_blocks(mixed)(x, t)
    kinds = {
        **PAB,
        "spatial_attention_block_identifiers": [r"blocks\.0"],
        "temporal_attention_block_skip_range": 3,
        "temporal_attention_block_identifiers": [r"blocks\.1"],
    }
    with pytest.raises(cachepass.ConfigError, match=r"of blocks\.1 differ in group or forecast") as caught:
        by_blocks(kinds)(x, t)
    assert "cut alike" in str(caught.value)


def test_whole_blocks_may_be_left_out():
    model = by_blocks({"method": "taylorseer", "cache_identifiers": [r"blocks\.1\.attn"]})
    for step in calls(9):
        model(*step)
    summary = cachepass.summary(model)
    assert summary.modules == ("blocks.1.attn",)
    assert summary.cache_bytes == 2 * calls(1)[0][0].numel() * 2  # two outputs of one block, in bfloat16
    assert summary.predicted == {"taylorseer": 5}


def test_lite_mode_needs_proj_out_in_a_compiled_graph():
    model, steps = by_blocks({"method": "taylorseer", "use_lite_mode": True}), calls(2)
    model(*steps[0])
    with pytest.raises(cachepass.NoMatchError, match="proj_out, which is in no compiled graph"):
        model(*steps[1])


def test_identifiers_that_match_in_no_part():
    model, steps = by_blocks({"method": "taylorseer", "cache_identifiers": ["layers.*"]}), calls(2)
    model(*steps[0])
    with pytest.raises(cachepass.NoMatchError, match=r"candidates: blocks\.0\.attn, blocks\.1\.attn"):
        model(*steps[1])
    with pytest.raises(cachepass.NoMatchError, match="matches no module that the model calls"):
        cachepass.summary(model)


def test_a_block_that_is_called_outside_of_its_model_is_computed():
    model = by_blocks("taylorseer")
    x, t = calls(1)[0]
    model(x, t)
    cachepass.reset(model)  # the first call is over
    expected = transformer().blocks[0](x, t)
    with pytest.warns(cachepass.CachepassWarning, match="called outside of a call of Transformer") as caught:
        for _ in range(3):
            torch.testing.assert_close(model.blocks[0](x, t), expected)
    assert len(caught) == 1


# ---- what is no transformer ------------------------------------------------------------------------------------------


def test_a_function_of_tensors():
    compiled = torch.compile(
        lambda x, timestep: x * timestep, backend="cached_inductor", options={"cache": "taylorseer"}
    )
    with pytest.raises(cachepass.NoMatchError, match="no module call that can be cached"):
        compiled(torch.ones(2), torch.ones(2))


def test_explain_of_nothing_and_of_an_unknown_phase():
    with pytest.raises(cachepass.CachepassError, match="runs no tensor operation"):
        cachepass.explain(lambda: 1, cache="taylorseer")
    explanation = cachepass.explain(transformer(), *calls(1)[0], cache="taylorseer")
    with pytest.raises(cachepass.CachepassError, match="there is no phase 'forecast'") as caught:
        explanation.graph("forecast")
    assert "predict" in str(caught.value)


class Latent(nn.Module):
    """``[batch, channels, height, width]`` through the small transformer."""

    def __init__(self):
        super().__init__()
        self.inner = transformer()
        self.register_buffer("pair", torch.ones(1))

    def forward(self, hidden_states, timestep):
        return self.inner(hidden_states.flatten(2), timestep).view_as(hidden_states)


def guided(model, **fields):
    cache = {"method": "fastercache", "tensor_format": "BCHW", **fields}
    return torch.compile(model.eval(), backend="cached_inductor", options={"cache": cache, "lowering": "eager"})


LATENT = {"hidden_states": torch.ones(4, 4, 2, 4), "timestep": torch.full((4,), 500.0)}


def test_guidance_of_a_model_that_returns_no_image():
    class Classes(Latent):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states, timestep).argmax(-1)

    with (
        pytest.raises(cachepass.OutputError, match="returns no floating-point tensor"),
        cachepass.cache_context("cond"),
    ):
        guided(Classes())(**LATENT)


def test_guidance_of_a_model_with_other_inputs_at_half_batch():
    class Depends(Latent):
        def forward(self, hidden_states, timestep):
            y = super().forward(hidden_states, timestep)
            return y * self.pair if hidden_states.shape[0] == 2 else y

    with pytest.raises(cachepass.BatchError, match="the half-batch graph has it, the full one has not"):
        guided(Depends())(**LATENT)


def test_guidance_with_a_number_that_cannot_be_an_input(monkeypatch):
    from cachepass import _torch

    class Number(Latent):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states, torch.full((hidden_states.shape[0],), timestep))

    restart, asked = _torch.restart_dynamic, []
    monkeypatch.setattr(_torch, "restart_dynamic", lambda *a: asked.append(a) or (len(asked) == 1 and restart(*a)))
    with pytest.raises(cachepass.BatchError, match="a number that changes from call to call is a constant at half"):
        guided(Number())(LATENT["hidden_states"], 500.0)


def test_guidance_where_sizes_stay_symbolic(monkeypatch):
    from cachepass import _torch

    monkeypatch.setattr(_torch, "restart_static", lambda _: False)
    model = torch.compile(
        Latent().eval(),
        backend="cached_inductor",
        dynamic=True,
        options={"cache": {"method": "fastercache", "tensor_format": "BCHW"}, "lowering": "eager"},
    )
    with pytest.raises(cachepass.BatchError, match="symbolic sizes"):
        model(**LATENT)


def test_a_callback_of_modules_where_a_function_was_compiled():
    models = [Latent().eval()]
    cache = {"method": "fastercache", "is_guidance_distilled": True, "attention_weight_callback": lambda _: 0.3}
    compiled = torch.compile(
        lambda hidden_states, timestep: models[0](hidden_states, timestep),
        backend="cached_inductor",
        options={"lowering": "eager", "cache": cache},
    )
    for step in range(3):
        compiled(LATENT["hidden_states"], torch.full((4,), 500.0 - step))
    with pytest.raises(cachepass.ConfigError, match="takes a module, and what was compiled is not one"):
        compiled(LATENT["hidden_states"], torch.full((4,), 490.0))
