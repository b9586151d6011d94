"""FasterCache: equal to diffusers' hooks where those work, and to its definition, written slowly, everywhere."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref

import pytest
import torch
from reference import FasterCache
from small_models import Transformer, transformer
from torch import nn
from zoo import (
    ZOO,
    build,
    clock_of,
    fastercache_oracle,
    first_tensor,
    is_one_graph,
    relative_error,
    sweep_over,
    timestep_scale,
    trajectory,
)

import cachepass
from cachepass.recipe.frequency import low_frequencies
from cachepass.run.step import StepCall
from cachepass.testing import count_compiles

STEPS = 20
TOLERANCE = 1e-5  # relative, fp32; seen: 4e-7
GRIDS = {"LTXVideoTransformer3DModel": (2, 16, 16)}  # frames, height, width; the other token models are 4 x 4


def compiled(name, fields, *, steps=STEPS, lowering="eager", **options):
    return torch.compile(
        build(name),
        backend="cached_inductor",
        fullgraph=True,
        options={
            "cache": {"method": "fastercache", **fields},
            "lowering": lowering,
            "num_inference_steps": steps,
            "timestep_scale": timestep_scale(name),
            **options,
        },
    )


def assert_parity(name, fields, *, runs=2, steps=STEPS, guided=True):
    """Step by step over two runs, against diffusers' hooks."""
    now = [0.0]
    model, oracle = compiled(name, fields, steps=steps), fastercache_oracle(name, now, **fields)
    for run in range(runs):
        for step, (timestep, call) in enumerate(trajectory(name, steps, guided=guided)):
            now[0] = timestep
            error = relative_error(first_tensor(model(**call)), oracle(**call))
            assert error < TOLERANCE, f"run {run}, step {step}: {error:.1e}"
        oracle.reset()
    summary = cachepass.summary(model)
    assert summary.cache_bytes == summary.planned_bytes > 0
    assert summary.runs == runs
    return summary


PARITY = {
    "CogVideoXTransformer3DModel": {"tensor_format": "BFCHW"},
    "LatteTransformer3DModel": {"temporal_attention_block_skip_range": 3},
    "AllegroTransformer3DModel": {},
    "MochiTransformer3DModel": {},
    "PixArtTransformer2DModel": {"tensor_format": "BCHW"},
}


@pytest.mark.parametrize("name", PARITY)
def test_parity_with_the_hooks_of_diffusers(name):
    summary = assert_parity(name, PARITY[name])
    kinds = {"spatial", "unconditional"} | ({"temporal"} if name.startswith("Latte") else set())
    assert {group for group, count in summary.predicted.items() if count} == kinds


def test_parity_of_a_guidance_distilled_model():
    """The first timestep lies out of the range: diffusers forecasts from nothing where it does not."""
    name = "HunyuanVideoTransformer3DModel"
    summary = assert_parity(name, {"is_guidance_distilled": True}, guided=False)
    assert summary.predicted["spatial"] > 0 and "unconditional" not in summary.predicted


RANGES = {
    "from the start": {"unconditional_batch_timestep_skip_range": (400, 1001),
                       "spatial_attention_timestep_skip_range": (500, 1001)},
    "to the end": {"unconditional_batch_timestep_skip_range": (-1, 700),
                   "spatial_attention_timestep_skip_range": (-1, 300)},
    "inside": {"unconditional_batch_timestep_skip_range": (200, 800),
               "spatial_attention_timestep_skip_range": (300, 700)},
    "weights inside": {"unconditional_batch_timestep_skip_range": (-1, 1001),
                       "low_frequency_weight_update_timestep_range": (300, 600),
                       "high_frequency_weight_update_timestep_range": (400, 1001)},
    "always": {"unconditional_batch_timestep_skip_range": (-1, 1001), "unconditional_batch_skip_range": 4,
               "spatial_attention_timestep_skip_range": (-1, 1001), "spatial_attention_block_skip_range": 3},
}  # fmt: skip


@pytest.mark.parametrize("where", RANGES)
def test_timestep_ranges(where):
    summary = assert_parity("PixArtTransformer2DModel", {"tensor_format": "BCHW", **RANGES[where]})
    assert summary.predicted["unconditional"] > 0


