"""Linear layers of which only some columns are read: what is cut, what is not, and that results stay."""

from __future__ import annotations

import pytest
import torch
from small_models import Attention
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import cachepass
from cachepass.capture.regions import dotted
from cachepass.program.narrow import narrow

aten = torch.ops.aten
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
LINEAR = nn.Linear(4, 12).requires_grad_(False)
TABLE = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(1))


def _linear(x, weight, bias):
    return aten.addmm.default(bias, x, weight.t())


_to = torch.ops.prims.convert_element_type.default


def chunks(x, w, b):
    c = aten.split.Tensor(_linear(x, w, b), 2, 1)
    return c[2] * c[3] + c[5]


def two_runs(x, w, b):
    c = aten.split.Tensor(_linear(x, w, b), 2, 1)
    return c[1] + c[4]


def sized_chunks(x, w, b):
    c = aten.split_with_sizes.default(_linear(x, w, b), [4, 6, 2], -1)
    return c[1].sin()


def one_slice(x, w, b):
    return _linear(x, w, b)[:, -3:] * 2


def nested_chunks(x, w, b):
    halves = aten.split.Tensor(_linear(x, w, b), 6, 1)
    return aten.split.Tensor(halves[0], 2, 1)[2] + aten.split.Tensor(halves[1], 2, 1)[0]


def table_and_chunks(x, w, b, table):
    c = (aten.unsqueeze.default(_linear(x, w, b), 1).view(3, 6, 2) + table).split(1, 1)
    return c[2] * c[3]


def table_and_unbind(x, w, b, table):
    c = _to(_linear(x, w, b).view(3, 1, 6, 2) + table, torch.float64).unbind(2)
    return c[4] - c[5]


def no_bias(x, w, _):
    return x.mm(w.t())[:, 4:8].sin()


def activated_row(x, w, b):
    return torch.nn.functional.silu(_linear(x, w, b))[:, :4] + b[:4]


def converted(x, w, _):
    return _to(_to(x, torch.bfloat16).mm(_to(w, torch.bfloat16).t())[:, 4:], torch.float32) * 2


def all_is_read(x, w, b):
    c = aten.split.Tensor(_linear(x, w, b), 6, 1)
    return c[0] + c[1]


def read_whole_elsewhere(x, w, b):
    e = _linear(x, w, b)
    return e[:, :2].sin() + e.sum()


def inner_columns_of_groups(x, w, b):
    return _linear(x, w, b).view(3, 6, 2)[:, :, 0] * 2


def other_rows(x, w, b):
    return _linear(x, w, b)[:2] * 2


def stepped(x, w, b):
    return _linear(x, w, b)[:, ::2] * 2


def returned(x, w, b):
    return aten.split.Tensor(_linear(x, w, b), 2, 1)[1]


def multiplied_with_itself(x, w, b):
    e = _linear(x, w, b)
    return (e * e)[:, :2] + 1


INPUTS = X, LINEAR.weight, LINEAR.bias, TABLE


def _traced(function) -> torch.fx.GraphModule:
    gm = make_fx(lambda *inputs: function(*inputs[: function.__code__.co_argcount]), tracing_mode="fake")(*INPUTS)
    gm.graph.eliminate_dead_code()
    return gm


def _columns(gm: torch.fx.GraphModule) -> list[int]:
    return [n.meta["val"].shape[1] for n in gm.graph.nodes if n.target in (aten.addmm.default, aten.mm.default)]


@pytest.mark.parametrize(("function", "columns"), [
    (chunks, [4, 2]), (two_runs, [2, 2]), (sized_chunks, [6]), (one_slice, [3]), (nested_chunks, [4]),
    (table_and_chunks, [4]), (table_and_unbind, [4]), (no_bias, [4]), (activated_row, [4]), (converted, [8]),
])  # fmt: skip
def test_only_the_columns_that_are_read_are_computed(function, columns):
    gm = _traced(function)
    expected = gm(*INPUTS)
    assert len(narrow(gm.graph, gap_bytes=0)) == 1
    gm.recompile()
    assert _columns(gm) == columns
    torch.testing.assert_close(gm(*INPUTS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [all_is_read, read_whole_elsewhere, inner_columns_of_groups, other_rows, stepped,
                                      returned, multiplied_with_itself])  # fmt: skip
def test_a_layer_stays_where_all_of_it_may_be_read(function):
    gm = _traced(function)
    before = str(gm.graph)
    assert narrow(gm.graph, gap_bytes=0) == []
    assert str(gm.graph) == before


def test_a_small_gap_between_two_runs_stays_in_the_layer():
    gm = _traced(two_runs)
    expected = gm(*INPUTS)
    narrow(gm.graph)
    gm.recompile()
    assert _columns(gm) == [8]
    torch.testing.assert_close(gm(*INPUTS), expected, rtol=1e-5, atol=1e-6)


def test_weights_are_viewed_not_copied():
    gm = _traced(chunks)
    narrow(gm.graph, gap_bytes=0)
    gm.recompile()
    storages = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is aten.addmm.default:
                storages.extend(t.untyped_storage().data_ptr() for t in (args[0], args[2]))
            return func(*args, **(kwargs or {}))

    with Watch():
        gm(*INPUTS)
    assert set(storages) == {t.untyped_storage().data_ptr() for t in (LINEAR.weight, LINEAR.bias)}


class Modulated(nn.Module):
    """adaLN: shift, scale, gate of an attention."""

    def __init__(self):
        super().__init__()
        self.mod, self.attn = nn.Linear(4, 12), Attention(4)

    def forward(self, x, timestep):
        shift, scale, gate = self.mod(x[:, 0] * timestep[:, None]).chunk(3, dim=1)
        return x + gate[:, None] * self.attn(x * (1 + scale[:, None]) + shift[:, None])


def test_of_the_modulation_a_predicted_attention_needs_the_gate():
    torch.manual_seed(0)
    model = Modulated().eval().requires_grad_(False)
    cache = {"method": "taylorseer", "max_order": 1, "cache_identifiers": ["attn"], "taylor_factors_dtype": None}
    explanation = cachepass.explain(
        model, torch.ones(3, 2, 4), torch.ones(3), cache=cache, options={"num_inference_steps": 9}
    )
    added = [
        line for line in explanation.diff("predict").splitlines() if "= aten.addmm" in line and line.startswith("+")
    ]
    assert added == ["+cached_addmm: f32[3, 4] = aten.addmm.default(cached_slice_1, mul, cached_permute)"]
    assert "12" not in "".join(line for line in explanation.diff("compute").splitlines() if line.startswith("+"))


def test_what_is_cut_stays_a_part_of_its_module():
    explanation = cachepass.explain(
        Modulated().eval().requires_grad_(False), torch.ones(3, 2, 4), torch.ones(3),
        cache={"method": "taylorseer", "cache_identifiers": ["attn"]}, options={"num_inference_steps": 9},
    )  # fmt: skip
    program = explanation.program
    predicted = next(phase for phase in program.plan.phases if program.specialized(phase).name == "predict")
    (layer,) = program.specialized(predicted).gm.graph.find_nodes(op="call_function", target=aten.addmm.default)
    ((path, kind),) = layer.meta["nn_module_stack"].values()
    assert dotted(path) == "mod" and kind is nn.Linear
