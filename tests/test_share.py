"""Blocks that are the same are traced and compiled once: what counts as the same, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import build, first_tensor, inputs_of, is_one_graph, relative_error, sweep_over, trajectory

import cachepass
from cachepass.errors import OptionError
from cachepass.program import trace
from cachepass.program.fold import fold, unfold
from cachepass.program.repeats import find_repeats
from cachepass.program.share import Aten, share
from cachepass.program.show import readable

TAYLOR = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1}
MODELS = ["DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel",
          "CogVideoXTransformer3DModel"]  # fmt: skip


def straight(function, *inputs):
    """The ATen graph of a function, its values fake."""
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def classes(gm):
    return [(len(repeat.stretches), len(repeat.stretches[0])) for repeat in find_repeats(gm.graph, Aten())]


def weights(count, rows=4, columns=4):
    return [torch.randn(rows, columns, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def block(x, w):
    return torch.relu(x @ w.t()) + x


def agree(gm, *inputs):
    """The graph and the one with calls: the same results, and the same writes."""
    outlined, shared = share(gm)
    ours, theirs = [[i.clone() for i in inputs] for _ in range(2)]
    results = [outlined(*ours), gm(*theirs)]
    flat = [torch.utils._pytree.tree_leaves(result) for result in results]
    for one, other in zip(flat[0] + ours, flat[1] + theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return shared


# ---- what is the same -----------------------------------------------------------------------------------------------


class Goldens(TestCase):
    def test_blocks_become_calls_of_one_body(self):
        def model(x, *ws):
            for w in ws:
                x = block(x, w)
            return x.sin()

        outlined, _ = share(straight(model, torch.ones(2, 4), *weights(8)))
        self.assertExpectedInline(
            "\n" + readable(outlined.graph),
            """\

arg0_1: f32[2, 4]
arg1_1: f32[4, 4]
arg2_1: f32[4, 4]
arg3_1: f32[4, 4]
arg4_1: f32[4, 4]
arg5_1: f32[4, 4]
arg6_1: f32[4, 4]
arg7_1: f32[4, 4]
arg8_1: f32[4, 4]
invoke_subgraph = shared_0(arg1_1, arg0_1)
add: f32[2, 4] = getitem(invoke_subgraph, 0)
invoke_subgraph_1 = shared_0(arg2_1, add)
add_1: f32[2, 4] = getitem(invoke_subgraph_1, 0)
invoke_subgraph_2 = shared_0(arg3_1, add_1)
add_2: f32[2, 4] = getitem(invoke_subgraph_2, 0)
invoke_subgraph_3 = shared_0(arg4_1, add_2)
add_3: f32[2, 4] = getitem(invoke_subgraph_3, 0)
invoke_subgraph_4 = shared_0(arg5_1, add_3)
add_4: f32[2, 4] = getitem(invoke_subgraph_4, 0)
invoke_subgraph_5 = shared_0(arg6_1, add_4)
add_5: f32[2, 4] = getitem(invoke_subgraph_5, 0)
invoke_subgraph_6 = shared_0(arg7_1, add_5)
add_6: f32[2, 4] = getitem(invoke_subgraph_6, 0)
invoke_subgraph_7 = shared_0(arg8_1, add_6)
add_7: f32[2, 4] = getitem(invoke_subgraph_7, 0)
sin: f32[2, 4] = aten.sin.default(add_7)
return sin
shared_0(in_0, in_1):
  t: f32[4, 4] = aten.t.default(in_0)
  mm: f32[2, 4] = aten.mm.default(in_1, t)
  relu: f32[2, 4] = aten.relu.default(mm)
  add: f32[2, 4] = aten.add.Tensor(relu, in_1)
  return (add)
