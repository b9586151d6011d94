"""What is kept is the cache's, what is returned is the caller's; computed steps are the uncached model's to the bit."""

from __future__ import annotations

import operator

import pytest
import torch
from small_models import Attention, calls, transformer
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import cachepass
from cachepass import cut
from cachepass.capture.aliases import Aliases
from cachepass.schedule import Every, Threshold

LOWERINGS = [
    "eager",
    pytest.param("specialize", marks=pytest.mark.inductor),
    pytest.param("cond", marks=pytest.mark.inductor),
]


def reuse(*identifiers, **fields):
    """Outputs of these modules, computed at every third step and reused as they are."""
    return {
        "method": "taylorseer",
        "max_order": 0,
        "cache_interval": 3,
        "disable_cache_before_step": 1,
        "taylor_factors_dtype": None,
        "cache_identifiers": list(identifiers),
        **fields,
    }


def compiled(model, cache, **options):
    options = {"lowering": "eager", "num_inference_steps": 9, "cache": cache, **options}
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)


# ---- what a model returns -------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """It returns what is cut, what is kept for a run, and views of both, in dicts and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.project = transformer(), nn.Linear(4, 4)

    def forward(self, x, timestep, text):
        sample, kept = self.inner(x, timestep), self.project(text)
        return {
            "sample": [sample],
            "rows": (sample[:, 0],),
            "kept": kept,
            "turned": kept.transpose(0, 1),
            "parts": list(kept.chunk(2, -1)),
        }


@pytest.mark.parametrize("identifier", ["inner.proj_out", "inner"])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.covering
def test_the_caller_owns_what_a_model_returns(identifier, lowering):
    """Written to in place it changes nothing of the cache, and held it is changed by no later step."""
    torch.manual_seed(0)
    original = Returns().eval().requires_grad_(False)
    model, text = compiled(original, reuse(identifier), lowering=lowering), torch.randn(2, 5, 4)
    runs = []
    for spoils in (False, True, False):
        held, seen = [], []
        for x, timestep in calls(9):
            returned = pytree.tree_leaves(model(x, timestep, text))
            held.append(returned)
            seen.append([value.clone() for value in returned])
            for value in returned if spoils else ():
                value.fill_(7.0)
        runs.append(seen)
        if not spoils:
            assert all(map(torch.equal, pytree.tree_leaves(held), pytree.tree_leaves(seen)))
    for other in runs[1:]:
        assert all(map(torch.equal, pytree.tree_leaves(other), pytree.tree_leaves(runs[0])))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_outputs_that_share_memory_in_a_model_share_it(lowering):
    torch.manual_seed(0)
    model = compiled(Returns().eval().requires_grad_(False), reuse("inner.proj_out"), lowering=lowering)
    text = torch.ones(2, 5, 4)
    for x, timestep in calls(4):
        returned = model(x, timestep, text)
        returned["kept"].fill_(1.0)
        returned["sample"][0].fill_(2.0)
        assert (returned["turned"] == 1).all() and (returned["parts"][1] == 1).all()
        assert (returned["rows"][0] == 2).all()


# ---- values that are written in place -------------------------------------------------------------------------------


def _rows(y):
    y[:, 0] = 3.0


def _half(y):
    y.chunk(2, -1)[0].sub_(1.0)


WRITES = [lambda y: F.relu(y, inplace=True), lambda y: F.silu(y, True), lambda y: y.add_(1.0), torch.relu_,
          lambda y: torch.add(y, 1.0, out=y), lambda y: torch._foreach_mul_([y], 2.0), _rows, _half,
          lambda y: y.view(-1)[3:].fill_(1.0), lambda y: torch.ops.aten.mul_(y, 0.5)]  # fmt: skip


