"""Random models, settings and ways of calling, always equal to the methods by definition (``reference.py``)."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Broadcast, Reference, TaylorSeer, twin
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from zoo import ALL, relative_error

import cachepass
from cachepass.run.step import StepCall
from cachepass.testing import count_compiles

WIDTH = 4


class Attention(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.style == "softmax":
            return self.out(torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v)
        return self.out(scaled_dot_product_attention(q, k, v))


class FeedForward(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.up, self.down, self.in_place = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH), in_place

    def forward(self, x):
        x = self.up(x)
        x = x.mul_(0.5).relu_() if self.in_place else torch.relu(x * 0.5)
        return self.down(x)


class Block(nn.Module):
    """``layout``: pre- or post-norm, parallel, or without a residual; ``returns``: a tensor, a tuple or a dict."""

    def __init__(self, layout: str, returns: str, style: str, in_place: bool) -> None:
        super().__init__()
        self.layout, self.returns = layout, returns
        self.norm, self.attn, self.ff = nn.LayerNorm(WIDTH), Attention(style), FeedForward(in_place)
        self.in_place, self.broken = in_place, False

    def forward(self, x, shift):
        if self.layout == "post":
            x = self.norm(x + self.attn(x) * shift)
        elif self.layout == "parallel":
            y = self.norm(x)
            x = x + self.attn(y) * shift + self.ff(y)
        elif self.layout == "bare":
            x = self.attn(x) * shift
        else:
            x = x + self.attn(self.norm(x)) * shift
        if self.broken:
            torch._dynamo.graph_break()
        if self.layout != "parallel":
            if self.in_place:
                x = x.clone()
                x += self.ff(x)
            else:
                x = x + self.ff(x)
        return {"tensor": x, "tuple": (x, x.mean(-1)), "dict": {"x": x, "mean": x.mean(-1)}}[self.returns]


class Model(nn.Module):
    """Blocks (some of them the same object), with a long skip connection or not, then a projection."""

    def __init__(self, order, layout, returns, style, in_place, skip, seed) -> None:
        super().__init__()
        torch.manual_seed(seed)
        made = [Block(layout, returns, style, in_place) for _ in range(max(order) + 1)]
        self.blocks, self.skip = nn.ModuleList([made[i] for i in order]), skip
        self.proj_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, timestep):
        shift = torch.cos(timestep / 500)[:, None, None] + 1
        first = None
        for block in self.blocks:
            result = block(x, shift)
            x = result["x"] + result["mean"][..., None] if isinstance(result, dict) else result
            x = x[0] - x[1][..., None] if isinstance(x, tuple) else x
            first = x if first is None else first
        return self.proj_out(x + first if self.skip else x)


models = st.builds(
    Model,
    st.sampled_from([(0,), (0, 1), (0, 1, 2), (0, 0), (0, 1, 0), (0, 0, 1)]),
    st.sampled_from(["pre", "post", "parallel", "bare"]),
    st.sampled_from(["tensor", "tuple", "dict"]),
    st.sampled_from(["sdpa", "softmax"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
)

taylorseers = st.builds(
    TaylorSeer, st.integers(2, 4), st.integers(1, 3), st.integers(0, 3), st.one_of(st.none(), st.integers(6, 8))
)
broadcasts = st.builds(Broadcast, st.integers(2, 4), st.sampled_from([-1.0, 150.0]), st.sampled_from([700.0, 1001.0]))

# What happens next: a step (context, tokens), one that fails before it is repeated, or an explicit end of the run.
steps = st.tuples(
    st.sampled_from(["step", "step", "step", "step", "fail"]),
    st.sampled_from(["a", "a", "a", "b"]),
    st.sampled_from([3, 3, 3, 4]),
)
sequences = st.lists(st.one_of(steps, steps, steps, st.just(("reset",))), min_size=8, max_size=22)


def cut_paths(model, kind):
    """The modules of a kind by the names that a compiler sees: a shared one by its first."""
    leaf = {"attention": ".attn", "mlp": ".ff", "block": ""}
    named = {
        f"blocks.{i}{leaf[k]}": block.get_submodule(leaf[k][1:]) for k in kind for i, block in enumerate(model.blocks)
    }
    first: dict[int, str] = {}
    for path, module in named.items():
        first.setdefault(id(module), path)
    return list(first.values())


def config_of(method, kinds):
    if isinstance(method, TaylorSeer):
        return {
            "method": "taylorseer",
            "cache_interval": method.interval,
            "disable_cache_before_step": method.before,
            "disable_cache_after_step": method.after,
            "max_order": method.order,
            "taylor_factors_dtype": None,
            "cache_identifiers": list(kinds),
        }
    bounds = (method.low, method.high)
    config = {"method": "pab"}
    for kind, name in (("attention", "spatial_attention"), ("mlp", "mlp")):
        if kind in kinds:
            config |= {f"{name}_block_skip_range": method.skip_range, f"{name}_timestep_skip_range": bounds}
            config |= {f"{name}_block_identifiers": ["blocks"]}
    return config


@contextlib.contextmanager
def failing(after: int):
    """The ``after``-th program of a call runs, and raises."""
    run, count = StepCall.run, [0]

    def broken(self, inputs):
        result = run(self, inputs)
        count[0] += 1
        if count[0] > after:
            raise RuntimeError("injected")
        return result

    StepCall.run = broken
    try:
        yield
    finally:
        StepCall.run = run


def compile_as(way, model, options):
    """Whole; each block by itself; or with a graph break inside of every block."""
    if way == "blocks":
        for block in dict.fromkeys(model.blocks):
            block.compile(backend="cached_inductor", options=options)
        return model
    if way == "breaks":
        for block in model.blocks:
            block.broken = True
    return torch.compile(model, backend="cached_inductor", fullgraph=way == "whole", options=options)


def timesteps(context, tokens):
    """Falling, from a start that is the context's; a new run when they are used up."""
    values = [900.0 - 60 * i - (5 if context == "b" else 0) - tokens for i in range(14)]
    while True:
        yield from values