def test_custom_callbacks_get_their_modules():
    """Weights by module: rows of the weights tensor; diffusers' callbacks see the same modules."""
    seen: set[str] = set()

    def attention(module):
        seen.add(type(module).__name__)
        return 0.1 + 0.01 * (sum(p.numel() for p in module.parameters()) % 7) + float(module.to_q.weight[0, 0])

    def frequency(module):
        seen.add(type(module).__name__)
        return 1.05

    fields = {
        "tensor_format": "BCHW",
        "attention_weight_callback": attention,
        "low_frequency_weight_callback": frequency,
        "high_frequency_weight_callback": lambda _: 0.9,
    }
    assert_parity("PixArtTransformer2DModel", fields)
    assert seen == {"Attention", "PixArtTransformer2DModel"}


def test_config_objects_of_diffusers_are_accepted():
    from diffusers import FasterCacheConfig

    theirs = FasterCacheConfig(tensor_format="BCHW", current_timestep_callback=lambda: 500)
    ours = cachepass.options.parse_options({"cache": theirs}, None, set(), {"default": {}}).cache
    assert ours == cachepass.FasterCacheConfig(
        tensor_format="BCHW", current_timestep_callback=theirs.current_timestep_callback
    )


# ---- the definition, for every model ---------------------------------------------------------------------------------


SIZED_BY_DATA = "HunyuanVideoFramepackTransformer3DModel"  # its output is cut at a length that it reads from a mask


def batch_of(call):
    return len(call.get("hidden_states", call.get("x")))


def sweep_fields(name, call):
    """The tensor format (and the grid) of a model of the zoo, from one eager call."""
    output = first_tensor(build(name)(**call))
    if "x" in call:  # a list of samples
        return {"tensor_format": "BCFHW"}
    tensor_format = {3: "BSC", 4: "BCHW", 5: "BCFHW"}[output.ndim]
    return {"tensor_format": tensor_format, **({"latent_grid": GRIDS.get(name, (4, 4))} if output.ndim == 3 else {})}


def assert_definition(name, fields, *, steps=6, runs=3, lowering="eager", sweep=None):
    """Every step as defined; one capture at full and one at half batch, no break, no recompile."""
    calls = list(trajectory(name, steps, guided=True))
    batch = batch_of(calls[0][1])
    largest = 0.0
    with count_compiles() as count:
        model = compiled(name, fields, steps=steps, lowering=lowering)
        first_tensor(model(**calls[0][1]))
        cachepass.reset(model)
        dispatcher = next(cachepass.inspect.summary.programs_of(model))[0]
        kinds = {cut.region: cut.group for cut in dispatcher.program.plan.cuts}
        config = dispatcher.method.config
        definition = FasterCache(build(name), config, kinds)
        for run in range(runs):
            for step, (timestep, call) in enumerate(calls):
                output = model(**call)
                value = output[0] if isinstance(output, tuple) else output.sample
                value = torch.stack(value) if isinstance(value, list) else value
                error = relative_error(value, definition(timestep, batch, **call))
                assert error < TOLERANCE, f"run {run}, step {step}: {error:.1e}"
                largest = max(largest, error)
            definition.start()
    if sweep is not None:
        sweep("fastercache", largest)
    assert (count.graphs, count.graph_breaks, count.recompiles) == (2, 0, 0)
    summary = cachepass.summary(model)
    assert summary.predicted["unconditional"] == runs * (steps - 2)
    assert summary.cache_bytes == summary.planned_bytes
    return summary


ALWAYS = {
    "unconditional_batch_timestep_skip_range": (-1, 1001),
    "spatial_attention_timestep_skip_range": (-1, 1001),
    "high_frequency_weight_update_timestep_range": (-1, 700),
}


# Images and videos as tensors and as lists, samples as planes and as tokens, prompts in the batch and beside it.
KINDS = ("FluxTransformer2DModel", "PixArtTransformer2DModel", "LatteTransformer3DModel", "WanTransformer3DModel",
         "CogVideoXTransformer3DModel", "ZImageTransformer2DModel", "SD3Transformer2DModel")  # fmt: skip


@pytest.mark.parametrize("name", sweep_over(
    [name for name in ZOO if is_one_graph(name) and clock_of(name) and name != SIZED_BY_DATA],
    few=["WanTransformer3DModel", "ZImageTransformer2DModel"],
))  # fmt: skip
def test_every_model_with_a_guidance_batch(name, sweep):
    fields = sweep_fields(name, next(iter(trajectory(name, 1, guided=True)))[1])
    summary = assert_definition(name, {**fields, **ALWAYS}, sweep=sweep)
    assert summary.predicted["spatial"] > 0


