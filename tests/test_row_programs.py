"""Programs for several requests, as graphs: one operation at a time, and whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import small_models
import torch
from expecttest import assert_expected_inline
from row_traces import assert_as_many_products, products
from test_rows import SMALL
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import cachepass
from cachepass.program.plan import CachePlan
from cachepass.program.rows.graph import over_rows
from cachepass.program.rows.variant import RowGraph, parts_of
from cachepass.program.show import readable
from cachepass.program.specialize import Variant
from cachepass.run.live import programs_of

aten = torch.ops.aten
ROWS = 3
EMPTY = CachePlan((), (), (), returns=False)


def on_rows(function: Callable[..., Any], inputs: list[torch.Tensor], differ: set[int]) -> RowGraph:
    """The graph of a function of one row's inputs, for several rows."""
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)) as mode, torch.no_grad():
        fake = [mode.from_tensor(value) for value in inputs]
        gm = make_fx(function)(*fake)
    gm.graph.output_node().args = (tuple(torch.utils._pytree.tree_leaves(gm.graph.output_node().args[0])),)
    return over_rows(Variant("plain", gm, ()), fake, differ, ROWS, EMPTY, seats=1)


def check(function: Callable[..., Any], shapes: list[Any], differ: set[int]) -> fx.Graph:
    """A function on several rows gives what it gives on each."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: Any, rows: tuple[int, ...] = ()) -> torch.Tensor:
        if isinstance(shape, torch.Tensor):
            return shape.expand(*rows, *shape.shape).contiguous()
        return torch.randn(*rows, *shape, generator=generator)

    given = [make(shape, (ROWS,) if i in differ else ()) for i, shape in enumerate(shapes)]
    first = [value[0] if i in differ else value for i, value in enumerate(given)]
    graph = on_rows(function, first, differ)
    found = graph.gm(*given)
    for row in range(ROWS):
        wanted = function(*(value[row] if i in differ else value for i, value in enumerate(given)))
        for value, want, led in zip(found, torch.utils._pytree.tree_leaves(wanted), graph.led, strict=True):
            torch.testing.assert_close(value[row] if led else value, want)
    return graph.gm.graph


X, Y, W = (2, 3, 4), (2, 3, 4), (4, 5)
INDICES = torch.tensor([[1, 0, 2], [2, 2, 0]])
OPERATIONS: dict[str, tuple[Callable[..., Any], list[Any], set[int]]] = {
    "mul, the other shared": (lambda x, y: x * y, [X, (3, 4)], {0}),
    "mul, fewer dimensions with rows": (lambda x, y: x * y, [X, (4,)], {0, 1}),
    "mul, shared with more dimensions": (lambda x, y: x * y, [(4,), Y], {0}),
    "where": (lambda x, y: torch.where(x > 0, x, y), [X, (1, 4)], {1}),
    "convert": (lambda x: torch.ops.prims.convert_element_type(x, torch.float64), [X], {0}),
    "copy": (lambda x, y: aten.copy(x, y), [X, (4,)], {1}),
    "copy into what differs": (lambda x, y: aten.copy(x.double(), y), [X, X], {0}),
    "clone": (lambda x: x.permute(2, 0, 1).clone(memory_format=torch.contiguous_format), [X], {0}),
    "clone, channels last": (lambda x: x.clone(memory_format=torch.channels_last), [(1, 2, 3, 4)], {0}),
    "view": (lambda x: x.view(6, -1), [X], {0}),
    "view of what is permuted": (lambda x: x.permute(0, 2, 1).reshape(8, 3), [X], {0}),
    "permute": (lambda x: x.permute(-1, 0, 1), [X], {0}),
    "unsqueeze": (lambda x: (x.unsqueeze(-1), x.unsqueeze(0)), [X], {0}),
    "squeeze": (lambda x: (aten.squeeze.dim(x, -2), aten.squeeze.dim(x, 0)), [(1, 1, 4)], {0}),
    "select": (lambda x: (x.select(-1, 2), x[1]), [X], {0}),
    "select of one dimension": (lambda x: x[1], [(4,)], {0}),
    "slice": (lambda x: (x[:, 1:], x[..., ::2], aten.slice(x)), [X], {0}),
    "slice, end alone": (lambda x: aten.slice(x, 1, end=2), [X], {0}),
    "split": (lambda x: (x.split(2, -1), aten.split.Tensor(x, 1)), [X], {0}),
    "split with sizes": (lambda x: x.split([1, 3], 2), [X], {0}),
    "unbind": (lambda x: (x.unbind(1), x.unbind()), [X], {0}),
    "cumsum": (lambda x: x.cumsum(1, dtype=torch.float64), [X], {0}),
    "softmax": (lambda x: aten._softmax(x, -1, False), [X], {0}),
    "index_select": (lambda x: x.index_select(1, torch.tensor([2, 0])), [X], {0}),
    "expand": (lambda x: (x.expand(5, 2, 3, 4), x[:, :1].expand(-1, 3, -1)), [X], {0}),
    "repeat": (lambda x: x.repeat(2, 1, 1, 2), [X], {0}),
    "cat": (lambda x, y: torch.cat([x, y, x], 1), [X, Y], {0}),
    "slice_scatter": (lambda x, y: aten.slice_scatter(x, y, 1, 1, 3), [X, (2, 2, 4)], {1}),
    "slice_scatter to the end": (lambda x, y: aten.slice_scatter(x, y), [X, X], {0}),
    "select_scatter": (lambda x, y: aten.select_scatter(x, y, -1, 2), [X, (2, 3)], {0}),
    "mean": (lambda x: (x.mean(-1, keepdim=True), x.mean([0, 1])), [X], {0}),
    "mean of all": (lambda x: x.mean(), [X], {0}),
    "sum": (lambda x: (x.sum(), x.sum(1), aten.sum.dim_IntList(x, None)), [X], {0}),
    "var_mean": (lambda x: aten.var_mean.correction(x, [-1], correction=0, keepdim=True), [X], {0}),
    "amax": (lambda x: (x.amax(1), x.amin((0, 2), keepdim=True)), [X], {0}),
    "mm": (lambda x, w: x @ w, [(3, 4), W], {0}),
    "mm, weights with rows": (lambda x, w: x @ w, [(3, 4), W], {1}),
    "mm, both with rows": (lambda x, w: x @ w, [(3, 4), W], {0, 1}),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), [(5,), (3, 4), W], {1}),
    "addmm, scaled": (lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2), [(5,), (3, 4), W], {1}),
    "addmm, a bias of two dimensions": (lambda b, x, w: torch.addmm(b, x, w), [(3, 5), (3, 4), W], {1}),
    "addmm, bias with rows": (lambda b, x, w: torch.addmm(b, x, w), [(5,), (3, 4), W], {0, 1}),
    "bmm": (lambda x, y: torch.bmm(x, y), [X, (2, 4, 3)], {0, 1}),
    "bmm, one shared": (lambda x, y: torch.bmm(x, y), [X, (2, 4, 3)], {1}),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, 2), [(1, 2, 6, 6), (3, 2, 2, 2), (3,)], {0}),
    "convolution, weights with rows": (lambda x, w: F.conv2d(x, w), [(1, 2, 6, 6), (3, 2, 2, 2)], {1}),
    "embedding": (lambda w, i: aten.embedding(w, i), [(5, 4), INDICES], set()),
    "embedding, indices with rows": (lambda w, i: aten.embedding(w, i), [(5, 4), INDICES], {1}),
    "embedding, table with rows": (lambda w, i: aten.embedding(w, i), [(5, 4), INDICES], {0}),
    "index": (lambda x, i: aten.index(x, [None, i[0]]), [X, INDICES], {0}),
    "index by rows": (lambda x, i: aten.index(x, [i[0]]), [(3, 4), INDICES], {1}),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), [X], {0}),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x) * 2), [(3, 4, 2)], {0}),
    "gather, which has no rule here": (lambda x, i: x.gather(1, i), [(2, 3), INDICES], {0, 1}),
    "topk, which has no rule here": (lambda x: x.topk(2, -1), [X], {0}),
    "sort, which has no rule here": (lambda x: x.sort(1), [X], {0}),
    "a constant": (lambda x: torch.zeros(x.shape) + 1, [X], {0}),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_on_rows(operation):
    check(*OPERATIONS[operation])


@pytest.mark.parametrize("masked", ["", "shared", "shared by heads", "rows", "rows of fewer dimensions"])
@pytest.mark.parametrize("differ", [{0, 1, 2}, {0}, {1, 2}], ids=str)
def test_attention_is_one_call(masked, differ):
    mask: list[Any] = {
        "": [],
        "shared": [(1, 1, 4, 4)],
        "shared by heads": [(2, 1, 4, 4)],
        "rows": [(2, 1, 4, 4)],
        "rows of fewer dimensions": [(4, 4)],
    }[masked]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(q, k, v, *mask):
        return attend(q, k, v, attn_mask=mask[0] if mask else None)[0]

    rows = differ | ({3} if masked.startswith("rows") else set())
    graph = check(attention, [(2, 2, 4, 8)] * 3 + mask, rows)
    assert products(graph)["attention"] == 1


def test_what_cannot_be_done_on_rows_says_so():
    for function, reason in (
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.bernoulli(), "bernoulli"),
        (lambda x: x.add_(1), "add_"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            on_rows(function, [torch.randn(X)], {0})


def test_rows_are_parted_into_sizes_that_there_are():
    assert list(parts_of(7, (1, 2, 4, 8))) == [(0, 4), (4, 6), (6, 7)]
    assert list(parts_of(8, (1, 2, 4, 8))) == [(0, 8)]
    assert list(parts_of(3, (1,))) == [(0, 1), (1, 2), (2, 3)]


# ---- programs -------------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(4, 4, bias=False)

    def forward(self, x, timestep):
        return self.lin(x) + timestep[:, None]


def program_of(model: torch.nn.Module, cache: Any, **inputs: torch.Tensor) -> Any:
    options = {"cache": cache, "lowering": "eager", "progress": False}
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
    compiled(**inputs)
    ((dispatcher, _),) = programs_of(compiled)
    return dispatcher.program


def own_inputs(program: Any) -> frozenset[int]:
    return frozenset(i for i in range(len(program.full.inputs)) if i not in program.full.parameters)


def test_the_programs_of_a_small_model():
    torch.manual_seed(0)
    cache = {"method": "taylorseer", "cache_interval": 2, "max_order": 1, "cache_identifiers": ["lin"],
             "disable_cache_before_step": 1}  # fmt: skip
    model = Small().eval().requires_grad_(False)
    program = program_of(model, cache, x=torch.randn(1, 4), timestep=torch.tensor([900.0]))
    rows = program.for_rows(own_inputs(program), 5)
    graphs = [rows.graph(program.variant(phase), program.full, 2) for phase in program.plan.phases]
    assert_expected_inline(
        "\n".join(readable(graph.gm.graph) for graph in graphs),
        """\
