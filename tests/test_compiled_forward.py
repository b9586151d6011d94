"""A module's ``forward`` compiled by itself, and called from the module's call: one clock for all of its graphs.

``enable_cache`` does so, below whatever hooks offloading has put around it (eager lowering).
"""

from __future__ import annotations

import types

import pytest
import torch
import zoo
from small_models import calls
from test_calling import CACHES, Block, ByHand, Denoiser, Net, check, fired, net, settings
from zoo import relative_error, sweep_over

import cachepass
from cachepass.integrations.diffusers import enable_cache

# ---- small models ---------------------------------------------------------------------------------------------------


class BreakBetween(Net):
    def between(self, x):
        torch._dynamo.graph_break()
        return x


class BreakBehind(Net):
    def after(self, x):
        torch._dynamo.graph_break()
        return x


class BreakInBlocks(Net):
    class block(Block):
        def forward(self, x, temb):
            x = x + self.attn(self.norm(x)) * self.scale(temb)[:, None]
            torch._dynamo.graph_break()
            return x + self.ff(x)


def own_forward(model, cache):
    model.forward = torch.compile(model.forward, **settings(cache))


def forward_of_the_class(model, cache):
    model.forward = types.MethodType(torch.compile(type(model).forward, **settings(cache)), model)


def below_a_wrapper(model, cache):
    """As hooks do: the module's own ``forward`` has no trace of what is compiled."""
    compiled = torch.compile(type(model).forward, **settings(cache))
    model.forward = lambda *args, **kwargs: compiled(model, *args, **kwargs)


def enabled(model, cache):
    enable_cache(model, cache, fullgraph=False, lowering="eager")


WAYS = pytest.mark.parametrize("way", [own_forward, forward_of_the_class, below_a_wrapper, enabled])


def assert_two_runs(model, expected, original, cache):
    for _ in range(2):
        check(model, expected)
    summary = cachepass.summary(original)
    assert summary.predicted == fired(cache, 2)
    assert (summary.runs, summary.steps) == (2, 18)


@WAYS
@CACHES
@pytest.mark.parametrize("kind", [Net, BreakBetween, BreakBehind, BreakInBlocks])
@pytest.mark.covering(strength=2)
def test_a_forward_that_is_compiled(kind, cache, way):
    model = net(kind)
    way(model, cache)
    assert_two_runs(model, ByHand(net(kind), cache), model, cache)


@WAYS
def test_forwards_of_blocks(way):
    """One graph for all blocks, in steps of the model that is around them."""
    cache = {"method": "pab", "spatial_attention_block_skip_range": 2}
    model = net()
    for block in model.blocks:
        way(block, cache)
    assert_two_runs(model, ByHand(net(), cache), model, cache)


@WAYS
@pytest.mark.parametrize("kind", [Net, BreakBetween])
@pytest.mark.covering
def test_a_forward_in_a_wrapper(kind, way):
    """The wrapper's noise level is no timestep: the steps are those of the model inside."""
    cache = {"method": "pab", "spatial_attention_block_skip_range": 2}
    model, expected = net(kind), ByHand(net(kind), cache)
    way(model, cache)
    denoiser, by_hand = Denoiser(model), Denoiser(expected)
    for _ in range(2):
        expected.restart()
        for x, t in calls(9):
            assert relative_error(denoiser(x, t / 1000), by_hand(x, t / 1000)) < 1e-5
    summary = cachepass.summary(model)
    assert (summary.predicted, summary.runs, summary.steps) == (fired(cache, 2), 2, 18)


def test_a_compiled_method_of_a_sampler_is_no_forward():
    """A step that is compiled and called in a call of its own module: the model is in it, not around it."""

    class Sampler(torch.nn.Module):
        def __init__(self, model, **compile_options):
            super().__init__()
            self.model = model
            self.compiled = torch.compile(self.step, **compile_options) if compile_options else self.step

        def step(self, x, timestep):
            return self.model(x, timestep)

        def forward(self, run):
            return [self.compiled(x, t) for x, t in run]

    cache = {"method": "pab", "spatial_attention_block_skip_range": 2}
    expected = ByHand(net(), cache)
    sampler, by_hand = Sampler(net(), **settings(cache)), Sampler(expected)
    for _ in range(2):
        expected.restart()
        for result, other in zip(sampler.eval()(calls(9)), by_hand(calls(9)), strict=True):
            assert relative_error(result, other) < 1e-5


# ---- diffusers ------------------------------------------------------------------------------------------------------

FIELDS = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32,
          "cache_identifiers": [r".*\.(attn\d?|self_attn|attention)"]}  # fmt: skip
BROKEN = ("HunyuanVideo15Transformer3DModel", "HiDreamImageTransformer2DModel", "Lumina2Transformer2DModel",
          "OmniGenTransformer2DModel")  # fmt: skip
OFFLOADED = ("FluxTransformer2DModel", "PixArtTransformer2DModel", "LTXVideoTransformer3DModel")


@pytest.mark.parametrize(("name", "offload"), sweep_over(
    [*((name, False) for name in BROKEN), *((name, True) for name in OFFLOADED), (BROKEN[0], True)],
    few=[(BROKEN[0], True), (BROKEN[2], False), (OFFLOADED[0], True)],
))  # fmt: skip
def test_enable_cache_where_the_graph_breaks(name, offload):
    """By itself, or at the hooks of block-level group offloading."""
    model, oracle = zoo.build(name), zoo.taylorseer_oracle(name, **FIELDS)
    if offload:
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=1)
    enable_cache(
        model,
        {"method": "taylorseer", **FIELDS},
        fullgraph=False,
        lowering="eager",
        timestep_scale=zoo.timestep_scale(name),
    )
    for run in range(2):
        for step, (_, call) in enumerate(zoo.trajectory(name, 9)):
            error = relative_error(zoo.first_tensor(model(**call)), oracle(**call))
            assert error < 1e-5, f"run {run}, step {step}: {error:.1e}"
        oracle.reset()
    summary = cachepass.summary(model)
    assert summary.predicted == {"taylorseer": 10}
    assert (summary.runs, summary.steps) == (2, 18)
