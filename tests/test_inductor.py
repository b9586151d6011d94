"""Through Inductor: parity with diffusers' hooks, the three lowerings, capture counts, equality with plain Inductor.

Semantics are tested on every model with the eager lowering. Through Inductor it is models of three families, and with
``CACHEPASS_ZOO=1`` more of them.
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from small_models import Attention, calls, transformer
from zoo import (
    ALL,
    build,
    first_tensor,
    is_one_graph,
    pab_oracle,
    relative_error,
    taylorseer_oracle,
    timestep_scale,
    trajectory,
)

import cachepass
from cachepass.testing import count_compiles

pytestmark = pytest.mark.inductor

STEPS = 7
TAYLOR = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1,
          "taylor_factors_dtype": torch.float32}  # fmt: skip
PAB = {"method": "pab", "spatial_attention_block_skip_range": 2}
DECIDING = [
    {"method": "first_block_cache", "threshold": 0.12},
    {"method": "dbcache", "Fn_compute_blocks": 1, "residual_diff_threshold": 0.12, "max_warmup_steps": 2},
]


def compiled(name_or_model, cache, **options):
    model = build(name_or_model) if isinstance(name_or_model, str) else name_or_model
    fullgraph = not isinstance(name_or_model, str) or is_one_graph(name_or_model)
    return torch.compile(model, backend="cached_inductor", fullgraph=fullgraph, options={"cache": cache, **options})


def on_cuda(value):
    """Inputs, or what is in them, moved to the GPU."""
    if isinstance(value, dict):
        return {key: on_cuda(inner) for key, inner in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) else value


def outputs(model, name, steps=STEPS):
    return [first_tensor(model(**call)) for _, call in trajectory(name, steps)]


@pytest.mark.parametrize("name", [
    "DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel",
    *(("HunyuanDiT2DModel", "OmniGenTransformer2DModel", "PixArtTransformer2DModel", "QwenImageTransformer2DModel",
       "SD3Transformer2DModel", "SanaTransformer2DModel", "UVit2DModel") if ALL else ()),
])  # fmt: skip
def test_taylorseer_parity_through_inductor(name):
    """1e-5 relative to diffusers' eager hooks, over two runs."""
    fields = {k: v for k, v in TAYLOR.items() if k != "method"}
    fields["cache_identifiers"] = [r".*\.(attn\d?|self_attn|ff|ffn)"]
    oracle, model = taylorseer_oracle(name, **fields), compiled(name, {**TAYLOR, **fields}, num_inference_steps=STEPS)
    for run in range(2):
        for step, (_, call) in enumerate(trajectory(name, STEPS)):
            error = relative_error(first_tensor(model(**call)), oracle(**call))
            assert error < 1e-5, f"run {run}, step {step}: {error:.1e}"
        oracle.reset()
    summary = cachepass.summary(model)
    assert summary.predicted["taylorseer"] == 6
    assert summary.cache_bytes == summary.planned_bytes


@pytest.mark.parametrize("name", [
    "LatteTransformer3DModel", *(("CogVideoXTransformer3DModel", "AllegroTransformer3DModel") if ALL else ()),
])  # fmt: skip
def test_pab_parity_through_inductor(name):
    now, fields = [0.0], {"spatial_attention_block_skip_range": 2}
    oracle, model = pab_oracle(name, now, **fields), compiled(name, {"method": "pab", **fields})
    for run in range(2):
        for step, (timestep, call) in enumerate(trajectory(name, STEPS)):
            now[0] = timestep
            error = relative_error(first_tensor(model(**call)), oracle(**call))
            assert error < 1e-5, f"run {run}, step {step}: {error:.1e}"
        oracle.reset()


@pytest.mark.parametrize(("name", "cache"), [
    ("FluxTransformer2DModel", TAYLOR), ("PixArtTransformer2DModel", TAYLOR),
    ("DiTTransformer2DModel", PAB),
])  # fmt: skip
def test_the_three_lowerings_agree(name, cache):
    scale = timestep_scale(name)
    results = {}
    for lowering in ("specialize", "cond", "eager"):
        torch._dynamo.reset()
        results[lowering] = outputs(compiled(name, cache, lowering=lowering, timestep_scale=scale), name)
    for lowering in ("cond", "eager"):
        for step, (a, b) in enumerate(zip(results[lowering], results["specialize"], strict=True)):
            assert relative_error(a, b) < 1e-6, f"{lowering}, step {step}: {relative_error(a, b):.1e}"