arg0_1: f32[4, 4]
arg1_1: f32[2, 1, 4]
arg2_1: f32[2, 1]
pool_lin_0_next: bf16[10, 1, 4]
pages: i64[1, 2]
cached_select: i64[2] = aten.select.int(pages, 0, 0)
permute: f32[4, 4] = aten.permute.default(arg0_1, [1, 0])
cached_view: f32[2, 4] = aten.view.default(arg1_1, [2, 4])
cached_mm: f32[2, 4] = aten.mm.default(cached_view, permute)
cached_view_1: f32[2, 1, 4] = aten.view.default(cached_mm, [2, 1, 4])
cached_unsqueeze: f32[2, 1, 1] = aten.unsqueeze.default(arg2_1, 2)
cached_add: f32[2, 1, 4] = aten.add.Tensor(cached_view_1, cached_unsqueeze)
cached_convert_element_type: bf16[2, 1, 4] = prims.convert_element_type.default(cached_view_1, torch.bfloat16)
cached_index_put: bf16[10, 1, 4] = aten.index_put_.default(pool_lin_0_next, [cached_select], cached_convert_element_type)
return (cached_add)

arg2_1: f32[2, 1]
weights_taylorseer: f32[2, 2]
pool_lin_0_h0: bf16[10, 1, 4]
pages: i64[2, 2]
cached_select: i64[2] = aten.select.int(pages, 0, 0)
cached_select_1: i64[2] = aten.select.int(pages, 0, 1)
cached_index: bf16[2, 1, 4] = aten.index.Tensor(pool_lin_0_h0, [cached_select])
cached_index_1: bf16[2, 1, 4] = aten.index.Tensor(pool_lin_0_h0, [cached_select_1])
cached_select_2: f32[2] = aten.select.int(weights_taylorseer, 1, 0)
cached_convert_element_type: f32[2, 1, 4] = prims.convert_element_type.default(cached_index, torch.float32)
cached_view: f32[2, 1, 1] = aten.view.default(cached_select_2, [2, 1, 1])
cached_mul: f32[2, 1, 4] = aten.mul.Tensor(cached_convert_element_type, cached_view)
cached_select_3: f32[2] = aten.select.int(weights_taylorseer, 1, 1)
cached_convert_element_type_1: f32[2, 1, 4] = prims.convert_element_type.default(cached_index_1, torch.float32)
cached_view_1: f32[2, 1, 1] = aten.view.default(cached_select_3, [2, 1, 1])
cached_mul_1: f32[2, 1, 4] = aten.mul.Tensor(cached_convert_element_type_1, cached_view_1)
cached_add: f32[2, 1, 4] = aten.add.Tensor(cached_mul, cached_mul_1)
cached_unsqueeze: f32[2, 1, 1] = aten.unsqueeze.default(arg2_1, 2)
cached_add_1: f32[2, 1, 4] = aten.add.Tensor(cached_add, cached_unsqueeze)
return (cached_add_1)
""",
    )


@pytest.mark.parametrize("method", SMALL)
def test_as_many_products_for_rows_as_for_one(method):
    call = {name: value[:1] for name, value in zip(("x", "timestep"), small_models.calls(1)[0], strict=True)}
    program = program_of(small_models.transformer(depth=3), SMALL[method], **call)
    assert_as_many_products(program, program.for_rows(own_inputs(program), 4))


def test_what_is_kept_for_a_run_is_sorted():
    class Prompted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_models.transformer(depth=2, cross=True)
            self.text, self.place = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x, timestep, prompt, table, image):
            context = torch.cat([self.text(prompt), self.text(image)], 1)
            return self.model(x + self.place(table), timestep, context)

    def sorted_kinds(**options: Any) -> list[int]:
        model = Prompted().eval().requires_grad_(False)
        given = {"cache": SMALL["taylorseer"], "lowering": "eager", **options}
        compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=given)
        calls = small_models.calls(6, batch=2)
        prompt, image, table = torch.randn(2, 3, 8), torch.randn(2, 2, 8), torch.randn(4, 8)
        wanted = []
        for row in (0, 1):
            with cachepass.cache_context(f"alone-{row}"):
                own = prompt[row : row + 1], table, image[row : row + 1]
                wanted.append([compiled(x[row : row + 1], t[row : row + 1], *own) for x, t in calls])
        for step, (x, t) in enumerate(calls):
            with cachepass.rows("a", "b"):  # a prompt that is another tensor at each step
                found = compiled(x, t, prompt.clone(), table, image.clone())
            for row in (0, 1):
                torch.testing.assert_close(found[row : row + 1], wanted[row][step])
        ((dispatcher, _),) = programs_of(compiled)
        (rows,) = dispatcher.program._for_rows.values()
        (kinds,) = rows._sorted.values()
        return [len(kinds.shared) > 0, len(kinds.own) > 0, len(kinds.every_step) > 0]

    assert sorted_kinds() == [True, False, True]
    torch._dynamo.reset()
    assert sorted_kinds(invariant_inputs=["prompt", "image"]) == [True, True, False]
    torch._dynamo.reset()
    # Keys and values are of both texts, of which one may change.
    assert sorted_kinds(invariant_inputs=["prompt"]) == [True, False, True]