@pytest.mark.parametrize("way", ["whole", "blocks", "breaks"])
@settings(
    max_examples=30 if ALL else 5,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    model=models,
    method=st.one_of(taylorseers, broadcasts),
    sequence=sequences,
    kinds=st.sampled_from([("attention",), ("mlp",), ("attention", "mlp"), ("block",)]),
    fails=st.integers(0, 2),
)
def test_equal_to_the_definition(way, model, method, sequence, kinds, fails):
    if kinds == ("block",) and (isinstance(method, Broadcast) or way == "breaks"):
        kinds = ("attention",)  # PAB has no blocks; a block with a break inside cannot be cut as a whole
    model = model.eval().requires_grad_(False)
    reference = Reference(twin(model), method, cut_paths(model, kinds))
    options = {"cache": config_of(method, kinds), "lowering": "eager"}
    clocks = {}
    with warnings.catch_warnings(), count_compiles() as counts:
        warnings.simplefilter("ignore", cachepass.CachepassWarning)  # a range that no step of the sequence meets
        compiled = compile_as(way, model, options)
        for number, (what, *where) in enumerate(sequence):
            if what == "reset":
                cachepass.reset(compiled)
                reference.reset()
                clocks.clear()
                continue
            context, tokens = where
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(2, tokens, WIDTH, generator=generator)
            timestep = torch.full((2,), next(clocks.setdefault((context, tokens), timesteps(context, tokens))))
            with cachepass.cache_context(context):
                result = None
                if what == "fail" and number > 0:  # (the end of the first call cannot be seen)
                    with contextlib.suppress(RuntimeError), failing(fails):
                        result = compiled(x, timestep)  # it succeeds if it runs fewer programs than that
                if result is None:
                    result = compiled(x, timestep)
            assert relative_error(result, reference(context, x, timestep)) < 1e-4, (number, what, where)
    assert counts.graph_breaks == 0 or way == "breaks"
