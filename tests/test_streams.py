"""Streams and decisions in the graph: what a residual is compared with, what runs before the host decides.

Five-line modules; goldens as in ``test_passes.py``.
"""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from torch import nn

import cachepass
from cachepass import CacheConfig, FirstBlockCacheConfig
from cachepass.cut import BlockResidual, Blocks
from cachepass.forecast import Linear
from cachepass.program.roles import Carried, Distance, History, Next, ProbeSlot
from cachepass.program.specialize import specialize_rest, up_to_decision
from cachepass.schedule import Every, Threshold
from cachepass.testing import graph_diff

X, T = torch.ones(1, 2, 4), torch.full((1,), 500.0)
OPTIONS = {"num_inference_steps": 20}
WHOLE = CacheConfig(cut=Blocks(), schedule=Every(2))


class Add(nn.Module):
    """A block: it adds its sine to the stream."""

    def forward(self, x):
        return x + torch.sin(x)


class Stack(nn.Module):
    def __init__(self, depth=2, block=Add):
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(depth)])
        self.eval()

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x)
        return x * 2


class Joined(Stack):
    """Text and latents are one stream for the blocks, and cut apart behind them."""

    def forward(self, hidden_states, timestep, text):
        x = torch.cat([text, hidden_states], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, text.shape[1] :] * 2


class Between(nn.Module):
    """Two streams side by side, joined for the last block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Pair()])
        self.single_transformer_blocks = nn.ModuleList([Add()])
        self.eval()

    def forward(self, hidden_states, timestep, text):
        text, x = self.blocks[0](text, hidden_states)
        x = self.single_transformer_blocks[0](torch.cat([text, x], 1))
        return x[:, text.shape[1] :] * 2


class Pair(nn.Module):
    def forward(self, text, x):
        return text + torch.sin(x.mean(1, keepdim=True)), x + torch.cos(text.mean(1, keepdim=True))


class Replace(nn.Module):
    """A block that hands on no sum."""

    def forward(self, x):
        return torch.sin(x)


class Wider(nn.Module):
    """What leaves it is like nothing that enters."""

    def forward(self, x):
        return torch.cat([torch.sin(x), torch.cos(x)], -1)


def bases(model: nn.Module, *inputs: torch.Tensor, cache: object = WHOLE) -> tuple[list[bool], tuple[str, ...]]:
    explanation = cachepass.explain(model, *inputs, cache=cache, options=OPTIONS)
    return [cut.residual for cut in explanation.plan.cuts], explanation.notes


def runs_alike(model: nn.Module, *inputs: torch.Tensor, forecast) -> None:
    """On a predicted step the output is what ``forecast(model, before, now)`` says."""
    compiled = torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": WHOLE, "lowering": "eager", **OPTIONS}
    )
    first, *rest = inputs
    compiled(first, T, *rest)
    torch.testing.assert_close(compiled(first + 1, T, *rest), forecast(first, first + 1))


class Goldens(TestCase):
    maxDiff = None

    def test_the_residual_of_all_blocks_is_added_to_what_enters(self):
        self.assertExpectedInline(
            graph_diff(Stack(), X, T, cache=WHOLE, options=OPTIONS),
            """\
-sin: f32[1, 2, 4] = aten.sin.default(x)
-add: f32[1, 2, 4] = aten.add.Tensor(x, sin)
-sin_1: f32[1, 2, 4] = aten.sin.default(add)
-add_1: f32[1, 2, 4] = aten.add.Tensor(add, sin_1)
-mul: f32[1, 2, 4] = aten.mul.Tensor(add_1, 2)
+history[blocks.0..blocks.1:0][0]: f32[1, 2, 4]
+cached_add: f32[1, 2, 4] = aten.add.Tensor(x, history[blocks.0..blocks.1:0][0])
+mul: f32[1, 2, 4] = aten.mul.Tensor(cached_add, 2)""",
        )

    def test_a_computed_step_keeps_the_difference(self):
        self.assertExpectedInline(
            graph_diff(Stack(), X, T, cache=WHOLE, options=OPTIONS, phase="compute"),
            """\