@pytest.mark.parametrize("cache", [TAYLOR, PAB], ids=["taylorseer", "pab"])
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_one_capture_no_break_no_recompile_over_three_runs(cache, lowering):
    model = compiled(transformer(), cache, lowering=lowering)
    with count_compiles() as counts:
        for _ in range(3):
            for call in calls(9):
                model(*call)
    assert (counts.graphs, counts.graph_breaks, counts.recompiles) == (1, 0, 0)
    summary = cachepass.summary(model)
    assert summary.runs == 3
    assert set(summary.variants) == ({"cond"} if lowering == "cond" else {"compute", "predict"})


def test_count_compiles_sees_what_it_counts():
    """Negative: a graph break and a recompile are counted."""

    def broken(x):
        y = x + 1
        print("", end="")
        return y * 2

    function = torch.compile(broken, backend="eager")
    with count_compiles() as counts:
        function(torch.ones(2))
        function(torch.ones(3))
    assert counts.graph_breaks >= 1
    assert counts.recompiles >= 1


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "DiTTransformer2DModel"])
def test_a_schedule_that_never_predicts_is_bit_equal_to_plain_inductor(name):
    plain = outputs(torch.compile(build(name), fullgraph=True), name, 3)
    torch._dynamo.reset()
    model = compiled(name, {**TAYLOR, "cache_interval": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cachepass.CachepassWarning)
        cached = outputs(model, name, 3)
    for a, b in zip(cached, plain, strict=True):
        assert torch.equal(a, b)
    summary = cachepass.summary(model)
    assert summary.cache_bytes == 0
    assert summary.computed == {"taylorseer": 3}


def test_computed_steps_are_those_of_plain_inductor():
    name = "FluxTransformer2DModel"
    plain = outputs(torch.compile(build(name), fullgraph=True), name)
    torch._dynamo.reset()
    cached = outputs(compiled(name, TAYLOR), name)
    for step in (0, 1, 3, 6):
        assert relative_error(cached[step], plain[step]) < 1e-6
    for step in (2, 4, 5):
        assert not torch.equal(cached[step], plain[step])


def test_options_and_mode_reach_inductor(monkeypatch):
    from torch._inductor import config

    from cachepass._torch import inductor

    seen = []
    compile_inner = inductor.compile_fx_inner

    def spy(gm, inputs, **kwargs):
        seen.append((config.max_autotune, config.epilogue_fusion, config.coordinate_descent_tuning))
        return compile_inner(gm, inputs, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx_inner", spy)
    model = compiled(transformer(depth=1), TAYLOR, max_autotune=False, **{"epilogue-fusion": False})
    for call in calls(4):
        model(*call)
    assert seen == [(False, False, False)] * 2  # the second variant is compiled steps later, under the same settings
    torch._dynamo.reset()
    seen.clear()
    tuned = compiled(transformer(depth=1), TAYLOR, mode="max-autotune-no-cudagraphs", max_autotune=False)
    tuned(*calls(1)[0])
    assert seen == [(False, True, True)]


def test_the_backend_is_found_without_importing_cachepass():
    code = (
        "import sys, torch\n"
        "assert 'cachepass' not in sys.modules\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()\n"
        "with torch.no_grad():\n"
        "    cached = torch.compile(model, backend='cached_inductor', options={'lowering': 'eager', "
        "'num_inference_steps': 9, 'cache': {'method': 'taylorseer', 'cache_identifiers': ['0']}})\n"
        "    assert torch.allclose(cached(torch.ones(2, 4)), model(torch.ones(2, 4)))\n"
        "assert 'cachepass' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", [{}, {"lowering": "cond"}], ids=["specialize", "cond"])
def test_contexts_through_inductor(options):
    shared = compiled(transformer(), TAYLOR, **options)
    alone = {name: compiled(transformer(), TAYLOR, **options) for name in ("cond", "uncond")}
    for x, t in calls(6):
        for name, value in (("cond", x), ("uncond", -2 * x)):
            with cachepass.cache_context(name):
                together = shared(value, t)
            torch.testing.assert_close(together, alone[name](value, t), rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("cache", [TAYLOR, PAB, *DECIDING], ids=lambda cache: cache["method"])
def test_cuda(cache, lowering):
    """The same results as the eager lowering, in fp32 on the device; no synchronisation when nothing reads it."""
    device = torch.device("cuda")
    steps = [(x.to(device), t.to(device)) for x, t in calls(9)]
    model = transformer().to(device)
    reference = torch.compile(model, backend="cached_inductor", options={"cache": cache, "lowering": "eager"})
    expected = [reference(*step) for step in steps]
    torch._dynamo.reset()
    fast = compiled(model, cache, lowering=lowering)
    for a, b in zip([fast(*step) for step in steps], expected, strict=True):
        assert relative_error(a, b) < 1e-5


def waits(monkeypatch):
    """Of a model's second run of 9 steps, in a sync debug mode that forbids waiting: the timesteps and the distances
    that were asked for, where alone it may wait."""
    from cachepass.run.model import Model
    from cachepass.run.step import StepCall

    def allowed(owner, name):
        asked, ask = [], getattr(owner, name)

        def answer(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("default")
            asked.append(ask(*args, **kwargs))
            torch.cuda.set_sync_debug_mode("error")
            return asked[-1]

        monkeypatch.setattr(owner, name, answer)
        return asked

    def run(model):
        steps = [(x.cuda(), t.cuda()) for x, t in calls(9)]
        for step in steps:
            model(*step)
        timesteps, distances = allowed(Model, "read_timestep"), allowed(StepCall, "_distance")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in steps:
                model(*step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return timesteps, distances

    return run


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("cache", [TAYLOR, PAB], ids=["taylorseer", "pab"])
def test_cuda_waits_for_nothing_but_the_timestep(cache, regional, monkeypatch):
    """At most one synchronisation per step, in reading the timestep; where the schedule does not ask for it, in the
    first steps of a run only, until it is known whose calls a step has."""
    model = transformer().cuda()
    for part in model.blocks if regional else [model]:
        part.compile(backend="cached_inductor", options={"cache": cache, "num_inference_steps": 9})
    timesteps, distances = waits(monkeypatch)(model)
    assert len(timesteps) == 9
    assert timesteps.count(None) == (7 if cache is TAYLOR else 0)
    assert not distances


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", DECIDING, ids=lambda cache: cache["method"])
def test_cuda_waits_for_nothing_but_the_distance(cache, monkeypatch):
    """One number comes to the host on a step that the distance decides, none on the others."""
    model = transformer(depth=3).cuda()
    model.compile(backend="cached_inductor", options={"cache": cache, "num_inference_steps": 9})
    timesteps, distances = waits(monkeypatch)(model)
    (measured,) = cachepass.summary(model).distances.values()
    assert distances == [distance for distance in measured if distance is not None]
    assert len(distances) == (8 if cache["method"] == "first_block_cache" else 7)
    assert timesteps.count(None) == 7


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
@pytest.mark.parametrize("cache", [TAYLOR, PAB], ids=lambda cache: cache["method"])
def test_cuda_in_bfloat16(cache, name):
    """As near to fp32 as the same graphs without Inductor, but for a factor of two: it rounds elsewhere."""
    results = []
    for kind, lowering in ((torch.float32, "eager"), (torch.bfloat16, "eager"), (torch.bfloat16, "specialize")):
        torch._dynamo.reset()
        fast = compiled(build(name).to("cuda", kind), cache, lowering=lowering, num_inference_steps=STEPS)
        steps, moved = [call for _, call in trajectory(name, STEPS, kind)], {}  # what stays the same stays one tensor
        for call in steps:
            moved |= {id(value): on_cuda(value) for value in call.values() if id(value) not in moved}
        steps = [{key: moved[id(value)] for key, value in call.items()} for call in steps]
        results.append([first_tensor(fast(**step)).float() for step in steps])
    for exact, rounded, ours in zip(*results, strict=True):
        assert relative_error(ours, exact) < 2 * relative_error(rounded, exact) + 1e-3


def test_slots_are_static_inputs_and_weights_are_not(monkeypatch):
    """CUDA graphs read and write slots in place; weights are copied in."""
    from cachepass._torch import inductor

    programs = {}
    compile_inner = inductor.compile_fx_inner

    def recorded(gm, inputs, **kwargs):
        placeholders = gm.graph.find_nodes(op="placeholder")
        programs[len(programs)] = (
            {placeholders[i].name for i in kwargs["static_input_idxs"]},
            {node.name for node in placeholders},
        )
        return compile_inner(gm, inputs, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx_inner", recorded)
    model = compiled(transformer(), TAYLOR, mode="reduce-overhead")
    for call in calls(5):
        model(*call)
    compute, predict = programs.values()
    assert {name for name in compute[1] - compute[0] if name.endswith("_next")} == set()
    assert [name for name in predict[1] - predict[0] if "_h" in name] == []
    assert any(name.endswith("_next") for name in compute[0]) and any("_h0" in name for name in predict[0])
    assert "weights_taylorseer" in predict[1] - predict[0]


def test_conditionals_and_cuda_graphs_exclude_each_other():
    model = compiled(transformer(), TAYLOR, lowering="cond", mode="reduce-overhead")
    with pytest.raises(cachepass.OptionError, match="which a CUDA graph cannot"):
        model(*calls(1)[0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", [TAYLOR, PAB, {"method": "invariant"}], ids=["taylorseer", "pab", "invariant"])
def test_cuda_graphs_record_nothing_after_the_first_runs(cache, monkeypatch):
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    recorded, record = [], CUDAGraphNode._record
    monkeypatch.setattr(CUDAGraphNode, "_record", lambda *args: recorded.append(1) or record(*args))
    counters.clear()
    device = torch.device("cuda")
    model = transformer(cross=True).to(device)
    context = torch.randn(2, 5, 8, device=device)
    steps = [(x.to(device), t.to(device), context) for x, t in calls(9)]
    options = {"num_inference_steps": 9}
    reference = torch.compile(
        model, backend="cached_inductor", options={"cache": cache, "lowering": "eager", **options}
    )
    expected = [reference(*step) for step in steps]
    torch._dynamo.reset()
    fast = compiled(model, cache, mode="reduce-overhead", **options)
    for run in range(6):
        before = len(recorded)
        for step, value in zip(steps, expected, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            assert relative_error(fast(*step), value) < 1e-5
        assert run < 4 or len(recorded) == before, "every position of the rings has its recording"
    assert recorded
    assert counters["inductor"]["cudagraph_skips"] == 0


class Ends(torch.nn.Module):
    """What it returns is what its attention returns."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x, timestep):
        return self.attn(x * timestep[:, None, None] / 1000)


@pytest.mark.parametrize("lowering", ["specialize", "cond"])
def test_what_the_caller_does_to_the_output_is_not_kept(lowering):
    torch.manual_seed(0)
    cache = {**TAYLOR, "cache_identifiers": ["attn"]}
    results = []
    for spoil in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = compiled(Ends().eval().requires_grad_(False), cache, lowering=lowering)
        for call in calls(7):
            output = model(*call)
            results.append(output.clone())
            if spoil:
                output.fill_(torch.nan)
    torch.testing.assert_close(results[:7], results[7:], rtol=0, atol=0)


@pytest.mark.parametrize("cache", [TAYLOR, PAB], ids=["taylorseer", "pab"])
def test_conditionals_keep_no_more_than_straight_lines(cache):
    """What a program returns takes the place of the oldest output: there is no spare slot and no copy into one."""
    sizes = []
    for lowering in ("specialize", "cond"):
        torch._dynamo.reset()
        model = compiled(transformer(), cache, lowering=lowering)
        for call in calls(7):
            model(*call)
        summary = cachepass.summary(model)
        assert summary.cache_bytes == summary.planned_bytes
        sizes.append(summary.cache_bytes)
    assert sizes[0] == sizes[1]


def test_conditionals_under_inference_mode_and_then_outside():
    model = compiled(transformer(), TAYLOR, lowering="cond", num_inference_steps=7)
    with torch.inference_mode():
        for call in calls(7):
            model(*call)
    torch._dynamo.reset()
    fresh = compiled(transformer(), TAYLOR, lowering="cond", num_inference_steps=7)
    for call in calls(7):
        torch.testing.assert_close(model(*call), fresh(*call))
