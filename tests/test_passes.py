"""Goldens: what each method does to a graph in each phase, as the unified diff from the plain graph.

Five-line modules; a negative case beside each positive one. `EXPECTTEST_ACCEPT=1 pytest tests/test_passes.py` rewrites
the goldens in place: read the diff before committing it.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from expecttest import TestCase
from small_models import Attention, FeedForward, calls, transformer
from torch import nn

import cachepass
from cachepass.testing import assert_graph_diff, graph_diff

X = torch.ones(1, 2, 4)
T = torch.full((1,), 500.0)
TAYLOR = {"method": "taylorseer", "max_order": 1, "taylor_factors_dtype": None}
COUNT = {"num_inference_steps": 20}
FASTER = {"method": "fastercache", "tensor_format": "BCHW", "spatial_attention_block_skip_range": None}
GUIDED = (X.view(1, 1, 2, 4).repeat(4, 1, 1, 1), T.repeat(4))


class Gate(nn.Module):
    """Stands for an attention: one multiplication."""

    def forward(self, x):
        return x * 3


class Residual(nn.Module):
    """x + gate(sin(x)) * timestep: what feeds only the gate goes with it."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, x, timestep):
        return x + self.gate(torch.sin(x)) * timestep


class Chain(nn.Module):
    """gate(gate(x)): behind a predicted second gate, the first one is dead."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Gate(), Gate()

    def forward(self, x, timestep):
        return self.second(self.first(torch.sin(x)))


class Guided(nn.Module):
    """An image model: ``[2B, 1, 2, 4]``, timestep ``[2B]``."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, hidden_states, timestep):
        return hidden_states + self.gate(torch.sin(hidden_states)) * timestep.view(-1, 1, 1, 1)