+history[blocks.0..blocks.1:0][next]: f32[1, 2, 4]
+cached_sub: f32[1, 2, 4] = aten.sub.Tensor(add_1, x)
+cached_copy: f32[1, 2, 4] = aten.copy_.default(history[blocks.0..blocks.1:0][next], cached_sub)""",
        )

    def test_a_decision_is_made_from_the_first_block(self):
        self.assertExpectedInline(
            graph_diff(Stack(), X, T, cache=FirstBlockCacheConfig(), options=OPTIONS),
            """\
+probe[kept]: f32[1, 2, 4]
+history[blocks.1:0][0]: f32[1, 2, 4]
-sin_1: f32[1, 2, 4] = aten.sin.default(add)
-add_1: f32[1, 2, 4] = aten.add.Tensor(add, sin_1)
-mul: f32[1, 2, 4] = aten.mul.Tensor(add_1, 2)
-return (mul)
+cached_sub: f32[1, 2, 4] = aten.sub.Tensor(add, x)
+cached_sub_1: f32[1, 2, 4] = aten.sub.Tensor(cached_sub, probe[kept])
+cached_abs: f32[1, 2, 4] = aten.abs.default(cached_sub_1)
+cached_mean: f32[] = aten.mean.dim(cached_abs, [0, 1, 2])
+cached_abs_1: f32[1, 2, 4] = aten.abs.default(probe[kept])
+cached_mean_1: f32[] = aten.mean.dim(cached_abs_1, [0, 1, 2])
+cached_div: f32[] = aten.div.Tensor(cached_mean, cached_mean_1)
+cached_add: f32[1, 2, 4] = aten.add.Tensor(add, history[blocks.1:0][0])
+mul: f32[1, 2, 4] = aten.mul.Tensor(cached_add, 2)
+return (mul, cached_div)""",
        )

    def test_the_conditional_form_with_the_decision_in_it(self):
        diff = graph_diff(Stack(), X, T, cache=FirstBlockCacheConfig(), options=OPTIONS, phase="canonical")
        self.assertExpectedInline(
            diff,
            """\