""",
        )


def test_blocks_are_the_same_whatever_they_are_called_and_weigh():
    def model(x, *ws):
        for w in ws:
            x = block(x, w)
        return x

    assert classes(straight(model, torch.ones(2, 4), *weights(9))) == [(9, 4)]


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: torch.relu(x @ w.t()) + 2 * x,  # an operation more
        lambda x, w: torch.relu(x @ w.t()).add(x, alpha=2),  # another constant
        lambda x, w: torch.relu(x @ w) + x,  # a weight that lies differently
        lambda x, w: torch.relu(x @ w.t()) + torch.relu(x @ w.t()),  # nodes read each other in another way
    ],
)
def test_a_block_that_differs_is_left_as_it_is(other):
    def model(x, *ws):
        for i, w in enumerate(ws):
            x = (other if i == 8 else block)(x, w)
        return x

    gm = straight(model, torch.ones(2, 4), *weights(20))
    (shared,) = agree(gm, torch.randn(2, 4), *weights(20))
    assert shared.calls == 19 and shared.operations == 4


def test_of_two_kinds_of_blocks_each_has_its_body():
    def model(x, *ws):
        for w in ws[:9]:
            x = block(x, w)
        for w in ws[9:]:
            x = torch.tanh(x @ w).cos() * 2 + x
        return x

    gm = straight(model, torch.ones(2, 4), *weights(18))
    assert sorted((s.calls, s.operations) for s in agree(gm, torch.randn(2, 4), *weights(18))) == [(9, 4), (9, 5)]


def test_pairs_of_blocks_that_alternate_are_one_body():
    def model(x, *ws):
        for one, two in zip(ws[::2], ws[1::2], strict=True):
            x = torch.tanh(block(x, one) @ two) + x
        return x

    gm = straight(model, torch.ones(2, 4), *weights(16))
    assert [(s.calls, s.operations) for s in agree(gm, torch.randn(2, 4), *weights(16))] == [(8, 7)]


def test_blocks_with_others_between_them_are_found():
    def model(x, *ws):
        for i, w in enumerate(ws):
            x = block(x, w)
            x = x.sin().cos() if i == 6 else x
        return x

    gm = straight(model, torch.ones(2, 4), *weights(14))
    assert [(s.calls, s.operations) for s in agree(gm, torch.randn(2, 4), *weights(14))] == [(14, 4)]


def test_a_last_block_that_lacks_its_end_is_called_too():
    def model(x, *ws):
        for i, w in enumerate(ws):
            x = torch.relu((x @ w.t()).sin().cos().tan() + x)
            x = x if i == len(ws) - 1 else x.exp()
        return x

    gm = straight(model, torch.ones(2, 4), *weights(8))
    assert [(s.calls, s.operations) for s in agree(gm, torch.randn(2, 4), *weights(8))] == [(8, 7)]


def test_few_operations_are_not_worth_a_call():
    def model(x, *ws):
        for w in ws:
            x = block(x, w)
        return x

    gm = straight(model, torch.ones(2, 4), *weights(3))
    assert share(gm) == (gm, ())


def test_without_a_matrix_product_nothing_is_called():
    def model(x):
        for _ in range(40):
            x = x.sin().cos()
        return x

    gm = straight(model, torch.ones(2, 4))
    assert share(gm) == (gm, ())


# ---- what crosses the border ----------------------------------------------------------------------------------------


def test_slots_are_written_behind_the_call():
    def model(x, *given):
        for slot, w in zip(given[:8], given[8:], strict=True):
            y = torch.relu(x @ w.t())
            slot.copy_(y)
            x = y + x
        return x

    inputs = torch.randn(2, 4), *(torch.zeros(2, 4) for _ in range(8)), *weights(8)
    gm = make_fx(model, tracing_mode="fake")(*inputs)
    (shared,) = agree(gm, *inputs)
    assert shared.calls == 8
    outlined, _ = share(gm)
    written = [node for node in outlined.graph.nodes if node.target is torch.ops.aten.copy_.default]
    assert len(written) == 8, "outside, as they were"


def test_what_was_written_before_it_is_read_is_not_moved():
    def model(x, slot, *ws):
        for w in ws:
            y = x @ w.t()
            slot.copy_(y)
            x = torch.relu(y + slot)
        return x

    inputs = torch.randn(2, 4), torch.zeros(2, 4), *weights(12)
    gm = make_fx(model, tracing_mode="fake")(*inputs)
    agree(gm, *inputs)


def test_views_are_made_again_outside():
    def model(x, *ws):
        kept = []
        for w in ws:
            y = block(x, w)
            kept += [y.t(), x.view(-1)]  # of what is made inside, and of what goes in
            x = y
        return kept

    gm = straight(model, torch.ones(2, 4), *weights(8))
    (shared,) = agree(gm, torch.randn(2, 4), *weights(8))
    assert shared.calls == 8
    outlined, _ = share(gm)
    body = outlined.get_submodule("shared_0")
    (returned,) = body.graph.output_node().args[0]
    assert returned.target is torch.ops.aten.add.Tensor, "the memory's owner alone"


def test_what_is_the_same_in_all_blocks_is_computed_once():
    def model(x, embedding, *ws):
        for w in ws:
            x = block(x, w) * torch.nn.functional.silu(embedding)
        return x

    gm = straight(model, torch.ones(2, 4), torch.ones(2, 4), *weights(8))
    agree(gm, torch.randn(2, 4), torch.randn(2, 4), *weights(8))
    outlined, _ = share(gm)
    names = [str(node.target) for node in outlined.graph.nodes]
    assert sum("sigmoid" in name or "silu" in name for name in names) == 1


def test_parts_of_what_is_the_same_are_taken_outside():
    def model(x, embedding, *ws):
        for w in ws:
            shift, scale = (embedding * 2).chunk(2, dim=-1)
            x = block(x, w) * (1 + scale) + shift
        return x

    gm = straight(model, torch.ones(2, 4), torch.ones(2, 8), *weights(8))
    agree(gm, torch.randn(2, 4), torch.randn(2, 8), *weights(8))


def test_random_numbers_stay_where_they_are():
    def model(x, *ws):
        for w in ws:
            x = block(x, w) + torch.rand_like(x)
        return x

    gm = straight(model, torch.ones(2, 4), *weights(12))
    outlined, _ = share(gm)
    inner = [n for m in outlined.children() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
    assert not any("rand" in str(node.target) for node in inner)
    results = []
    for each in (gm, outlined):
        torch.manual_seed(0)
        results.append(each(torch.ones(2, 4), *weights(12)))
    assert torch.equal(*results)


OPERATIONS = [
    lambda x, w: torch.relu(x @ w),
    lambda x, _: x * 2,
    lambda x, w: (x + w[:2]).sin(),
    lambda x, _: x.t().contiguous().t(),
    lambda x, _: torch.cat([x[:, 2:], x[:, :2]], 1),
    lambda x, _: x.chunk(2, 1)[0].repeat(1, 2),
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(range(len(OPERATIONS))), min_size=2, max_size=6),
    st.integers(5, 9),
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(range(len(OPERATIONS)))), max_size=3),
    st.booleans(),
)
def test_any_model_of_blocks_gives_what_it_gave(operations, count, changes, keeps):
    def model(x, *ws):
        kept = []
        for i, w in enumerate(ws):
            for n in operations:
                x = OPERATIONS[n](x, w)
            x = block(x, w)
            for at, n in changes:
                x = OPERATIONS[n](x, w) if at == i else x
            kept.append(x[:1])
        return (x, kept) if keeps else x

    inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), *weights(count)
    agree(straight(model, *inputs), *inputs)


# ---- traced once ----------------------------------------------------------------------------------------------------


def traced(model, inputs, monkeypatch, **options):
    """The plan's graph, with the markers' names, and how often blocks were folded into one."""
    calls = []

    def spy(gm):
        folded = fold(gm)
        calls.append(sum(len(body.repeat.stretches) for body in folded.bodies))
        return folded

    monkeypatch.setattr(trace, "fold", spy)
    with torch.no_grad():
        found = cachepass.explain(model, **inputs, cache=TAYLOR, options=options)
    return found, calls


@pytest.mark.parametrize("name", sweep_over([n for n in MODELS if is_one_graph(n)], MODELS[:3]))
def test_a_folded_trace_is_the_trace(name, monkeypatch):
    model, inputs = build(name, layers=4), inputs_of(name)
    one, calls = traced(model, inputs, monkeypatch)
    other, none = traced(model, inputs, monkeypatch, share_blocks=False)
    assert calls and calls[0] >= 3 and not any(none)
    assert one.plan.cuts == other.plan.cuts
    for phase in one.phases:
        ours, theirs = [[str(n.target) for n in e.fx_graph(phase).nodes] for e in (one, other)]
        assert ours == theirs


class Ladder(nn.Module):
    """Blocks of one layer."""

    def __init__(self, count=8, in_place=False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.in_place = in_place

    def forward(self, x, timestep):
        kept = x * timestep.view(-1, 1, 1)
        for layer in self.blocks:
            y = torch.relu(layer(kept)).sin().cos()
            if self.in_place:
                y += 1
            kept = kept + y
        return kept


CUT = TAYLOR | {"cache_identifiers": [r"blocks\.\d+"], "taylor_factors_dtype": torch.float32}
X, T = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1)), torch.full((1,), 500.0)


def test_calls_that_are_gone_are_traced_again(monkeypatch):
    """Where AOTAutograd drops a call, as one that nobody reads, the calls behind it cannot be told."""
    unfolded = []

    def without_one(gm, bodies):
        *_, before, last = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
        for one, other in zip(list(last.users), list(before.users), strict=True):
            one.replace_all_uses_with(other)
            gm.graph.erase_node(one)
        gm.graph.erase_node(last)
        unfolded.append(unfold(gm, bodies))
        return unfolded[-1]

    monkeypatch.setattr(trace, "unfold", without_one)
    model = Ladder().eval()
    with torch.no_grad():
        one = cachepass.explain(model, X, T, cache=CUT)
        other = cachepass.explain(model, X, T, cache=CUT, options={"share_blocks": False})
    assert unfolded == [None]
    assert one.graph("compute") == other.graph("compute")


def test_blocks_that_write_in_place_are_traced_as_without_calls():
    model = Ladder(in_place=True).eval()
    with torch.no_grad():
        one = cachepass.explain(model, X, T, cache=CUT)
        other = cachepass.explain(model, X, T, cache=CUT, options={"share_blocks": False})
    assert one.graph("compute") == other.graph("compute")


# ---- the whole way --------------------------------------------------------------------------------------------------


DECIDES = {"method": "first_block_cache", "threshold": 0.12}


def compiled(model, cache=TAYLOR, **options):
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options={"cache": cache, **options})


@pytest.mark.inductor
@pytest.mark.parametrize("cache", sweep_over([TAYLOR, DECIDES], [DECIDES]), ids=lambda cache: cache["method"])
@pytest.mark.parametrize("name", sweep_over(MODELS, MODELS[1:2]))
def test_outputs_are_those_of_programs_without_calls(name, cache):
    outputs = []
    for shares in (True, False):
        model = compiled(build(name, layers=3), cache, share_blocks=shares)
        with torch.no_grad():
            outputs.append([first_tensor(model(**call)) for _, call in trajectory(name, 7)])
        programs = [v for d, _ in cachepass.run.live.programs_of(model) for v in d.program.variants.values()]
        assert any(v.shared for v in programs) == shares
    assert max(map(relative_error, *outputs)) <= 1e-6


@pytest.mark.inductor
def test_symbolic_sizes_are_right():
    ladder = compiled(Ladder().eval(), CUT, share_blocks=True)
    with torch.no_grad():
        for rows in (4, 6, 9):
            x = torch.randn(1, rows, 8, generator=torch.Generator().manual_seed(rows))
            assert relative_error(ladder(x, T), Ladder.forward(ladder._orig_mod, x, T)) <= 1e-6


def test_explain_says_what_is_compiled_once():
    with torch.no_grad():
        found = cachepass.explain(
            build("FluxTransformer2DModel", layers=4), **inputs_of("FluxTransformer2DModel"), cache=TAYLOR
        )
    assert "8 blocks, 2 programs" in str(found)
    assert [body.calls for body in found.shared("compute")] == [4, 4]
    assert found.as_dict()["shared"]["predict"][0]["calls"] == 4


def test_share_blocks_is_checked():
    with pytest.raises(OptionError, match="share_blocks"):
        compiled(Ladder().eval(), CUT, share_blocks="yes")(X, T)