class Goldens(TestCase):
    def check(self, model, cache, phase, expected, options=COUNT, inputs=(X, T)):
        with torch.no_grad():
            diff = graph_diff(model.eval(), *inputs, cache=cache, phase=phase, options=options)
        self.assertExpectedInline("\n" + diff + "\n", expected, skip=1)

    def test_taylorseer_compute(self):
        self.check(
            Residual(),
            {**TAYLOR, "cache_identifiers": ["gate"]},
            "compute",
            """\

+history[gate:0][next]: f32[1, 2, 4]
+cached_copy: f32[1, 2, 4] = aten.copy_.default(history[gate:0][next], mul)
""",
        )

    def test_taylorseer_predict(self):
        self.check(
            Residual(),
            {**TAYLOR, "cache_identifiers": ["gate"]},
            "predict",
            """\

-sin: f32[1, 2, 4] = aten.sin.default(x)
-mul: f32[1, 2, 4] = aten.mul.Tensor(sin, 3)
-mul_1: f32[1, 2, 4] = aten.mul.Tensor(mul, timestep)
+weights[taylorseer]: f32[2]
+history[gate:0][0]: f32[1, 2, 4]
+history[gate:0][1]: f32[1, 2, 4]
+cached_select: f32[] = aten.select.int(weights[taylorseer], 0, 0)
+cached_mul: f32[1, 2, 4] = aten.mul.Tensor(history[gate:0][0], cached_select)
+cached_select_1: f32[] = aten.select.int(weights[taylorseer], 0, 1)
+cached_mul_1: f32[1, 2, 4] = aten.mul.Tensor(history[gate:0][1], cached_select_1)
+cached_add: f32[1, 2, 4] = aten.add.Tensor(cached_mul, cached_mul_1)
+mul_1: f32[1, 2, 4] = aten.mul.Tensor(cached_add, timestep)
""",
        )

    def test_taylorseer_canonical(self):
        self.check(
            Residual(),
            {**TAYLOR, "cache_identifiers": ["gate"]},
            "canonical",
            """\

-sin: f32[1, 2, 4] = aten.sin.default(x)
-mul: f32[1, 2, 4] = aten.mul.Tensor(sin, 3)
-mul_1: f32[1, 2, 4] = aten.mul.Tensor(mul, timestep)
+predict[taylorseer]: b8[]
+weights[taylorseer]: f32[2]
+history[gate:0][0]: f32[1, 2, 4]
+history[gate:0][1]: f32[1, 2, 4]
+history[gate:0][next]: f32[1, 2, 4]
+cond = cond(predict[taylorseer]):
+  predict:
+    cached_select: f32[] = aten.select.int(weights[taylorseer], 0, 0)
+    cached_mul: f32[1, 2, 4] = aten.mul.Tensor(history[gate:0][0], cached_select)
+    cached_select_1: f32[] = aten.select.int(weights[taylorseer], 0, 1)
+    cached_mul_1: f32[1, 2, 4] = aten.mul.Tensor(history[gate:0][1], cached_select_1)
+    cached_add: f32[1, 2, 4] = aten.add.Tensor(cached_mul, cached_mul_1)
+    return (cached_add)
+  compute:
+    sin: f32[1, 2, 4] = aten.sin.default(x)
+    mul: f32[1, 2, 4] = aten.mul.Tensor(sin, 3)
+    return (mul)
+getitem: f32[1, 2, 4] = getitem(cond, 0)
+mul_1: f32[1, 2, 4] = aten.mul.Tensor(getitem, timestep)
+cached_copy: f32[1, 2, 4] = aten.copy_.default(history[gate:0][next], getitem)
""",
        )

    def test_taylorseer_half_precision_history(self):
        cache = {**TAYLOR, "cache_identifiers": ["gate"], "max_order": 0, "taylor_factors_dtype": torch.bfloat16}
        self.check(
            Residual(),
            cache,
            "compute",
            """\

+history[gate:0][next]: bf16[1, 2, 4]
+cached_convert_element_type: bf16[1, 2, 4] = prims.convert_element_type.default(mul, torch.bfloat16)
+cached_copy: bf16[1, 2, 4] = aten.copy_.default(history[gate:0][next], cached_convert_element_type)
""",
        )
        self.check(
            Residual(),
            cache,
            "predict",
            """\

-sin: f32[1, 2, 4] = aten.sin.default(x)
-mul: f32[1, 2, 4] = aten.mul.Tensor(sin, 3)
-mul_1: f32[1, 2, 4] = aten.mul.Tensor(mul, timestep)
+weights[taylorseer]: f32[1]
+history[gate:0][0]: bf16[1, 2, 4]
+cached_select: f32[] = aten.select.int(weights[taylorseer], 0, 0)
+cached_convert_element_type: f32[1, 2, 4] = prims.convert_element_type.default(history[gate:0][0], torch.float32)
+cached_mul: f32[1, 2, 4] = aten.mul.Tensor(cached_convert_element_type, cached_select)
+mul_1: f32[1, 2, 4] = aten.mul.Tensor(cached_mul, timestep)
""",
        )

    def test_taylorseer_zeros(self):
        self.check(
            Residual(),
            {**TAYLOR, "cache_identifiers": ["gate"], "skip_predict_identifiers": ["gate"]},
            "predict",
            """\

-sin: f32[1, 2, 4] = aten.sin.default(x)
-mul: f32[1, 2, 4] = aten.mul.Tensor(sin, 3)
-mul_1: f32[1, 2, 4] = aten.mul.Tensor(mul, timestep)
+cached_full: f32[1, 2, 4] = aten.full.default([1, 2, 4], 0, dtype=torch.float32, device=device(type='cpu'), pin_memory=False)
+mul_1: f32[1, 2, 4] = aten.mul.Tensor(cached_full, timestep)
""",
        )

    def test_a_cut_behind_which_only_cuts_stand_has_no_slots(self):
        self.check(
            Chain(),
            {**TAYLOR, "cache_identifiers": ["first", "second"]},
            "compute",
            """\

+history[second:0][next]: f32[1, 2, 4]
+cached_copy: f32[1, 2, 4] = aten.copy_.default(history[second:0][next], mul_1)
""",
        )
        self.check(
            Chain(),
            {**TAYLOR, "cache_identifiers": ["first", "second"]},
            "predict",
            """\

-x: f32[1, 2, 4]
-sin: f32[1, 2, 4] = aten.sin.default(x)
-mul: f32[1, 2, 4] = aten.mul.Tensor(sin, 3)
-mul_1: f32[1, 2, 4] = aten.mul.Tensor(mul, 3)
-return (mul_1)
+weights[taylorseer]: f32[2]
+history[second:0][0]: f32[1, 2, 4]
+history[second:0][1]: f32[1, 2, 4]
+cached_select: f32[] = aten.select.int(weights[taylorseer], 0, 0)
+cached_mul: f32[1, 2, 4] = aten.mul.Tensor(history[second:0][0], cached_select)
+cached_select_1: f32[] = aten.select.int(weights[taylorseer], 0, 1)
+cached_mul_1: f32[1, 2, 4] = aten.mul.Tensor(history[second:0][1], cached_select_1)
+cached_add: f32[1, 2, 4] = aten.add.Tensor(cached_mul, cached_mul_1)
+return (cached_add)
""",
        )

    def test_fastercache_half_batch(self):
        """The model on the second half of the batch (which ``explain`` is given whole), then the estimate of the first."""
        self.check(
            Guided(),
            FASTER,
            "half",
            """\

+weights[unconditional]: f32[2]
+output[low]: f32[2, 1, 2, 4]
+output[high]: f32[2, 1, 2, 4]
-return (add)
+cached_select: f32[] = aten.select.int(weights[unconditional], 0, 0)
+cached_mul: f32[2, 1, 2, 4] = aten.mul.Tensor(cached_select, output[low])
+cached_add: f32[2, 1, 2, 4] = aten.add.Tensor(add, cached_mul)
+cached_select_1: f32[] = aten.select.int(weights[unconditional], 0, 1)
+cached_mul_1: f32[2, 1, 2, 4] = aten.mul.Tensor(cached_select_1, output[high])
+cached_add_1: f32[2, 1, 2, 4] = aten.add.Tensor(cached_add, cached_mul_1)
+cached_cat: f32[4, 1, 2, 4] = aten.cat.default([cached_add_1, add])
+return (cached_cat)
""",
            inputs=GUIDED,
        )

    def test_fastercache_both(self):
        self.check(
            Guided(),
            FASTER,
            "both",
            """\

+output[low]: f32[2, 1, 2, 4]
+output[high]: f32[2, 1, 2, 4]
+cached_split: (f32[2, 1, 2, 4], f32[2, 1, 2, 4]) = aten.split.Tensor(add, 2)
+cached_getitem: f32[2, 1, 2, 4] = getitem(cached_split, 0)
+cached_getitem_1: f32[2, 1, 2, 4] = getitem(cached_split, 1)
+cached_sub: f32[2, 1, 2, 4] = aten.sub.Tensor(cached_getitem, cached_getitem_1)
+cached_iota: i64[2] = prims.iota.default(2, start=0, step=1, dtype=torch.int64, device=device(type='cpu'), requires_grad=False)
+cached_sub_1: i64[2] = aten.sub.Tensor(2, cached_iota)
+cached_minimum: i64[2] = aten.minimum.default(cached_iota, cached_sub_1)
+cached_iota_1: i64[3] = prims.iota.default(3, start=0, step=1, dtype=torch.int64, device=device(type='cpu'), requires_grad=False)
+cached_unsqueeze: i64[2, 1] = aten.unsqueeze.default(cached_minimum, 1)
+cached_pow: i64[2, 1] = aten.pow.Tensor_Scalar(cached_unsqueeze, 2)
+cached_pow_1: i64[3] = aten.pow.Tensor_Scalar(cached_iota_1, 2)
+cached_add: i64[2, 3] = aten.add.Tensor(cached_pow, cached_pow_1)
+cached_le: b8[2, 3] = aten.le.Scalar(cached_add, 0)
+cached_convert_element_type: f32[2, 3] = prims.convert_element_type.default(cached_le, torch.float32)
+cached_fft_r2c: c64[2, 1, 2, 3] = aten._fft_r2c.default(cached_sub, [2, 3], 0, True)
+cached_view_as_real: f32[2, 1, 2, 3, 2] = aten.view_as_real.default(cached_fft_r2c)
+cached_unsqueeze_1: f32[2, 3, 1] = aten.unsqueeze.default(cached_convert_element_type, 2)
+cached_mul: f32[2, 1, 2, 3, 2] = aten.mul.Tensor(cached_view_as_real, cached_unsqueeze_1)
+cached_view_as_complex: c64[2, 1, 2, 3] = aten.view_as_complex.default(cached_mul)
+cached_fft_c2r: f32[2, 1, 2, 4] = aten._fft_c2r.default(cached_view_as_complex, [2, 3], 2, 4)
+cached_sub_2: f32[2, 1, 2, 4] = aten.sub.Tensor(cached_sub, cached_fft_c2r)
+cached_copy: f32[2, 1, 2, 4] = aten.copy_.default(output[low], cached_fft_c2r)
+cached_copy_1: f32[2, 1, 2, 4] = aten.copy_.default(output[high], cached_sub_2)
""",
            inputs=GUIDED,
        )

    def test_pab_predict(self):
        torch.manual_seed(0)

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Attention(4)])

            def forward(self, x, timestep):
                return x + self.blocks[0](torch.sin(x)) * timestep

        pab = {"method": "pab", "spatial_attention_block_skip_range": 2}
        self.check(
            Block(),
            pab,
            "compute",
            """\

+history[blocks.0:0][next]: f32[1, 2, 4]
+cached_copy: f32[1, 2, 4] = aten.copy_.default(history[blocks.0:0][next], view_5)
""",
        )
        self.check(
            Block(),
            pab,
            "predict",
            """\

-blocks.0.kv.weight: f32[8, 4]
-blocks.0.kv.bias: f32[8]
-blocks.0.q.weight: f32[4, 4]
-blocks.0.q.bias: f32[4]
-blocks.0.out.weight: f32[4, 4]
-blocks.0.out.bias: f32[4]
-sin: f32[1, 2, 4] = aten.sin.default(x)
-view: f32[2, 4] = aten.view.default(sin, [2, 4])
-permute: f32[4, 8] = aten.permute.default(blocks.0.kv.weight, [1, 0])
-addmm: f32[2, 8] = aten.addmm.default(blocks.0.kv.bias, view, permute)
-view_1: f32[1, 2, 8] = aten.view.default(addmm, [1, 2, 8])
-split: (f32[1, 2, 4], f32[1, 2, 4]) = aten.split.Tensor(view_1, 4, -1)
-getitem: f32[1, 2, 4] = getitem(split, 0)
-getitem_1: f32[1, 2, 4] = getitem(split, 1)
-view_2: f32[2, 4] = aten.view.default(sin, [2, 4])
-permute_1: f32[4, 4] = aten.permute.default(blocks.0.q.weight, [1, 0])
-addmm_1: f32[2, 4] = aten.addmm.default(blocks.0.q.bias, view_2, permute_1)
-view_3: f32[1, 2, 4] = aten.view.default(addmm_1, [1, 2, 4])
-unsqueeze: f32[1, 1, 2, 4] = aten.unsqueeze.default(view_3, 1)
-unsqueeze_1: f32[1, 1, 2, 4] = aten.unsqueeze.default(getitem, 1)
-unsqueeze_2: f32[1, 1, 2, 4] = aten.unsqueeze.default(getitem_1, 1)
-_scaled_dot_product_flash_attention_for_cpu: (f32[1, 1, 2, 4], f32[1, 1, 2]) = aten._scaled_dot_product_flash_attention_for_cpu.default(unsqueeze, unsqueeze_1, unsqueeze_2)
-getitem_2: f32[1, 1, 2, 4] = getitem(_scaled_dot_product_flash_attention_for_cpu, 0)
-select: f32[1, 2, 4] = aten.select.int(getitem_2, 1, 0)
-view_4: f32[2, 4] = aten.view.default(select, [2, 4])
-permute_2: f32[4, 4] = aten.permute.default(blocks.0.out.weight, [1, 0])
-addmm_2: f32[2, 4] = aten.addmm.default(blocks.0.out.bias, view_4, permute_2)
-view_5: f32[1, 2, 4] = aten.view.default(addmm_2, [1, 2, 4])
-mul: f32[1, 2, 4] = aten.mul.Tensor(view_5, timestep)
+history[blocks.0:0][0]: f32[1, 2, 4]
+mul: f32[1, 2, 4] = aten.mul.Tensor(history[blocks.0:0][0], timestep)
""",
        )

    def test_pab_mlp_predict(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([FeedForward(4)])

            def forward(self, x, timestep):
                return x + self.blocks[0](torch.sin(x)) * timestep

        self.check(
            Block(),
            {"method": "pab", "mlp_block_skip_range": 2},
            "predict",
            """\

-blocks.0.up.weight: f32[8, 4]
-blocks.0.up.bias: f32[8]
-blocks.0.down.weight: f32[4, 8]
-blocks.0.down.bias: f32[4]
-sin: f32[1, 2, 4] = aten.sin.default(x)
-view: f32[2, 4] = aten.view.default(sin, [2, 4])
-permute: f32[4, 8] = aten.permute.default(blocks.0.up.weight, [1, 0])
-addmm: f32[2, 8] = aten.addmm.default(blocks.0.up.bias, view, permute)
-view_1: f32[1, 2, 8] = aten.view.default(addmm, [1, 2, 8])
-mul: f32[1, 2, 8] = aten.mul.Tensor(view_1, 0.5)
-mul_1: f32[1, 2, 8] = aten.mul.Tensor(view_1, 0.7071067811865476)
-erf: f32[1, 2, 8] = aten.erf.default(mul_1)
-add: f32[1, 2, 8] = aten.add.Tensor(erf, 1)
-mul_2: f32[1, 2, 8] = aten.mul.Tensor(mul, add)
-view_2: f32[2, 8] = aten.view.default(mul_2, [2, 8])
-permute_1: f32[8, 4] = aten.permute.default(blocks.0.down.weight, [1, 0])
-addmm_1: f32[2, 4] = aten.addmm.default(blocks.0.down.bias, view_2, permute_1)
-view_3: f32[1, 2, 4] = aten.view.default(addmm_1, [1, 2, 4])
-mul_3: f32[1, 2, 4] = aten.mul.Tensor(view_3, timestep)
+history[blocks.0:0][0]: f32[1, 2, 4]
+mul_3: f32[1, 2, 4] = aten.mul.Tensor(history[blocks.0:0][0], timestep)
""",
        )


# ---- the same, by their properties ----------------------------------------------------------------------------------


def test_the_helper_shows_both_texts():
    with pytest.raises(AssertionError, match=r"(?s)the graph diff of phase 'predict' is.*expected\nnonsense"):
        assert_graph_diff(
            Residual().eval(), X, T, cache={**TAYLOR, "cache_identifiers": ["gate"]}, golden="nonsense", options=COUNT
        )


def test_an_untouched_module_has_no_diff():
    """Negative: what is not matched is not rewritten."""
    diff = graph_diff(
        Chain().eval(), X, T, cache={**TAYLOR, "cache_identifiers": ["second"]}, phase="compute", options=COUNT
    )
    assert "first" not in diff
    assert [line for line in diff.splitlines() if line.startswith("-")] == []


def test_whole_blocks_keep_one_history():
    """In the predict phase only the last block's forecast is read: the others have no slots and are not written."""
    cache = {**TAYLOR, "cache_identifiers": [r"blocks\.\d+"]}
    explanation = cachepass.explain(transformer(depth=4), *calls(1)[0], cache=cache, options=COUNT)
    assert [cut.region for cut in explanation.plan.live_cuts] == ["blocks.3"]
    assert explanation.cache_bytes == 2 * calls(1)[0][0].numel() * 4
    assert explanation.graph("compute").count("aten.copy_") == 1
    assert "blocks.0" not in explanation.graph("predict")
    assert str(explanation).count("dead: no phase reads it") == 3


def test_regions_outside_diffusers():
    model = transformer(cross=True)
    x, t = calls(1)[0]
    explanation = cachepass.explain(model, x, t, context=torch.randn(2, 5, 8), cache="taylorseer", options=COUNT)
    kinds = {r.path: r.kind for r in explanation.regions if r.kind != "module"}
    assert kinds == {
        "blocks.0": "block",
        "blocks.0.attn": "attention",
        "blocks.0.cross": "cross-attention",
        "blocks.0.ff": "mlp",
        "blocks.1": "block",
        "blocks.1.attn": "attention",
        "blocks.1.cross": "cross-attention",
        "blocks.1.ff": "mlp",
    }


def test_attention_without_a_kernel_call_is_found_by_its_class():
    class LinearAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.relu(self.q(x)) @ (torch.relu(self.q(x)).transpose(-1, -2) @ self.v(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = LinearAttention()

        def forward(self, x, timestep):
            return x + self.mix(x)

    explanation = cachepass.explain(Model().eval(), X, T, cache="taylorseer", options=COUNT)
    assert [t.region.path for t in explanation.targets] == ["mix"]


def test_a_block_that_calls_the_kernel_itself_is_no_attention():
    class Inline(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.mlp = nn.Linear(4, 12), FeedForward(4)

        def forward(self, x, timestep):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.mlp(x + nn.functional.scaled_dot_product_attention(q, k, v))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Inline()

        def forward(self, x, timestep):
            return self.block(x, timestep)

    with pytest.raises(cachepass.NoMatchError, match="candidates"):
        cachepass.explain(Model().eval(), X, T, cache="taylorseer", options=COUNT)


@pytest.mark.parametrize("case", ["writes its input", "writes a view of it later", "writes its own"])
def test_in_place_writes(case):
    """A region that writes memory of others is skipped with the reason; one that writes its own is cut."""

    class Writer(nn.Module):
        def forward(self, x):
            if case == "writes its input":
                return x.mul_(2)
            if case == "writes a view of it later":
                return x.view(-1)
            y = x * 2
            y += 1
            return y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.writer = Writer()

        def forward(self, x, timestep):
            h = torch.sin(x)
            y = self.writer(h)
            if case == "writes a view of it later":
                y.add_(1)
            return h + y.view(h.shape)

    cache = {**TAYLOR, "cache_identifiers": ["writer"]}
    if case == "writes its own":
        assert len(cachepass.explain(Model().eval(), X, T, cache=cache, options=COUNT).targets) == 1
    else:
        with pytest.raises(cachepass.NoMatchError):
            cachepass.explain(Model().eval(), X, T, cache=cache, options=COUNT)


def test_tuple_outputs_and_repeated_calls():
    class Pair(nn.Module):
        def forward(self, x):
            return torch.chunk(x * 2, 2, dim=-1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x, timestep):
            a, b = self.pair(x)
            c, d = self.pair(x + 1)
            return torch.cat([a + c, b - d], -1) * timestep

    cache = {**TAYLOR, "cache_identifiers": ["pair"], "cache_interval": 3, "disable_cache_before_step": 1}
    model = Model().eval()
    explanation = cachepass.explain(model, X, T, cache=cache)
    assert [cut.name for cut in explanation.plan.cuts] == ["pair:0", "pair:1", "pair@1:0", "pair@1:1"]
    compiled = torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": cache, "lowering": "eager"}
    )
    results = [compiled(X * s, T - s) for s in range(9)]
    for s in (0, *range(2, 9)):  # lines in s are forecast exactly; step 1 has one output to go by
        torch.testing.assert_close(results[s], model(X * s, T - s))
    assert cachepass.summary(compiled).predicted == {"taylorseer": 5}


def test_explain_prints_runs_nothing_and_compiles_nothing():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def forward(self, x, timestep):
            return self.gate(x)

    model = Loud().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = cachepass.explain(model, X, T, cache={**TAYLOR, "cache_identifiers": ["gate"]}, options=COUNT)
    assert explanation.phases == ("compute", "predict")
    assert explanation.cache_bytes == 2 * X.numel() * 4
    assert "gate" in str(explanation)
    assert "taylor(1)" in str(explanation)
    assert explanation.graph("plain").count("aten.") == 1
    with pytest.raises(cachepass.CachepassError, match="phases: plain, canonical, compute, predict"):
        explanation.graph("nothing")
    nested = cachepass.explain(
        transformer(), *calls(1)[0], options=COUNT, cache={**TAYLOR, "cache_identifiers": ["blocks.0", "blocks.0.attn"]}
    )
    assert [(s.region, s.reason) for s in nested.skips] == [("blocks.0.attn", "inside blocks.0, which is cut")]