+predict[blocks]: b8[]
+probe[kept]: f32[1, 2, 4]
+history[blocks.1:0][0]: f32[1, 2, 4]
+history[blocks.1:0][next]: f32[1, 2, 4]
-sin_1: f32[1, 2, 4] = aten.sin.default(add)
-add_1: f32[1, 2, 4] = aten.add.Tensor(add, sin_1)
-mul: f32[1, 2, 4] = aten.mul.Tensor(add_1, 2)
-return (mul)
+cached_sub: f32[1, 2, 4] = aten.sub.Tensor(add, x)
+cached_sub_1: f32[1, 2, 4] = aten.sub.Tensor(cached_sub, probe[kept])
+cached_abs: f32[1, 2, 4] = aten.abs.default(cached_sub_1)
+cached_mean: f32[] = aten.mean.dim(cached_abs, [0, 1, 2])
+cached_abs_1: f32[1, 2, 4] = aten.abs.default(probe[kept])
+cached_mean_1: f32[] = aten.mean.dim(cached_abs_1, [0, 1, 2])
+cached_div: f32[] = aten.div.Tensor(cached_mean, cached_mean_1)
+cond = cond(predict[blocks]):
+  predict:
+    cached_add: f32[1, 2, 4] = aten.add.Tensor(add, history[blocks.1:0][0])
+    return (cached_add)
+  compute:
+    sin_1: f32[1, 2, 4] = aten.sin.default(add)
+    add_1: f32[1, 2, 4] = aten.add.Tensor(add, sin_1)
+    return (add_1)
+getitem: f32[1, 2, 4] = getitem(cond, 0)
+cached_sub_2: f32[1, 2, 4] = aten.sub.Tensor(getitem, add)
+mul: f32[1, 2, 4] = aten.mul.Tensor(getitem, 2)
+cached_copy: f32[1, 2, 4] = aten.copy_.default(history[blocks.1:0][next], cached_sub_2)
+cached_copy_1: f32[1, 2, 4] = aten.copy_.default(probe[kept], cached_sub)
+return (mul, cached_div)""",
        )


def test_a_stream_is_followed_through_joining_and_cutting_apart():
    text = torch.full((1, 1, 4), 2.0)
    assert bases(Joined(), X, T, text) == ([True], ())
    assert bases(Between(), X, T, text) == ([True], ())
    model = Between()

    def forecast(before, now):
        return model(before, T, text) + 2 * (now - before)

    runs_alike(model, X, text, forecast=forecast)


def test_a_block_that_replaces_the_stream_is_compared_with_what_enters():
    model = Stack(2, Replace)
    assert bases(model, X, T) == ([True], ())
    runs_alike(model, X, forecast=lambda before, now: model(before, T) + 2 * (now - before))


def test_what_is_like_nothing_that_enters_is_forecast_as_it_is_and_said():
    model = Stack(1, Wider)
    residual, notes = bases(model, X, T)
    assert residual == [False] and "like nothing that enters" in " ".join(notes)
    runs_alike(model, X, forecast=lambda before, _: model(before, T))


def test_a_stream_that_is_written_in_place_in_front_of_the_blocks():
    """What enters is the value as it is when the blocks begin."""

    class Padded(Stack):
        def forward(self, x, timestep):
            padded = x.new_zeros(1, 3, 4)
            padded[:, :2] = x
            return super().forward(padded, timestep)

    model = Padded()

    def forecast(before, now):
        return model(before, T) + 2 * torch.nn.functional.pad(now - before, (0, 0, 0, 1))

    runs_alike(model, X, forecast=forecast)


def test_blocks_that_write_into_what_they_are_given_cannot_be_left_out():
    class InPlace(nn.Module):
        def forward(self, x):
            x += torch.sin(x)
            return x

    with pytest.raises(cachepass.NoMatchError, match="no module call"):
        bases(Stack(2, InPlace), X, T)


def program(model: nn.Module, config: object):
    explanation = cachepass.explain(model, X, T, cache=config, options=OPTIONS)
    return explanation.program, explanation.plan


def called(graph) -> list[str]:
    return [node.target.__name__.split(".")[0] for node in graph.nodes if node.op == "call_function"]


def test_what_runs_before_the_decision_does_not_run_again():
    program_, plan = program(Stack(3), FirstBlockCacheConfig())
    before = up_to_decision(program_.canonical(), "decide")
    compute, predict = (specialize_rest(program_.canonical(), plan, phase) for phase in plan.phases)
    assert called(before.gm.graph).count("sin") == 1
    assert called(compute.gm.graph).count("sin") == 2 and called(predict.gm.graph).count("sin") == 0
    assert kinds(before.kept) == [Carried, Carried, Distance]
    # A computed step keeps the probe's value; a predicted one needs the block's output alone.
    assert kinds(predict.inputs) == [History, Carried]
    assert kinds(compute.inputs) == [ProbeSlot, Next, Carried, Carried]


def kinds(roles):
    return [type(role) for role in roles]


def test_a_probe_of_many_blocks_takes_them_before_the_decision():
    config = CacheConfig(cut=Blocks(first=2), schedule=Threshold(0.1), forecast=Linear(), probe=BlockResidual(2))
    program_, plan = program(Stack(3), config)
    assert called(up_to_decision(program_.canonical(), "decide").gm.graph).count("sin") == 2
    assert plan.probe is not None and plan.probe.residual
    slots = plan.cache_bytes // (X.numel() * 4)
    assert slots == 3  # two of the forecast, one of the probe
