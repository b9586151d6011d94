"""What a module is, whatever it is called: attentions, cross-attentions, feed-forwards and blocks outside diffusers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from small_models import FeedForward, calls, transformer
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from zoo import relative_error

import cachepass
from cachepass.testing import count_compiles

TAYLOR = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": None}


class Projected(nn.Module):
    """q, k and v from linears; what attends is the subclass's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def attend(self, q, k, v):
        raise NotImplementedError

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.out(self.attend(self.q(x), self.k(context), self.v(context)))


class Sdpa(Projected):
    def attend(self, q, k, v):
        return scaled_dot_product_attention(q, k, v)


class MatmulSoftmax(Projected):
    """As timm writes it where no fused kernel is used: scale, matmul, mask, softmax, dropout, matmul."""

    def attend(self, q, k, v):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores.masked_fill(torch.zeros(scores.shape[-2:], dtype=torch.bool), float("-inf"))
        weights = nn.functional.dropout(scores.softmax(dim=-1), 0.1, self.training)
        return (weights @ v).transpose(1, 2).flatten(2)


class Einsum(Projected):
    def attend(self, q, k, v):
        scores = torch.einsum("bnd,bmd->bnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bnm,bmd->bnd", torch.softmax(scores, -1), v)


class Baddbmm(Projected):
    def attend(self, q, k, v):
        empty = torch.zeros(q.shape[0], q.shape[1], k.shape[1])
        scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=0.3)
        return torch.bmm(scores.float().softmax(-1).to(v.dtype), v)


class Flex(Projected):
    def attend(self, q, k, v):
        return flex_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class MultiHead(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.inner(x, context, context, need_weights=False)[0]


class MultiHeadWithWeights(MultiHead):
    def forward(self, x, context=None):
        context = x if context is None else context
        attended, weights = self.inner(x, context, context)
        return attended + weights.mean()


class Layer(nn.Module):
    def __init__(self, attention) -> None:
        super().__init__()
        self.mix, self.cross, self.net = attention(), attention(), FeedForward()

    def forward(self, x, context):
        x = x + self.mix(x)
        return self.rest(x + self.cross(x, context))

    def rest(self, x):
        return x + self.net(x)


class Model(nn.Module):
    """Nothing in it has a name that diffusers' patterns know."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.stack = nn.ModuleList([Layer(attention) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x, timestep, context):
        x = x * torch.cos(timestep / 1000)[:, None, None]
        for layer in self.stack:
            x = layer(x, context)
        return sum(head(x) for head in self.heads)


STYLES = [Sdpa, MatmulSoftmax, Einsum, Baddbmm, Flex, MultiHead, MultiHeadWithWeights]


def build(attention):
    torch.manual_seed(0)
    return Model(attention).eval().requires_grad_(False)


def context():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", STYLES)
def test_kinds_by_dataflow(attention):
    explanation = cachepass.explain(build(attention), *calls(1)[0], context(), cache="taylorseer")
    owner = ".inner" if issubclass(attention, MultiHead) else ""
    expected = {}
    for layer in ("stack.0", "stack.1"):
        expected |= {layer: "block", f"{layer}.mix{owner}": "attention", f"{layer}.cross{owner}": "cross-attention"}
    kinds = {r.path: r.kind for r in explanation.regions if r.kind not in ("module", "mlp")}
    assert kinds == expected
    assert [t.region.path for t in explanation.targets] == [p for p, kind in expected.items() if "attention" in kind]


@pytest.mark.parametrize("identifier", ["attention", "block"])
@pytest.mark.parametrize("attention", STYLES)
@pytest.mark.covering
def test_runs_equal_what_is_predicted_by_hand(attention, identifier):
    """TaylorSeer of order 0 on what a kind names: predicted steps reuse the outputs of the last computed one."""
    model = build(attention)
    cached = torch.compile(
        build(attention),
        backend="cached_inductor",
        fullgraph=True,
        options={"cache": {**TAYLOR, "max_order": 0, "cache_identifiers": [identifier]}, "lowering": "eager"},
    )
    named = (
        ("stack.0", "stack.1")
        if identifier == "block"
        else tuple(f"stack.{i}.{name}" for i in range(2) for name in ("mix", "cross"))
    )
    kept, computing, text = {}, True, context()

    def reuse(name, forward):
        def replaced(*args):
            if computing:
                kept[name] = forward(*args)
            return kept[name]

        return replaced

    for name in named:
        module = model.get_submodule(name)
        module.forward = reuse(name, module.forward)
    with count_compiles() as counts:
        results = [cached(x, t, text) for x, t in calls(9)]
    assert (counts.graphs, counts.graph_breaks, counts.recompiles) == (1, 0, 0)
    for step, (x, t) in enumerate(calls(9)):
        computing = step < 2 or step % 3 == 0
        assert relative_error(results[step], model(x, t, text)) < 1e-5, step


def test_a_softmax_that_attends_to_nothing_is_no_attention():
    """A softmax over classes, over a router's scores, or of a product with a weight."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores, self.experts = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8))

        def forward(self, x, timestep):
            gates = self.scores(x).softmax(-1)
            return torch.softmax(x, -1) @ torch.eye(8) + gates @ self.experts

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = Router()

        def forward(self, x, timestep):
            return self.router(x, timestep) * timestep[:, None, None]

    with pytest.raises(cachepass.NoMatchError):
        cachepass.explain(Routed().eval().requires_grad_(False), *calls(1)[0], cache="taylorseer")


@dataclass
class Result:
    sample: torch.Tensor
    count: int


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass", "size"])
def test_blocks_that_return_more_than_a_tensor(kind):
    """Tuples, lists, dicts, dataclasses, and sizes beside tensors, of blocks and of the model; static and dynamic."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformer(depth=1)

        def forward(self, x, timestep):
            y = self.inner(x, timestep)
            pair = [y, y.mean(-1)]
            return {
                "tuple": tuple(pair),
                "list": pair,
                "dict": {"a": pair[0], "b": pair[1]},
                "dataclass": Result(y, y.shape[1]),
                "size": (y, y.shape[0]),
            }[kind]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Wrapped(), Wrapped()])

        def forward(self, x, timestep):
            for layer in self.layers:
                result = layer(x, timestep)
                x = first(result)
            return result

    def first(result):
        return (
            result.sample
            if isinstance(result, Result)
            else next(iter(result.values() if isinstance(result, dict) else result))
        )

    torch.manual_seed(0)
    model = Outer().eval().requires_grad_(False)
    options = {"cache": {**TAYLOR, "max_order": 0, "cache_identifiers": ["layers.*"]}, "lowering": "eager"}
    for dynamic in (False, True):
        torch._dynamo.reset()
        cached = torch.compile(model, backend="cached_inductor", fullgraph=True, dynamic=dynamic, options=options)
        plain = [model(x, t) for x, t in calls(9)]
        for step, (x, t) in enumerate(calls(9)):
            result = cached(x, t)
            assert type(result) is type(plain[0])
            newest = step if step < 2 or step % 3 == 0 else (1 if step == 2 else step - step % 3)
            assert relative_error(first(result), first(plain[newest])) < 1e-5, step
            if kind in ("dataclass", "size"):
                assert (result.count if kind == "dataclass" else result[1]) == (4 if kind == "dataclass" else 2)