class FeedForward(nn.Module):
    """With nothing in it that torch.compile decomposes into other arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Inner(nn.Module):
    """A block: an attention and a feed-forward, whose outputs are written by who gets them."""

    def __init__(self, write) -> None:
        super().__init__()
        self.attn, self.ff, self.write = Attention(), FeedForward(), write

    def forward(self, x, later: bool):
        for part in (self.attn, self.ff):
            x = x + written(part(x), self.write, later) * 0.1
        return x


def written(y, write, later: bool):
    """What readers see: the value before the write, if there is one, and after it."""
    before = y * 2 if later else 0
    write(y)
    return y + before


class WritesInPlace(nn.Module):
    def __init__(self, later: bool) -> None:
        super().__init__()
        self.blocks, self.later = nn.ModuleList([Inner(write) for write in WRITES]), later

    def forward(self, x, timestep):
        x = x * torch.cos(timestep / 1000)[:, None, None]
        for block in self.blocks:
            x = written(block(x, self.later), block.write, self.later) * 0.1
        return x


def seeded(make, *args):
    torch.manual_seed(0)
    return make(*args).eval().requires_grad_(False)


def assert_computed_steps_are_the_models(original, cache, steps=(0, 1, 2, 3), **options):
    """And what it does to its inputs."""
    model = compiled(original, cache, **options)
    for step, (x, timestep) in enumerate(calls(4)):
        own = x.clone()
        result, expected = model(x, timestep), original(own, timestep)
        if step in steps:
            assert torch.equal(result, expected), step
        assert torch.equal(x, own)
    return model


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("identifier", ["attention", "mlp", "block"])
@pytest.mark.covering
def test_outputs_that_are_written_in_place(identifier, later):
    cache = reuse(identifier, cache_interval=2) | {"disable_cache_before_step": 2}
    model = assert_computed_steps_are_the_models(seeded(WritesInPlace, later), cache, steps=(0, 1, 3))
    assert len(cachepass.summary(model).modules) == len(WRITES) and cachepass.summary(model).predicted


class Pair(nn.Module):
    """Two outputs in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.names = Attention(), 2

    def forward(self, x):
        y = self.attn(x)
        return y, y.view(-1)


class WritesOneOfTwo(nn.Module):
    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.pair, self.writes = Pair(), writes

    def forward(self, x, timestep):
        y, flat = self.pair(x * torch.cos(timestep / 1000)[:, None, None])
        if self.writes:
            F.relu(y, inplace=True)
        return y + flat.view(y.shape)


@pytest.mark.parametrize("writes", [False, True])
def test_outputs_that_share_memory_are_cut_unless_it_is_written(writes):
    original, cache = seeded(WritesOneOfTwo, writes), reuse(r"pair(\.attn\.out)?")
    model = assert_computed_steps_are_the_models(original, cache, steps=(0,))
    assert cachepass.summary(model).modules == ("pair.attn.out" if writes else "pair",)
    reasons = {skip.region: skip.reason for skip in cachepass.explain(original, *calls(1)[0], cache=cache).skips}
    assert ("two of its outputs share memory" in reasons.get("pair", "")) == writes


class Stack(nn.Module):
    """Blocks that add to a stream. ``where`` says what is written in place."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.blocks, self.where = nn.ModuleList([FeedForward() for _ in range(3)]), where

    def forward(self, x, timestep):
        if self.where == "the latents":
            x.mul_(1.5)
        h = x * torch.cos(timestep / 1000)[:, None, None]
        side = h.clone()
        for i, block in enumerate(self.blocks):
            h = self.add(h, block(h + side), i)
            if self.where == "what enters all blocks":
                side.mul_(0.5)
        if self.where == "the output":
            F.relu(h, inplace=True)
        return h

    def add(self, h, y, i):
        return h.add_(y) if self.where == "the stream" and i else h + y


@pytest.mark.parametrize("where", ["nothing", "the latents", "the output", "the stream"])
@pytest.mark.parametrize("probe", [cut.Latents(), cut.ModuleOutput("blocks.0")])
def test_what_a_decision_looks_at(where, probe):
    """As it is where it is looked at: the latents as they were given, an output as its readers see it."""
    config = cachepass.CacheConfig(cut=cut.Modules(r"blocks\.[12]"), schedule=Threshold(1e-9), probe=probe)
    model = assert_computed_steps_are_the_models(seeded(Stack, where), config)
    distances = cachepass.summary(model).distances["default"]
    looked = []
    for x, timestep in calls(4):
        h = (
            x * 1.5 * torch.cos(timestep / 1000)[:, None, None]
            if where == "the latents"
            else (x * torch.cos(timestep / 1000)[:, None, None])
        )
        looked.append(x if isinstance(probe, cut.Latents) else seeded(Stack, where).blocks[0](h + h))
    for distance, before, now in zip(distances[1:], looked, looked[1:], strict=False):
        dims = (1, 2) if isinstance(probe, cut.Latents) else (0, 1, 2)  # of latents the mean of each sample's
        change, size = (now - before).abs().mean(dims), before.abs().mean(dims)
        assert distance == pytest.approx(float((change / size).mean()), rel=1e-4)


@pytest.mark.inductor
def test_a_program_that_decides_looks_at_the_latents_as_they_were_given():
    config = cachepass.CacheConfig(cut=cut.Modules("block"), schedule=Threshold(1e-9), probe=cut.Latents())
    told = []
    for where in ("nothing", "the latents"):
        model = compiled(seeded(Stack, where), config, lowering="cond")
        for x, timestep in calls(4):
            model(x, timestep)
        told.append(cachepass.summary(model).distances["default"][1:])
    assert told[0] == pytest.approx(told[1], rel=1e-5)


class InPlaceEntry(nn.Module):
    """A block that writes what it is given by a functional's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward()

    def forward(self, x):
        F.relu(x, inplace=True)
        return x + self.ff(x)


