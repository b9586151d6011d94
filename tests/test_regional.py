"""Models compiled in parts - block by block, or broken by graph breaks - and what moves, copies and shares them.

Equal to the whole model in one graph, to diffusers' own hooks, to the caching done by hand (eager lowering).
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import zoo
from small_models import Attention, calls, transformer
from test_calling import CACHES, WAYS, Block, ByHand, Net, check, check_two_runs, fired, net, regional, settings
from torch import nn
from zoo import relative_error, sweep_over

import cachepass
from cachepass import cache_context
from cachepass.run.live import programs_of
from cachepass.testing import CompileCounts, count_compiles

# ---- blocks compiled one by one -------------------------------------------------------------------------------------


LISTS_OF_BLOCKS = [
    ("FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 3}, None),
    ("WanTransformer3DModel", {"num_layers": 3}, r"blocks\.\d\.attn\d"),
    ("HunyuanVideoTransformer3DModel", {}, r"(single_)?transformer_blocks\.\d\.attn"),
    ("ZImageTransformer2DModel", {"n_layers": 2}, r".*\.attention"),
]


@pytest.mark.parametrize(("name", "layers", "attentions"), sweep_over(LISTS_OF_BLOCKS, few=LISTS_OF_BLOCKS[1:2]))
def test_repeated_blocks_of_diffusers(name, layers, attentions, monkeypatch):
    """Equal to the whole model's graph and to diffusers' hooks, with as many graphs as without a cache."""
    for key, value in layers.items():
        monkeypatch.setitem(zoo.ZOO[name]["init"], key, value)
    fields = {
        "cache_interval": 3,
        "disable_cache_before_step": 2,
        "taylor_factors_dtype": torch.float32,
        "cache_identifiers": [attentions] if attentions else None,
    }
    compile_options = settings({"method": "taylorseer", **fields})
    steps = [call for _ in range(2) for _, call in zoo.trajectory(name, 9)]
    with count_compiles() as plain:
        model = zoo.build(name)
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        zoo.first_tensor(model(**steps[0]))
    entire, blocks, oracle = zoo.build(name), zoo.build(name), zoo.taylorseer_oracle(name, **fields)
    with count_compiles() as counts:
        blocks.compile_repeated_blocks(fullgraph=True, **compile_options)
        results = [zoo.first_tensor(blocks(**call)) for call in steps]
    assert counts == plain
    summary = cachepass.summary(blocks)
    entire.compile(fullgraph=True, **compile_options)
    for step, (call, result) in enumerate(zip(steps, results, strict=True)):
        if step == 9:
            oracle.reset()
        for other in (zoo.first_tensor(entire(**call)), oracle(**call)):
            error = relative_error(result, other)
            assert error < 1e-5, f"step {step}: {error:.1e}"
    assert summary.predicted == {"taylorseer": 10}
    assert (summary.runs, summary.steps, summary.graphs) == (2, 18, plain.graphs)


class Failing(Net):
    """Raises behind its blocks, once it is told to."""

    fails = False

    def after(self, x):
        if self.fails:
            raise RuntimeError("injected")
        return x


class TimestepInBlocks(Failing):
    """Blocks that get the timestep itself, under its own name."""

    def __init__(self):
        super().__init__()
        self.blocks = transformer().blocks

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x, timestep)
        return self.proj_out(self.after(x))


@CACHES
@pytest.mark.parametrize("kind", [Failing, TimestepInBlocks])
@pytest.mark.parametrize("failing", [0, 2, 3])
@pytest.mark.covering(strength=2)
def test_a_step_that_fails_behind_its_blocks_is_repeated(kind, cache, failing):
    """The blocks ran, the model raised: the step is not over, and its repetition gives what it would have given."""
    model, expected = regional(net(kind), cache), ByHand(net(kind), cache)
    for run in range(2):
        expected.restart()
        for step, (x, t) in enumerate(calls(9)):
            if run == 1 and step == failing:
                model.fails = True
                with pytest.raises(RuntimeError, match="injected"):
                    model(x, t)
                model.fails = False
            error = relative_error(model(x, t), expected(x, t))
            assert error < 1e-5, f"run {run}, step {step}: {error:.1e}"
    summary = cachepass.summary(model)
    assert summary.predicted == fired(cache, 2)
    assert (summary.runs, summary.steps) == (2, 18)


@CACHES
def test_blocks_in_two_contexts(cache):
    """Two calls per step, each with a history of its own."""
    model = regional(net(), cache)
    expected = {name: ByHand(net(), cache) for name in ("cond", "uncond")}
    with count_compiles() as counts:
        for _ in range(2):
            for by_hand in expected.values():
                by_hand.restart()
            for x, t in calls(9):
                for name, value in (("cond", x), ("uncond", -2 * x)):
                    with cache_context(name):
                        assert relative_error(model(value, t), expected[name](value, t)) < 1e-5
    assert counts == CompileCounts(graphs=1)
    summary = cachepass.summary(model)
    assert set(summary.contexts) == {"cond", "uncond"}
    assert summary.predicted == fired(cache, 4)
    assert summary.cache_bytes == 2 * summary.planned_bytes


class Reused(Net):
    """The first block is called once more, behind the second."""

    order = (0, 1, 0)


@CACHES
@WAYS
def test_a_block_that_is_called_twice(way, cache):
    """Each of its calls has a history of its own."""
    check_two_runs(way, net(Reused), ByHand(net(Reused), cache), cache)


@CACHES
@WAYS
def test_two_models_of_one_class(way, cache):
    """They share a graph, and nothing else."""
    originals, expected = [net(), net(seed=1)], [ByHand(net(), cache), ByHand(net(seed=1), cache)]
    with count_compiles() as counts:
        models = [way(original, cache) for original in originals]
        for _ in range(2):
            for by_hand in expected:
                by_hand.restart()
            for call in calls(9):
                for model, by_hand in zip(models, expected, strict=True):
                    assert relative_error(model(*call), by_hand(*call)) < 1e-5
    assert counts == CompileCounts(graphs=1)
    for original in originals:
        summary = cachepass.summary(original)
        assert summary.predicted == fired(cache, 2)
        assert (summary.runs, summary.steps) == (2, 18)


# ---- graph breaks ---------------------------------------------------------------------------------------------------


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


class BreakInCalls(Net):
    """The graph breaks while Python has the feed-forward at hand, to call it next."""

    class block(Block):
        def forward(self, x, temb):
            x = x + self.attn(self.norm(x)) * self.scale(temb)[:, None]
            return x + self.ff(self.broken(x))

        def broken(self, x):
            torch._dynamo.graph_break()
            return x


def printing(where):
    """A model whose attentions print at the start, in the middle or at the end of their forward."""

    class PrintingAttention(Attention):
        def forward(self, x):
            if where == "start":
                print("attention of", tuple(x.shape))
            k, v = self.kv(x).chunk(2, -1)
            q = self.q(x)
            if where == "middle":
                print("attention of", tuple(q.shape))
            x = self.out(nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
            if where == "end":
                print("attention of", tuple(x.shape))
            return x

    class Printing(Net):
        class block(Block):
            attention = PrintingAttention

    return Printing


@CACHES
@pytest.mark.parametrize("by_itself", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("kind", [
    BreakBetween, BreakBehind, BreakInBlocks, BreakInCalls,
    *(pytest.param(printing(where), id=f"print-{where}") for where in ("start", "middle")),
])  # fmt: skip
@pytest.mark.covering(strength=2)
def test_a_model_whose_graph_breaks(kind, by_itself, cache):
    """Wherever it breaks, every step is that of the model without the break."""
    original, expected = net(kind), ByHand(net(), cache)
    with count_compiles() as counts:
        for part in original.blocks if by_itself else [original]:
            part.compile(**settings(cache))
        for _ in range(2):
            check(original, expected)
    assert (counts.graph_breaks == 0) == (by_itself and kind in (BreakBetween, BreakBehind))
    assert counts.recompiles == 0
    summary = cachepass.summary(original)
    assert summary.predicted == fired(cache, 2)
    assert (summary.runs, summary.steps) == (2, 18)


@CACHES
@pytest.mark.parametrize("by_itself", [False, True], ids=["whole", "regional"])
def test_a_break_behind_everything_that_an_attention_computes(by_itself, cache):
    """What is behind the break is no graph, so nothing of the attention can be forecast: an error that names it."""
    original = net(printing("end"))
    if cache["method"] == "taylorseer":
        cache = {**cache, "cache_identifiers": ["attention"]}
    for part in original.blocks if by_itself else [original]:
        part.compile(**settings(cache))
    first, second = calls(2)
    original(*first)
    with pytest.raises(cachepass.NoMatchError, match=r"graphs break inside .*blocks\.0\.attn"):
        original(*second)


# ---- parameters that move -------------------------------------------------------------------------------------------


def _offloaded_model(model):
    """accelerate moves the model as a whole."""
    return pytest.importorskip("accelerate").cpu_offload_with_hook(model, torch.device("cpu"))[0]


def _offloaded_blocks(model):
    """accelerate gives every block new parameters in every call."""
    hooks = pytest.importorskip("accelerate.hooks")
    for block in model.blocks:
        hook = hooks.AlignDevicesHook(torch.device("cpu"), offload=True, place_submodules=True)
        hooks.add_hook_to_module(block, hook)
    return model


@CACHES
@pytest.mark.parametrize("by_itself", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("offload", [_offloaded_model, _offloaded_blocks])
@pytest.mark.covering(strength=2)
def test_parameters_that_accelerate_offloads(offload, by_itself, cache):
    """New parameters in every call: still the same model, with one state."""
    original, expected = offload(net()), ByHand(net(), cache)
    for part in original.blocks if by_itself else [original]:
        part.compile(**settings(cache))
    sizes = set()
    for _ in range(3):
        check(original, expected)
        sizes.add(cachepass.summary(original).cache_bytes)
    summary = cachepass.summary(original)
    assert summary.predicted == fired(cache, 3)
    assert (summary.runs, summary.steps) == (3, 27)
    assert sizes == {summary.planned_bytes}


@pytest.mark.parametrize("by_itself", [False, True], ids=["whole", "regional"])
def test_group_offloading_of_diffusers(by_itself):
    name, fields = "WanTransformer3DModel", {"cache_identifiers": [r".*attn\d"]}
    fields |= {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
    model, oracle = zoo.build(name), zoo.taylorseer_oracle(name, **fields)
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=1)
    compile_parts = model.compile_repeated_blocks if by_itself else model.compile
    compile_parts(**settings({"method": "taylorseer", **fields}))
    sizes = set()
    for run in range(2):
        for step, (_, call) in enumerate(zoo.trajectory(name, 9)):
            error = relative_error(zoo.first_tensor(model(**call)), oracle(**call))
            assert error < 1e-5, f"run {run}, step {step}: {error:.1e}"
        oracle.reset()
        sizes.add(cachepass.summary(model).cache_bytes)
    summary = cachepass.summary(model)
    assert summary.predicted == {"taylorseer": 10}
    assert sizes == {summary.planned_bytes}


# ---- copies, threads, memory ----------------------------------------------------------------------------------------


@CACHES
@WAYS
def test_a_deepcopy_has_its_own_state(way, cache):
    """Made in the middle of a run, which goes on in between."""
    original, expected, of_twin = net(), ByHand(net(), cache), ByHand(net(), cache)
    model, run = way(original, cache), calls(9)
    expected.restart()
    for call in run[:4]:
        assert relative_error(model(*call), expected(*call)) < 1e-5
    twin = way(copy.deepcopy(original), cache)  # torch's copies are not compiled
    for step, call in enumerate(run):
        if step < 5:
            assert relative_error(model(*run[4 + step]), expected(*run[4 + step])) < 1e-5
        assert relative_error(twin(*call), of_twin(*call)) < 1e-5
    for one in (original, twin):
        summary = cachepass.summary(one)
        assert summary.predicted == fired(cache)
        assert (summary.runs, summary.steps) == (1, 9)


@CACHES
def test_threads_with_contexts_of_their_own(cache):
    model, expected = regional(net(), cache), ByHand(net(), cache)
    check(model, expected)
    expected.restart()
    reference, results = [expected(*call) for call in calls(9)], {}

    def work(name):
        with torch.no_grad(), cache_context(name):
            results[name] = [[model(*call) for call in calls(9)] for _ in range(2)]

    threads = [threading.Thread(target=work, args=(f"user-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for runs in results.values():
        for run in runs:
            for result, other in zip(run, reference, strict=True):
                assert relative_error(result, other) < 1e-5
    assert cachepass.summary(model).predicted == fired(cache, 9)


class Held(Net):
    """A call of it can be held open behind its blocks."""

    inside = release = None

    def after(self, x):
        if self.inside is not None:
            inside, self.inside = self.inside, None
            inside.set()
            assert self.release.wait(60)
        return x


def test_one_context_in_two_threads():
    """The second call raises; the first one is right, and so is the rest of its run."""
    model, expected = regional(net(Held)), ByHand(net(Held))
    check(model, expected)
    expected.restart()
    run, results = calls(9), []
    model.inside, model.release = inside, release = threading.Event(), threading.Event()

    def work():
        with torch.no_grad(), cache_context("shared"):
            results.extend(model(*call) for call in run[:4])

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    with cache_context("shared"), pytest.raises(cachepass.ConcurrencyError, match="cache_context"):
        model(*run[0])
    release.set()
    thread.join()
    with cache_context("shared"):
        results.extend(model(*call) for call in run[4:])
    for result, call in zip(results, run, strict=True):
        assert relative_error(result, expected(*call)) < 1e-5
    summary = cachepass.summary(model)
    assert summary.predicted == fired(runs=2)
    assert (summary.runs, summary.steps) == (2, 18)


def slots_of(model):
    runs = {run for _, instance in programs_of(model) for run in instance.model.runs}
    rings = [ring for run in runs for state in run.states.values() for ring in state.rings.values()]
    return [slot for ring in rings for slot in ring]


@CACHES
@WAYS
@pytest.mark.covering
def test_models_blocks_and_slots_are_freed(way, cache):
    original = net()
    model = way(original, cache)
    check(model, ByHand(net(), cache))
    block = original.blocks[0]
    held = [weakref.ref(thing) for thing in (original, block, block.ff.up.weight, *slots_of(original))]
    assert len(held) > 4
    del original, model, block
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def live_tensors():
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


@WAYS
def test_a_compiled_graph_keeps_neither_inputs_nor_the_model(way):
    """The inputs of the first call, in which the graph was captured, die with it; the model dies without a reset."""
    model = net()
    compiled, run = way(model), calls(9)
    first, parameter = weakref.ref(run[0][0]), weakref.ref(model.proj_out.weight)
    for call in run:
        compiled(*call)
    del run, call
    gc.collect()
    assert first() is None
    del model, compiled
    gc.collect()
    assert parameter() is None


@CACHES
@WAYS
@pytest.mark.covering
def test_memory_is_flat(way, cache):
    """Of all tensors that Python can reach, less those of other tests."""
    others = {id(tensor): tensor for tensor in live_tensors()}
    original, expected = net(), ByHand(net(), cache)
    model, sizes = way(original, cache), []
    for run in range(10):
        check(model, expected)
        if run in (2, 9):
            storages = [tensor.untyped_storage() for tensor in live_tensors() if id(tensor) not in others]
            sizes.append(sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
            del storages
    assert sizes[0] == sizes[1] > 0
    assert cachepass.summary(original).predicted == fired(cache, 10)