def test_conditional_first():
    assert_definition("PixArtTransformer2DModel", {"tensor_format": "BCHW", "unconditional_first": False, **ALWAYS})


def test_feed_forwards_are_a_kind_too():
    fields = {"tensor_format": "BCHW", "mlp_block_skip_range": 3, "mlp_timestep_skip_range": (-1, 600), **ALWAYS}
    summary = assert_definition("DiTTransformer2DModel", fields)
    assert summary.predicted["mlp"] > 0


def test_unconditional_branch_alone():
    fields = {"tensor_format": "BCHW", **ALWAYS, "spatial_attention_block_skip_range": None}
    summary = assert_definition("DiTTransformer2DModel", fields)
    assert set(summary.predicted) == {"unconditional"}


@pytest.mark.inductor
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_lowered_with_inductor(lowering):
    fields = {"tensor_format": "BCHW", **ALWAYS}
    summary = assert_definition("PixArtTransformer2DModel", fields, lowering=lowering)
    assert (
        set(summary.variants)
        == {"once", "half/once", "both"}
        | {
            "specialize": {"half", "half/predict"},
            "cond": {"half/cond"},
        }[lowering]
    )


# ---- small models ----------------------------------------------------------------------------------------------------


class Guided(nn.Module):
    """A transformer over images: ``hidden_states [2B, C, H, W]`` in, the same out."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.inner = Transformer(depth=2, width=channels)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, shift: torch.Tensor | None = None):
        batch, channels, height, width = hidden_states.shape
        tokens = hidden_states.flatten(2).transpose(1, 2)
        out = self.inner(tokens if shift is None else tokens + shift[:, None], timestep)
        return out.transpose(1, 2).reshape(batch, channels, height, width)


IDENTIFIERS = ("blocks.*attn",)
SMALL = {"method": "fastercache", "tensor_format": "BCHW", "spatial_attention_block_identifiers": IDENTIFIERS,
         **ALWAYS, "unconditional_batch_skip_range": 3}  # fmt: skip


def guided(seed: int = 0) -> Guided:
    torch.manual_seed(seed)
    return Guided().eval().requires_grad_(False)


def guided_calls(steps: int, batch: int = 4, size: tuple[int, int] = (6, 5), seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 8, *size, generator=generator)
    return [
        (x * (1 - 0.04 * s) + 0.05 * torch.randn(x.shape, generator=generator), torch.full((batch,), 900.0 - 70 * s))
        for s in range(steps)
    ]


def small(cache=SMALL, model=None, **options):
    return torch.compile(
        model or guided(),
        backend="cached_inductor",
        fullgraph=True,
        options={"cache": cache, "lowering": "eager", **options},
    )


def test_the_half_batch_program_has_half_batch_shapes_and_no_fourier_transform():
    x, t = guided_calls(1)[0]
    explanation = cachepass.explain(guided(), x, t, cache=SMALL)
    assert explanation.phases == ("both", "half", "half/predict")
    assert "halved on steps that run it: hidden_states, timestep" in str(explanation)
    assert "fft" in explanation.graph("both")
    for phase in ("half", "half/predict"):
        assert "fft" not in explanation.graph(phase)
        nodes = explanation.variant(phase).graph.find_nodes(op="placeholder")
        nodes += [n for n in explanation.variant(phase).graph.nodes if n.op == "call_function"]
        whole = [n.name for n in nodes if isinstance(n.meta["val"], torch.Tensor) and 4 in n.meta["val"].shape[:1]]
        assert whole == ["cached_cat"]  # the completed batch, of which the model computed half
        scaled = [n for n in nodes if isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].shape[:1] == (4 * 30,)]
        assert not scaled  # tokens of all samples, where linears flatten them
    assert explanation.nodes("half/predict") < explanation.nodes("half") < explanation.nodes("both") + 10
    width, tokens = 8, 30
    attention = 2 * 2 * (2 * tokens * width * 4)  # blocks, slots, bytes of the conditional half
    differences = 2 * (2 * width * tokens * 4)
    assert explanation.cache_bytes == attention + differences


def test_an_answered_call_does_not_run_the_model():
    model, pairs = small(num_inference_steps=6), guided_calls(6, batch=1)
    for x, t in pairs:
        for context in ("cond", "uncond"):
            with cachepass.cache_context(context):
                model(x, t)
    program = next(cachepass.inspect.summary.programs_of(model))[0].program
    answer = next(phase for phase in program.plan.phases if phase.route.name == "answer")
    graph = program.specialized(answer).gm.graph
    assert "fft" not in str(graph)
    assert sum(node.op == "call_function" for node in graph.nodes) <= 6  # cond + a_low * D_low + a_high * D_high
    assert not any(node.users for node in graph.find_nodes(op="placeholder") if node.name in ("arg0_1", "arg1_1"))


@pytest.mark.parametrize("lowering", ["eager", pytest.param("cond", marks=pytest.mark.inductor)])
def test_two_calls_per_step_equal_the_batch(lowering):
    """One call in the context "cond", one in "uncond": the same outputs as one call with both, and half of the calls
    of the unconditional branch are answered."""
    both, two = small(num_inference_steps=7), small(num_inference_steps=7, lowering=lowering)
    for _ in range(2):
        for x, t in guided_calls(7):
            uncond, cond = both(x, t).chunk(2)
            with cachepass.cache_context("cond"):
                assert relative_error(two(x[2:], t[2:]), cond) < TOLERANCE
            with cachepass.cache_context("uncond"):
                assert relative_error(two(x[:2], t[:2]), uncond) < TOLERANCE
    summary = cachepass.summary(two)
    assert summary.predicted["unconditional"] == cachepass.summary(both).predicted["unconditional"] == 8
    assert summary.predicted["spatial"] == cachepass.summary(both).predicted["spatial"] > 0
    assert summary.cache_bytes == summary.planned_bytes
    assert summary.contexts == ("cond", "uncond")


def test_pairs_of_contexts_by_prefix_do_not_see_each_other():
    one, calls = small(num_inference_steps=5), {name: guided_calls(5, batch=1, seed=i) for i, name in enumerate("ab")}
    singles = {name: small(num_inference_steps=5) for name in calls}
    for step in range(5):
        for half in ("cond", "uncond"):
            for name, inputs in calls.items():
                x, t = inputs[step]
                x = x if half == "cond" else -x
                with cachepass.cache_context(f"{name}/{half}"):
                    shared = one(x, t)
                with cachepass.cache_context(half):
                    assert torch.equal(shared, singles[name](x, t))
    assert cachepass.summary(one).predicted["unconditional"] == 6


def test_guidance_batches_of_two_contexts_do_not_see_each_other():
    """diffusers keeps one state for all contexts."""
    one, alone = small(num_inference_steps=6), [small(num_inference_steps=6) for _ in range(2)]
    inputs = [guided_calls(6, seed=seed) for seed in (1, 2)]
    for step in range(6):
        for i, calls in enumerate(inputs):
            with cachepass.cache_context(f"image {i}"):
                shared = one(*calls[step])
            assert torch.equal(shared, alone[i](*calls[step]))


def test_an_unconditional_call_that_comes_first_is_computed():
    model, plain = small(num_inference_steps=9), guided()
    with pytest.warns(cachepass.CachepassWarning, match="'cond' must come before"):
        for x, t in guided_calls(9, batch=1):
            for context in ("uncond", "cond"):
                with cachepass.cache_context(context):
                    assert relative_error(model(x, t), plain(x, t)) < TOLERANCE
    assert sum(cachepass.summary(model).predicted.values()) == 0


def test_a_distilled_model_whose_first_timestep_is_in_range_is_computed():
    """diffusers forecasts from nothing there and fails."""
    cache = {**SMALL, "is_guidance_distilled": True, "spatial_attention_block_skip_range": 2}
    model, plain = small(cache, num_inference_steps=4), guided()
    x, t = guided_calls(1, batch=1)[0]
    outputs = [model(x, t - 10 * step) for step in range(4)]
    assert relative_error(outputs[0], plain(x, t)) < TOLERANCE
    assert cachepass.summary(model).predicted["spatial"] == 2


@pytest.mark.parametrize("lowering", ["eager", pytest.param("specialize", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("failing", [1, 3])
@pytest.mark.covering
def test_a_failed_step_leaves_a_usable_history(failing, lowering):
    """A skipped step (1) that fails costs its oldest attention outputs, a full one (3) nothing but its own."""
    model, again = small(num_inference_steps=6, lowering=lowering), small(num_inference_steps=6)
    dispatcher = None
    for step, (x, t) in enumerate(guided_calls(6)):
        expected = again(x, t)
        if step == failing:
            dispatcher = next(cachepass.inspect.summary.programs_of(model))[0]
            with failing_after_its_writes(dispatcher.program), pytest.raises(RuntimeError, match="interrupted"):
                model(x, t)
        result = model(x, t)
        assert torch.isfinite(result).all()
        if failing == 3 or step < failing:
            assert relative_error(result, expected) < TOLERANCE
    assert cachepass.summary(model).steps == 6


class failing_after_its_writes:
    """The variants of a program run, fill the slots that they write with nan, and raise."""

    def __init__(self, program) -> None:
        self.program = program

    def __enter__(self):
        self.run = run = StepCall.run

        def fail(call, inputs):
            result = run(call, inputs)
            if call.program is not self.program:
                return result
            for group in (*call.computed, *call.phase.predicted):
                history = call.state.groups[group]
                for cut in call.state.plan.live_cuts:
                    if cut.group == group:
                        ring = call.state.rings[cut.index]
                        ring[(history.head - 1) % len(ring)].fill_(float("nan"))
            if "unconditional" in call.computed:
                for slot in call.state.outputs.values():
                    slot.fill_(float("nan"))
            raise RuntimeError("interrupted")

        StepCall.run = fail

    def __exit__(self, *_):
        StepCall.run = self.run


def test_another_resolution_is_another_static_program():
    """Dynamo would go symbolic at the second size: it is asked for static shapes again."""
    model, plain = small(num_inference_steps=3), guided()
    for size in ((6, 5), (8, 4), (10, 10)):
        for x, t in guided_calls(3, size=size):
            result = model(x, t)
            assert not {*vars(x), *vars(t)}  # nothing is left on the caller's tensors
        assert result.shape == x.shape
        assert relative_error(model(*guided_calls(1, size=size)[0]), plain(*guided_calls(1, size=size)[0])) < TOLERANCE
        cachepass.reset(model)
    programs = [dispatcher.program for dispatcher, _ in cachepass.inspect.summary.programs_of(model)]
    assert len(programs) == 3
    for program in programs:
        assert all(isinstance(size, int) for cut in program.plan.cuts for size in cut.shape)


@pytest.mark.parametrize("dynamic", [None, True])
def test_positional_inputs_of_a_wrapped_forward(dynamic):
    """Models of diffusers wrap ``forward`` in a function of ``*args``: inputs are known by the signature behind it."""

    def wrapped(function):
        @functools.wraps(function)
        def forward(self, *args, **kwargs):
            return function(self, *args, **kwargs)

        return forward

    class Wrapped(Guided):
        forward = wrapped(Guided.forward)

    torch.manual_seed(0)
    options = {"cache": SMALL, "lowering": "eager"}
    model = torch.compile(Wrapped().eval(), backend="cached_inductor", fullgraph=True, dynamic=dynamic, options=options)
    torch.manual_seed(0)
    same = small()
    for x, t in guided_calls(4):
        assert relative_error(model(x, t), same(x, t)) < TOLERANCE
    assert cachepass.summary(model).predicted["unconditional"] == 2


def test_the_capture_at_half_batch_keeps_nothing_alive():
    model = guided()
    compiled_model = small(model=model, num_inference_steps=3)
    references = [weakref.ref(model)]
    for x, t in guided_calls(3):
        compiled_model(x, t)
        references += [weakref.ref(x), weakref.ref(t)]
    del model, compiled_model, x, t
    gc.collect()
    assert [reference() for reference in references] == [None] * 7


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_cuda(lowering):
    """The same results as the eager lowering, for a guidance batch and for two calls per step."""
    fast, slow = (small(model=guided().cuda(), num_inference_steps=7, lowering=name) for name in (lowering, "eager"))
    for x, t in guided_calls(7):
        x, t = x.cuda(), t.cuda()
        assert relative_error(fast(x, t), slow(x, t)) < TOLERANCE
        for context, half in (("cond", slice(2, 4)), ("uncond", slice(0, 2))):
            with cachepass.cache_context(context):
                assert relative_error(fast(x[half], t[half]), slow(x[half], t[half])) < TOLERANCE


def test_low_frequencies_are_a_projection_onto_a_disc():
    x = torch.randn(2, 3, 12, 15, dtype=torch.float64)
    low = low_frequencies(x)
    assert torch.allclose(low_frequencies(low), low, atol=1e-12)
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(15.0), indexing="ij")
    inside, outside = (
        torch.cos(2 * torch.pi * (k * rows / 12 + m * columns / 15)).double() for k, m in ((1, -1), (2, 1))
    )
    assert torch.allclose(low_frequencies(inside), inside, atol=1e-5)  # 1 + 1 <= (12 // 5) ** 2
    assert low_frequencies(outside).abs().max() < 1e-5  # 4 + 1 > 4


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def test_an_output_whose_size_depends_on_data():
    call = next(iter(trajectory(SIZED_BY_DATA, 1, guided=True)))[1]
    with pytest.raises(cachepass.OutputError, match="depends on the data"):
        compiled(SIZED_BY_DATA, {"tensor_format": "BCFHW"})(**call)


@pytest.mark.parametrize("name", [name for name in ZOO if not is_one_graph(name)])
def test_guidance_needs_the_whole_model_as_one_graph(name):
    cache = {"method": "fastercache", "tensor_format": "BCHW"}
    model = torch.compile(build(name), backend="cached_inductor", options={"cache": cache, "lowering": "eager"})
    with pytest.raises(cachepass.PartialGraphError, match="only a part of the model") as caught:
        model(**next(iter(trajectory(name, 1, guided=True)))[1])
    assert "is_guidance_distilled" in str(caught.value)


def test_an_odd_batch_names_the_input_and_its_shape():
    with pytest.raises(cachepass.BatchError, match=r"input hidden_states: its batch is odd \(3x8x6x5\)"):
        small()(*guided_calls(1, batch=3)[0])


def test_a_batch_of_one_says_how_else_to_call():
    with pytest.raises(cachepass.BatchError, match="is_guidance_distilled=True") as info:
        small()(*guided_calls(1, batch=1)[0])
    assert 'cache_context("cond")' in str(info.value)


def test_inputs_of_different_batches_are_named():
    class Prompted(Guided):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            return super().forward(hidden_states, timestep, encoder_hidden_states.mean(0, keepdim=True))

    x, t = guided_calls(1)[0]
    with pytest.raises(
        cachepass.BatchError, match="input encoder_hidden_states: its batch is 3x8, that of hidden_stat"
    ):
        small(model=Prompted().eval())(x, t, torch.ones(3, 8))


def test_a_batched_input_that_is_not_named_is_pointed_at():
    x, t = guided_calls(1)[0]
    with pytest.raises(cachepass.BatchError, match=r"cannot be traced at half batch.*") as info:
        small()(x, t, torch.ones(4, 8))
    assert "left whole, with the batch's size in front: shift (4x8)" in str(info.value)
    assert "_unconditional_conditional_input_kwargs_identifiers" in str(info.value)
    names = ["hidden_states", "timestep", "shift"]
    model = small({**SMALL, "_unconditional_conditional_input_kwargs_identifiers": names})
    assert model(x, t, torch.ones(4, 8)).shape == x.shape


def test_a_function_that_makes_the_batch_is_told_what_to_compile():
    model = guided()

    def step(x, timestep):
        return model(torch.cat([x, x]), timestep.expand(2))

    x, t = guided_calls(1, batch=1)[0]
    with pytest.raises(cachepass.BatchError, match="the transformer, not a function that makes the batch"):
        small(model=step)(x, t)


def test_no_input_of_a_known_name():
    class Renamed(Guided):
        def forward(self, latent, timestep):
            return super().forward(latent, timestep)

    names = ["image"]
    x, t = guided_calls(1)[0]
    with pytest.raises(cachepass.BatchError, match="no tensor input of the model carries a guidance batch") as info:
        small({**SMALL, "_unconditional_conditional_input_kwargs_identifiers": names}, Renamed().eval())(x, t)
    assert "the model's inputs: latent, timestep" in str(info.value)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"tensor_format": "BCFHW"}, r'output is 4x8x6x5, tensor_format="BCFHW" has 5 dimensions\n.*"BCHW"'),
        ({"tensor_format": "BSC", "latent_grid": (5, 6)}, r'output is 4x8x6x5, tensor_format="BSC"'),
    ],
)
def test_a_wrong_tensor_format_names_the_shape_and_the_right_one(fields, match):
    with pytest.raises(cachepass.OutputError, match=match):
        small({**SMALL, **fields})(*guided_calls(1)[0])


def test_an_output_that_is_no_image():
    class Pooled(Guided):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states, timestep).mean((2, 3))

    with pytest.raises(cachepass.OutputError, match=r"output is 4x8.*\n.*no image or video"):
        small(model=Pooled().eval())(*guided_calls(1)[0])


def test_an_output_that_does_not_follow_the_batch():
    class Summed(Guided):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states, timestep).sum(0, keepdim=True)

    with pytest.raises(cachepass.OutputError, match="does not follow its batch: it returns 1x8x6x5 for the whole"):
        small(model=Summed().eval())(*guided_calls(1)[0])


def test_a_second_output_with_the_batch():
    class Twice(Guided):
        def forward(self, hidden_states, timestep):
            out = super().forward(hidden_states, timestep)
            return out, out.mean((2, 3))

    with pytest.raises(cachepass.OutputError, match=r"output 1 of the model \(4x8\) carries the batch too"):
        small(model=Twice().eval())(*guided_calls(1)[0])


def test_a_grid_of_another_size():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformer()

        def forward(self, hidden_states, timestep):
            return self.inner(hidden_states, timestep)

    cache = {**SMALL, "tensor_format": "BSC", "latent_grid": (4, 4)}
    with pytest.raises(cachepass.OutputError, match=r"latent_grid=\(4, 4\) has 16 tokens.*4x30x8.* has 30"):
        small(cache, Tokens().eval())(torch.randn(4, 30, 8), torch.full((4,), 900.0))


@pytest.mark.parametrize(("first", "then"), [("cond", "default"), ("default", "cond")])
def test_another_way_of_calling_at_the_same_size(first, then):
    model = small()
    x, t = guided_calls(1)[0]
    with cachepass.cache_context(first):
        model(x, t)
    captured = "two calls per step" if first == "cond" else "guidance batches"
    with cachepass.cache_context(then), pytest.raises(cachepass.BatchError, match=f"captured for {captured}"):
        model(x, t)
    with cachepass.cache_context(first):
        model(x, t - 100)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"tensor_format": "BCWH"}, "there is no format 'BCWH'"),
        ({"tensor_format": "BSC"}, r"expected \(height, width\) or \(frames, height, width\), got None"),
        ({"latent_grid": (4, 4)}, "tensor_format is 'BCFHW'"),
        ({"alpha_low_frequency": 0}, "alpha_low_frequency: expected a positive number"),
        ({"unconditional_batch_skip_range": 0}, "unconditional_batch_skip_range: 0 is out of range"),
        ({"attention_weight_callback": 0.5}, "attention_weight_callback: expected a function"),
        ({"low_frequency_weight_update_timestep_range": (900, 99)}, "empty or reversed"),
        ({"_unconditional_conditional_input_kwargs_identifiers": []}, "expected a list of input names"),
        ({"unconditional_first": 1}, "unconditional_first: expected a bool"),
        ({"alpha_lo": 1.0}, "unknown field 'alpha_lo'"),
    ],
)
def test_config_errors(fields, match):
    with pytest.raises(cachepass.ConfigError, match=match):
        cachepass.FasterCacheConfig(**fields)


def test_never_skipping_is_said_and_costs_nothing():
    model = small({**SMALL, "unconditional_batch_skip_range": 1})
    with pytest.warns(cachepass.CachepassWarning, match="unconditional_batch_skip_range=1"):
        model(*guided_calls(1)[0])


def test_identifiers_that_match_nothing_are_listed():
    with pytest.raises(cachepass.NoMatchError, match=r"'blokcs' matches no module.*\n.*inner\.blocks\.0\.attn"):
        small({**SMALL, "spatial_attention_block_identifiers": ["blokcs"]})(*guided_calls(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(
            {
                **SMALL,
                "spatial_attention_block_identifiers": cachepass.FasterCacheConfig.spatial_attention_block_identifiers,
            }
        )(*guided_calls(1)[0])