@pytest.mark.parametrize("residual", [False, True])
def test_blocks_that_write_what_enters_them_are_computed(residual):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([InPlaceEntry() for _ in range(2)])

        def forward(self, x, timestep):
            h = x * torch.cos(timestep / 1000)[:, None, None]
            kept = h.view(-1)
            for block in self.blocks:
                h = block(h)
            return h + kept.view(h.shape)

    where = cut.Blocks(identifiers=[r"blocks\.\d"]) if residual else cut.Modules(r"blocks\.\d")
    config = cachepass.CacheConfig(cut=where, schedule=Every(2))
    with pytest.raises(cachepass.NoMatchError):
        cachepass.explain(seeded(Model), *calls(1)[0], cache=config)


def test_what_enters_a_span_and_is_written_between_its_blocks():
    config = cachepass.CacheConfig(cut=cut.Blocks(identifiers=[r"blocks\.\d"]), schedule=Every(2))
    with pytest.raises(cachepass.NoMatchError, match="what enters them is written in place between them"):
        cachepass.explain(seeded(Stack, "what enters all blocks"), *calls(1)[0], cache=config)


@torch.compiler.allow_in_graph
def foreign(x, scale):
    x.mul_(scale)
    return x + 1


@torch.compiler.allow_in_graph
def harmless(x, scale):
    return x * scale


NAMES = operator, foreign, harmless  # of the statements below


@pytest.mark.parametrize(("statement", "expected"), [
    ("x.add_(y)", "x"), ("x.add(y)", ""), ("operator.ipow(x, 2)", "x"), ("torch.relu_(y)", "y"),
    ("F.relu(x, inplace=True)", "x"), ("F.relu(inplace=True, input=x)", "x"), ("F.relu(x, False)", ""),
    ("F.leaky_relu(x, 0.1, True)", "x"), ("F.dropout(x, 0.5, True, True)", "x"), ("torch.add(x, 1, out=y)", "y"),
    ("torch.max(x, 0, out=(y[0], x[0].long()))", "y"), ("torch._foreach_add_([x, y], 1.0)", "xy"),
    ("torch._foreach_add([x, y], 1.0)", ""), ("torch.ops.aten.copy_.default(x, y)", "x"), ("foreign(y, 2.0)", "y"),
    ("torch.ops.aten.add_(x, 1)", "x"), ("torch.ops.aten.add(x, 1)", ""), ("harmless(y, 2.0)", ""),
    ("x.view(-1)[0].fill_(1.0)", "x"),
])  # fmt: skip
def test_writes_are_found_in_dynamo_graphs(statement, expected):
    run, found = eval(f"lambda x, y: {statement}", globals()), []

    def function(x, y):
        x, y = x * 1, y * 1
        run(x, y)
        return x, y

    def backend(gm, _):
        aliases = Aliases(gm)
        made = [node for node in gm.graph.nodes if node.op == "call_function"][:2]
        found.extend(name for node, name in zip(made, "xy", strict=True) if aliases.is_written(node))
        return gm.forward

    add = torch.ops.aten.add.Tensor
    torch.compile(function, backend=backend, fullgraph=True)(torch.ones(2, 4), torch.ones(2, 4))
    assert torch.ops.aten.add.Tensor is add  # looked at, not made anew
    assert "".join(found) == expected
