"""Several requests in one call: each row is what its request is alone."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES
from row_traces import Request, Server, assert_as_many_products, one_request, request, samples, steps_of, together
from torch._dynamo.utils import counters

import cachepass
from cachepass.cut import Blocks
from cachepass.forecast import Fit, Fitted, Taylor
from cachepass.run.live import programs_of
from cachepass.run.rows.step import RowsStep
from cachepass.schedule import Every, KeySteps

EXAMPLES = Path(__file__).parents[1] / "examples"
TAYLOR = cachepass.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=None)
PAB = {
    "method": "pab",
    "spatial_attention_block_skip_range": 3,
    "temporal_attention_block_skip_range": 3,
    "cross_attention_block_skip_range": 3,
    "spatial_attention_timestep_skip_range": (100, 900),
}
# The median of the distances that the first block of each model moves by, so that some steps of a run are computed.
THRESHOLDS = {
    "AllegroTransformer3DModel": 0.0672,
    "CogVideoXTransformer3DModel": 0.168,
    "CogVideoXTransformer3DModel:CogVideoX15": 0.0834,
    "DiTTransformer2DModel": 0.0913,
    "Flux2Transformer2DModel": 0.79,
    "FluxTransformer2DModel": 0.245,
    "HunyuanVideoTransformer3DModel": 0.252,
    "HunyuanVideoTransformer3DModel:HunyuanVideoI2V": 0.253,
    "HunyuanVideoTransformer3DModel:HunyuanVideoTokenReplace": 0.031,
    "LTXVideoTransformer3DModel": 0.0712,
    "LatteTransformer3DModel": 0.073,
    "PixArtTransformer2DModel": 0.0641,
    "QwenImageTransformer2DModel": 0.414,
    "SD3Transformer2DModel": 0.356,
    "SD3Transformer2DModel:SD35": 0.377,
    "SanaTransformer2DModel": 0.026,
    "WanTransformer3DModel": 0.0784,
    "ZImageTransformer2DModel": 0.703,
}
TIMES = tuple(950.0 - 880.0 * step / 9 for step in range(9))
FITS = {2: (1, 0), 4: (3, 1), 5: (3, 1), 7: (6, 3), 8: (6, 3)}
TUNED = cachepass.TunedConfig(
    cut=Blocks(),
    schedule=KeySteps((0, 1, 3, 6), TIMES),
    forecast=Fitted(2, TIMES, tuple(Fit(step, kept, (1.3, -0.3)) for step, kept in FITS.items())),
)
METHODS: dict[str, Any] = {
    "tuned": TUNED,
    "taylorseer": TAYLOR,
    "pab": PAB,
    "first block": cachepass.FirstBlockCacheConfig(threshold=0.12),
}
MODELS = [name for name in zoo.ZOO if zoo.is_one_graph(name)]
NOT_ON_ROWS = {"MochiTransformer3DModel": "aten.nonzero"}  # a mask says how many tokens there are
# Dynamo cannot trace the zoo's inputs of one sample.
NOT_ALONE = {"HunyuanVideoFramepackTransformer3DModel", "UVit2DModel"}
CASES = [
    (name, method)
    for name in MODELS
    for method in METHODS
    if name not in NOT_ON_ROWS.keys() | NOT_ALONE and (method != "first block" or name in THRESHOLDS)
]


def compiled(model: torch.nn.Module | None = None, cache: Any = TAYLOR, **options: Any) -> Any:
    model = model or small_models.transformer(depth=3)
    options = {"cache": cache, "lowering": "eager", "progress": False, **options}
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)


def calls_of(seed: int, steps: int) -> list[dict[str, torch.Tensor]]:
    """Of one request of the small transformer."""
    made = small_models.calls(steps, seed=seed, batch=1)
    return [{"x": x, "timestep": torch.full((1,), 900.0 - 800 * s / steps)} for s, (x, _) in enumerate(made)]


def requests_of(model: Any, lengths: list[int], prefix: str = "req") -> list[Request]:
    return [request(model, f"{prefix}-{i}", calls_of(i, steps)) for i, steps in enumerate(lengths)]


# ---- every row is its request alone ---------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(st.sampled_from(["step", "step", "step", "join", "cancel", "fail"]), st.integers(0, 2**16)),
    min_size=4,
    max_size=24,
)
SMALL = {
    **METHODS,
    "pab": {key: value for key, value in PAB.items() if "temporal" not in key and "cross" not in key},
    "first block": cachepass.FirstBlockCacheConfig(threshold=0.2),
    "dbcache": {"method": "dbcache", "Fn_compute_blocks": 1, "residual_diff_threshold": 0.2},
    "teacache": {"method": "teacache", "rel_l1_thresh": 0.3, "final_steps": 0},
    "recipe": cachepass.Recipe((cachepass.Group("blocks", Every(3), (cachepass.Part(Blocks(), Taylor(2)),)),)),
}


PROBED = ("first block", "dbcache", "teacache")  # after a step that failed they compute, where they might predict


@pytest.mark.parametrize("method", SMALL)
@given(events=EVENTS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_traces(method, events, monkeypatch):
    """Requests join, leave, are cancelled and fail in the middle, at different steps and of different lengths."""
    torch._dynamo.reset()
    with torch.no_grad():
        _play(method, events, monkeypatch)


def _play(method: str, events: list[tuple[str, int]], monkeypatch: Any) -> None:
    model = compiled(cache=SMALL[method], pool_requests=9)
    server, active, count = Server(model), list[Request](), 0
    for event, number in [("join", 7), *events, ("step", 3)]:
        draw = random.Random(number)
        if event == "join" and len(active) < 8:
            active.append(request(model, f"req-{count}", calls_of(count, draw.randint(1, 9))))
            count += 1
        elif event == "cancel" and active:
            cachepass.release(active.pop(draw.randrange(len(active))).name)
        elif active:
            chosen = draw.sample(active, draw.randint(1, len(active)))
            if event == "fail" and method not in PROBED:
                _fail(server, chosen, draw.randint(1, 2), monkeypatch)
            left = [one for one in chosen if not one.is_over]
            if left:
                server.step(left)
        active = [one for one in active if not one.is_over]
    assert server.worst < 1e-5


@pytest.mark.parametrize("method", PROBED)
@pytest.mark.parametrize("launch", [1, 2, 3])
def test_after_a_failure_rows_whose_data_decide_are_right(method, launch, monkeypatch):
    """What they compare with may be gone: then they compute."""
    model = compiled(cache=SMALL[method], pool_requests=4)
    plain = small_models.transformer(depth=3)
    server = Server(model)
    requests = requests_of(model, [9, 9, 9])
    for who in (requests, requests[:2], requests, requests[1:]):
        server.step(who)
    _fail(server, requests, launch, monkeypatch)
    given = together([one.calls[one.made] for one in requests])
    with cachepass.rows(*(one.name for one in requests)):
        found = model(**given)
    for one, value, computed in zip(requests, found.split(1), plain(**given).split(1), strict=True):
        alike = [zoo.relative_error(value, wanted) < 1e-5 for wanted in (one.alone[one.made], computed)]
        assert any(alike), one.name
    assert server.worst < 1e-5


def _fail(server: Server, chosen: list[Request], launch: int, monkeypatch: Any) -> None:
    """A call in which one of the programs fails; it changes nothing."""
    own, left = RowsStep._launch, [launch]

    def failing(self: RowsStep, *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("in the middle")
        return own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RowsStep, "_launch", failing)
        given = together([one.calls[one.made] for one in chosen])
        with cachepass.rows(*(one.name for one in chosen)):
            try:
                server.model(**given)
            except MemoryError:
                return
    for one in chosen:  # it had fewer programs: the step was made
        one.made += 1
        if one.is_over:
            cachepass.release(one.name)


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore:.*has no effect:cachepass.CachepassWarning")  # PAB's kinds that a model has not
@pytest.mark.filterwarnings("ignore:tuned for runs of:cachepass.CachepassWarning")
@pytest.mark.parametrize(("name", "method"), CASES)
def test_models_of_the_zoo(name, method):
    """Each case has its own requests, lengths and times of joining."""
    draw = random.Random(f"{name} {method}")
    first = method == "first block"
    cache = cachepass.FirstBlockCacheConfig(threshold=THRESHOLDS[name]) if first else METHODS[method]
    model = compiled(zoo.build(name, layers=3 if first else None), cache)
    requests = [
        request(model, f"req-{i}", list(steps_of(name, i + 1, steps)), return_dict=False)
        for i, steps in enumerate(draw.choices((6, 7, 9, 11), k=5))
    ]
    server = Server(model, {"return_dict": False})
    server.serve(requests, [0, 1, *(draw.randint(0, 9) for _ in range(3))], most=draw.randint(3, 5))
    assert len(set(server.calls)) > 1 and max(server.calls) >= 3
    assert server.worst < 1e-5
    ((dispatcher, _),) = programs_of(model)
    program: Any = dispatcher.program
    (rows,) = program._for_rows.values()
    assert_as_many_products(program, rows)


def test_a_tuned_cache():
    """Of the digits' model, whose runs of other lengths than it was tuned for are steps at the timesteps of those."""
    sys.path.insert(0, str(EXAMPLES / "digits"))
    from models import load_dit

    model = compiled(load_dit(), str(EXAMPLES / "digits" / "tuned-10.json"), num_inference_steps=50)

    def calls(seed: int) -> list[dict[str, Any]]:
        noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        label = torch.tensor([seed])
        times = [1000.0 * (1 - step / 50) for step in range(50)]
        return [
            {"hidden_states": noise * t / 1000, "timestep": torch.tensor([t]), "class_labels": label} for t in times
        ]

    requests = [request(model, f"req-{seed}", calls(seed), return_dict=False) for seed in (1, 2, 3)]
    server = Server(model, {"return_dict": False})
    server.serve(requests, [0, 3, 7])
    assert server.worst < 1e-5
    assert len(set(map(str, cachepass.summary(model).last_runs.values()))) == 1


@pytest.mark.parametrize(("name", "reason"), NOT_ON_ROWS.items())
def test_models_that_take_no_rows_say_why(name, reason):
    model = compiled(zoo.build(name))
    given = together([next(steps_of(name, seed, 3)) for seed in (1, 2)])
    with cachepass.rows("a", "b"), pytest.raises(cachepass.RowsError, match=reason):
        model(**given, return_dict=False)


# ---- one capture ----------------------------------------------------------------------------------------------------


def test_any_number_of_rows_is_one_capture_and_one_program_for_each_size_and_phase():
    model = compiled()
    counters.clear()
    server = Server(model)
    requests = [Request(f"req-{i}", calls_of(i, 8), [torch.zeros(1)] * 8) for i in range(7)]
    for count in (1, 7, 2, 5, 3):
        server.step(requests[:count])
    assert counters["stats"]["unique_graphs"] == 1
    programs = cachepass.summary(model).variants
    assert set(programs) <= {f"{phase} x {rows}" for phase in ("compute", "predict") for rows in (1, 2, 4)}
    assert {"compute x 1", "compute x 4", "predict x 1"} <= set(programs)


def test_sizes_of_programs_are_an_option():
    model = compiled(row_sizes=[1, 3])
    Server(model).step([Request(f"req-{i}", calls_of(i, 8), [torch.zeros(1)] * 8) for i in range(4)])
    assert set(cachepass.summary(model).variants) == {"compute x 3", "compute x 1"}


def test_sizes_that_are_symbols_take_rows_too():
    model = torch.compile(
        small_models.transformer(depth=2),
        backend="cached_inductor",
        fullgraph=True,
        dynamic=True,
        options={"cache": TAYLOR, "lowering": "eager"},
    )
    server = Server(model)
    server.serve(requests_of(model, [7, 8, 5]), [0, 1, 2])
    assert server.worst < 1e-5


def test_the_warm_up_compiles_every_program_of_so_many_rows():
    model = compiled(num_inference_steps=8)
    calls = calls_of(0, 8)
    with cachepass.rows("a", "b", "c"):
        programs = cachepass.warmup(model, **together([calls[0]] * 3), progress=False).variants
    server = Server(model)
    for count in (1, 2, 3):
        requests = [Request(f"{count}-{i}", calls_of(i, 8), [torch.zeros(1)] * 8) for i in range(count)]
        for _ in range(8):
            server.step(requests)
    assert cachepass.summary(model).variants == programs
    assert {name.split()[0] for name in programs} == {"compute", "predict"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("method", ["taylorseer", "first block"])
def test_on_a_gpu(method, mode):
    module = small_models.transformer(depth=3).to("cuda")
    model = compiled(module, SMALL[method], lowering="specialize", row_sizes=[1, 2], mode=mode)
    calls = [[{name: value.to("cuda") for name, value in c.items()} for c in calls_of(i, 7)] for i in range(3)]
    requests = [request(model, f"req-{i}", own) for i, own in enumerate(calls)]
    server = Server(model)
    server.serve(requests, [0, 0, 2], most=3)
    assert server.worst < 1e-4


@pytest.mark.parametrize("name", zoo.sweep_over(["Flux", "Wan", "QwenImage", "HunyuanVideo"], ["Wan"]))
def test_a_pipeline_in_a_block_of_rows(name):
    """Two pictures of one call of a pipeline, which names both calls of a step: each is a request of its own."""
    from cachepass.integrations.diffusers import enable_cache

    case = PIPELINES[name]
    several = {"num_videos_per_prompt" if "V" in name or name == "Wan" else "num_images_per_prompt": 2}
    pipes = [case.make(), case.make()]
    for pipe in pipes:
        enable_cache(pipe, "taylorseer", lowering="eager")
    wanted = case.run(pipes[0], 8, **several)
    with cachepass.rows("a", "b"):
        found = case.run(pipes[1], 8, **several)
    assert zoo.relative_error(found, wanted) < 1e-4
    marks = cachepass.summary(pipes[1]).last_runs
    assert {name: set(run.values()) for name, run in marks.items()} == {
        f"{row}/{side}": {"###.#..."} for row in "ab" for side in ("cond", "uncond")
    }


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("name", "method"),
    zoo.sweep_over(
        [
            case
            for case in CASES
            if case[0] in ("FluxTransformer2DModel", "WanTransformer3DModel", "ZImageTransformer2DModel")
        ],
        [("FluxTransformer2DModel", "taylorseer")],
    ),
)
@pytest.mark.filterwarnings("ignore:.*has no effect:cachepass.CachepassWarning")
def test_models_of_the_zoo_through_inductor(name, method):
    cache = cachepass.FirstBlockCacheConfig(threshold=THRESHOLDS[name]) if method == "first block" else METHODS[method]
    layers = 3 if method == "first block" else None
    model = compiled(zoo.build(name, layers=layers), cache, lowering="specialize", row_sizes=[1, 2])
    requests = [request(model, f"req-{i}", list(steps_of(name, i + 1, 6)), return_dict=False) for i in range(2)]
    server = Server(model, {"return_dict": False})
    server.serve(requests, [0, 1])
    assert server.worst < 1e-5


@pytest.mark.inductor
@pytest.mark.parametrize("method", ["taylorseer", "first block"])
def test_through_inductor(method):
    model = compiled(cache=SMALL[method], lowering="specialize", row_sizes=[1, 2])
    requests = requests_of(model, [5, 6, 4])
    server = Server(model)
    server.serve(requests, [0, 0, 2], most=3)
    assert server.worst < 1e-5


# ---- how rows are called --------------------------------------------------------------------------------------------


def test_a_request_may_go_on_alone_and_come_back():
    model = compiled()
    (one, other), server = requests_of(model, [9, 9]), Server(model)

    def alone(one: Request) -> None:
        with cachepass.cache_context(one.name):
            value = model(**one.calls[one.made])
        server.worst = max(server.worst, zoo.relative_error(value, one.alone[one.made]))
        one.made += 1

    alone(one)
    alone(one)
    for who in ([one, other], [other], [one, other], [other, one]):
        server.step(who)
    alone(one)
    alone(other)
    for who in ([one, other], [other, one]):
        server.step(who)
    assert server.worst < 1e-6
    marks = cachepass.summary(model).last_runs
    assert marks[other.name] == {"taylorseer": "##.#..#"}
    assert marks[other.name]["taylorseer"] == marks[f"{other.name} alone"]["taylorseer"][:7]


@pytest.mark.parametrize("inference", [False, True])
def test_steps_under_inference_mode(inference):
    model = compiled()
    with torch.inference_mode(inference):
        requests = requests_of(model, [6, 8])
        server = Server(model)
        server.serve(requests, [0, 1])
    assert server.worst < 1e-6


def test_timesteps_that_are_given_are_not_read():
    model = compiled(cache=SMALL["pab"], num_inference_steps=6)
    requests = requests_of(model, [6, 6])
    server = Server(model)
    for step in range(6):
        times = [float(one.calls[step]["timestep"]) for one in requests]
        for one in requests:
            one.calls[step]["timestep"] = one.calls[step]["timestep"].clone()
        server.step(requests, timesteps=times)
    assert server.worst < 1e-6


def test_guidance_by_two_calls_in_contexts_or_as_rows():
    model = compiled(small_models.transformer(depth=2, cross=True))
    calls = [calls_of(seed, 7) for seed in (1, 2)]
    prompts = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)).split(1)

    def alone(which: int, side: int) -> list[torch.Tensor]:
        with cachepass.cache_context(f"alone-{which}-{side}"):
            return [model(**call, context=prompts[2 * which + side]) for call in calls[which]]

    wanted = [[alone(which, side) for side in (0, 1)] for which in (0, 1)]
    order = [(0, 1), (1, 0), (1, 1), (0, 0)]
    pairs = [[(0, 0), (1, 0)], [(0, 1), (1, 1)], order]
    batches = [torch.cat([prompts[2 * which + side] for which, side in pair]) for pair in pairs]
    worst = 0.0
    for step in range(7):
        given = together([calls[0][step], calls[1][step]])
        with cachepass.rows("a", "b"):
            for side, name in enumerate(("cond", "uncond")):
                with cachepass.cache_context(name):
                    found = model(**given, context=batches[side])
                for which, value in enumerate(found.split(1)):
                    worst = max(worst, zoo.relative_error(value, wanted[which][side][step]))
        with cachepass.rows(*(f"c-{which}/{('cond', 'uncond')[side]}" for which, side in order)):
            found = model(
                **together([calls[which][step] for which, _ in order]),
                context=batches[2],
            )
        for (which, side), value in zip(order, found.split(1), strict=True):
            worst = max(worst, zoo.relative_error(value, wanted[which][side][step]))
    assert worst < 1e-6
    marks = cachepass.summary(model).last_runs
    assert {"a/cond", "b/uncond", "c-0/cond", "c-1/uncond"} <= marks.keys()
    cachepass.release("a", "b")
    assert not any(context.startswith(("a/", "b/")) for context in cachepass.memory(model).contexts)


def test_the_unconditional_branch_is_skipped_for_each_row():
    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_models.transformer(depth=2, cross=True)

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            tokens = hidden_states.flatten(1, 2)
            return self.model(tokens, timestep, encoder_hidden_states).unflatten(1, hidden_states.shape[1:3])

    cache = cachepass.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        spatial_attention_block_identifiers=("attn",),
        tensor_format="BCHW",
    )
    model = compiled(Denoiser().eval().requires_grad_(False), cache, invariant_inputs=["encoder_hidden_states"])

    def steps(seed: int) -> list[tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        x, *prompts = (torch.randn(shape, generator=generator) for shape in ((1, 4, 4, 8), (1, 3, 8), (1, 3, 8)))
        return [(x * (1 - 0.04 * s), torch.full((1,), 900.0 - 100 * s), *prompts) for s in range(8)]

    def step(calls: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        x, t, cond, uncond = map(torch.cat, zip(*calls, strict=True))
        with cachepass.cache_context("cond"):
            first = model(x, t, cond)
        with cachepass.cache_context("uncond"):
            return [first, model(x, t, uncond)]

    runs = [steps(1), steps(2)]
    wanted = []
    for i, run in enumerate(runs):
        with cachepass.cache_context(f"alone-{i}"):
            wanted.append([step([call]) for call in run])
    for s in range(9):  # the second one begins a step later
        active = [i for i in (0, 1) if 0 <= s - i < 8]
        with cachepass.rows(*(f"req-{i}" for i in active)):
            found = step([runs[i][s - i] for i in active])
        for row, i in enumerate(active):
            for got, want in zip(found, wanted[i][s - i], strict=True):
                torch.testing.assert_close(got[row : row + 1], want)
    assert cachepass.summary(model).last_runs["req-1/uncond"] == {"unconditional": "#.#.#.#."}


def test_two_calls_of_a_step_without_names_are_right_and_warned_of():
    model = compiled()
    plain = small_models.transformer(depth=3)
    calls = [calls_of(seed, 6) for seed in (1, 2)]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", cachepass.CachepassWarning)
        for step in range(6):
            given = together([run[step] for run in calls])
            other = {**given, "x": given["x"] + 0.5}
            with cachepass.rows("a", "b"):
                model(**given)
                torch.testing.assert_close(model(**other), plain(**other))
    said = [str(w.message) for w in heard if w.category is cachepass.CachepassWarning]
    assert len(said) == 1 and "called twice" in said[0] and 'cache_context("cond")' in said[0]
    assert cachepass.summary(model).last_runs["a"] == {"taylorseer": "##.#.."}


def test_compiled_in_place():
    module = small_models.transformer(depth=3)
    module.compile(
        backend="cached_inductor", fullgraph=True, options={"cache": TAYLOR, "lowering": "eager", "progress": False}
    )
    calls = calls_of(0, 5)
    with cachepass.rows("a", "b"), pytest.raises(cachepass.RowsError, match="was not parted") as raised:
        module(**together([calls[0]] * 2))
    assert "warmup" in (raised.value.hint or "")
    cachepass.warmup(module, **calls[0], progress=False)
    server = Server(module)
    server.serve(requests_of(module, [5, 6]), [0, 1])
    assert server.worst < 1e-6


def test_enabled_in_place():
    from cachepass.integrations.diffusers import disable_cache, enable_cache

    module = small_models.transformer(depth=3)
    enable_cache(module, TAYLOR, lowering="eager")
    server = Server(module)
    server.serve(requests_of(module, [5, 6]), [0, 1])
    assert server.worst < 1e-6
    disable_cache(module)


def test_a_block_of_rows_concerns_cached_models_alone():
    model, other = compiled(), torch.compile(torch.nn.Linear(8, 8), backend="eager")
    calls = together([calls_of(seed, 1)[0] for seed in (1, 2)])
    with cachepass.rows("a", "b"):
        assert other(model(**calls)).shape == (2, 4, 8)


def test_results_keep_their_structure():
    class Several(small_models.Transformer):
        def forward(self, x, timestep, table):
            tokens = super().forward(x, timestep)
            return {"tokens": tokens, "mean": tokens.mean((1, 2)), "first": [x[:, 0], (table, 3)], "max": tokens.max()}

    torch.manual_seed(0)
    module = Several().eval().requires_grad_(False)
    model, calls = compiled(module), [calls_of(seed, 1)[0] for seed in (1, 2, 3)]
    table = torch.randn(5, 8)
    wanted = [module(**call, table=table) for call in calls]
    with cachepass.rows("a", "b", "c"):
        found = model(**together(calls), table=table)
    torch.testing.assert_close(found["tokens"], torch.cat([w["tokens"] for w in wanted]))
    torch.testing.assert_close(found["mean"], torch.cat([w["mean"] for w in wanted]))
    torch.testing.assert_close(found["max"], torch.stack([w["max"] for w in wanted]))
    torch.testing.assert_close(found["first"][0], torch.cat([w["first"][0] for w in wanted]))
    assert found["first"][1][1] == 3


def test_results_that_are_inputs_or_views_of_each_other():
    class Returning(small_models.Transformer):
        def forward(self, x, timestep, items, table):
            tokens = super().forward(x[0], timestep)
            first, rest = tokens.split([1, 3], 1)
            return [first], rest, [x[0]], [items[0]], x[0].transpose(1, 2), table, table.sum(0), timestep

    torch.manual_seed(0)
    module = Returning().eval().requires_grad_(False)
    model = compiled(module)
    calls = [calls_of(seed, 1)[0] for seed in (1, 2)]
    table, items = torch.randn(5, 8), [torch.randn(3), torch.randn(3)]
    wanted = [module([call["x"]], call["timestep"], [item], table) for call, item in zip(calls, items, strict=True)]
    with cachepass.rows("a", "b"):
        found = model([call["x"] for call in calls], torch.cat([c["timestep"] for c in calls]), list(items), table)
    for row in (0, 1):
        for listed in (0, 2, 3):
            torch.testing.assert_close(found[listed][row], wanted[row][listed][0])
        for joined in (1, 4, 7):
            torch.testing.assert_close(found[joined].chunk(2)[row], wanted[row][joined])
    torch.testing.assert_close(found[5], torch.cat([table, table]))
    torch.testing.assert_close(found[6], torch.cat([table.sum(0)] * 2))


def test_two_threads_call_rows_of_their_own():
    model = compiled()
    requests = requests_of(model, [8, 8, 8, 8])
    servers, errors = [Server(model), Server(model)], []

    def serve(server: Server, own: list[Request]) -> None:
        try:
            with torch.no_grad():
                server.serve(own, [0, 1])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(servers[i], requests[2 * i : 2 * i + 2])) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert max(server.worst for server in servers) < 1e-6


# ---- the pool -------------------------------------------------------------------------------------------------------


def one_call(model: Any, *names: str, steps: int = 8) -> None:
    with cachepass.rows(*names):
        model(**together([calls_of(i, steps)[0] for i in range(len(names))]))


def test_the_bytes_of_the_pool_are_those_of_the_plan():
    model = compiled(pool_requests=5)
    one_call(model, "a", "b")
    found = cachepass.memory(model)
    ((dispatcher, _),) = programs_of(model)
    assert dispatcher.program is not None
    alone = cachepass.explain(small_models.transformer(depth=3), cache=TAYLOR, **calls_of(0, 8)[0]).cache_bytes
    assert dispatcher.program.plan.cache_bytes == alone > 0
    assert found.pool_bytes == 5 * alone
    assert found.contexts["a"] == (alone, 0)


def test_what_is_held_does_not_grow_with_requests():
    model = compiled(pool_requests=8)
    held = []
    for number in range(0, 1000, 4):
        names = [f"req-{i}" for i in range(number, number + 4)]
        one_call(model, *names)
        held.append(cachepass.memory(model).pool_bytes)
        cachepass.release(*names)
    assert len(set(held)) == 1
    assert not cachepass.memory(model).contexts
    assert len(cachepass.summary(model).contexts) == 0


def test_runs_of_known_length_that_are_over_make_room():
    model = compiled(pool_requests=2, num_inference_steps=3)
    server = Server(model)
    for round_ in range(3):
        requests = [Request(f"{round_}-{i}", calls_of(i, 3), [torch.zeros(1)] * 3) for i in range(2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cachepass, "release", lambda *_: None)
            for _ in range(3):
                server.step(requests)


def test_a_full_pool_raises_at_once_and_mixes_nothing():
    model = compiled(pool_requests=2)
    requests = requests_of(model, [8, 8])
    server = Server(model)
    server.step(requests)
    with pytest.raises(cachepass.PoolError, match="all 2 places for requests are taken") as raised:
        one_call(model, "late")
    assert "release" in (raised.value.hint or "")
    for _ in range(3):
        server.step(requests)
    assert server.worst < 1e-6
    cachepass.release(requests[0].name)
    one_call(model, "late")


def test_a_request_waits_for_its_place_as_long_as_asked():
    model = compiled(pool_requests=1, pool_wait=20.0)
    one_call(model, "a")
    begun, waited = threading.Event(), []

    def late() -> None:
        begun.set()
        with torch.no_grad():
            one_call(model, "late")
        waited.append(True)

    thread = threading.Thread(target=late)
    thread.start()
    begun.wait()
    thread.join(0.2)
    assert thread.is_alive() and not waited
    cachepass.release("a")
    thread.join(20)
    assert waited


def test_where_nobody_says_how_many_places_there_are_as_many_as_fit():
    model = compiled()
    one_call(model, "a")
    found = cachepass.memory(model)
    assert found.places == (1, 16)
    each = found.pool_bytes // 16
    small = compiled(small_models.transformer(1, depth=3), max_cache_bytes=10 * each)
    one_call(small, "a", "b")
    assert cachepass.memory(small).places == (2, 7)


def test_pools_of_other_sizes_make_room():
    def call(model: Any, tokens: int, *names: str) -> None:
        with cachepass.rows(*names):
            model(x=torch.randn(len(names), tokens, 8), timestep=torch.full((len(names),), 900.0))

    model = compiled()
    call(model, 4, "a")
    each = cachepass.memory(model).pool_bytes // 16
    model = compiled(small_models.transformer(1, depth=3), pool_requests=2, max_cache_bytes=5 * each)
    call(model, 4, "a", "b")
    call(model, 2, "c")
    assert cachepass.memory(model).places == (3, 4)
    with pytest.raises(cachepass.PoolError, match=f"no more than {2 * each} may be kept"):
        call(model, 8, "d")
    cachepass.release("a", "b")
    call(model, 8, "d")
    assert cachepass.memory(model).places == (2, 4)
    call(model, 8, "e")


def test_a_pool_that_is_too_large_is_refused():
    model = compiled(pool_requests=8, max_cache_bytes=1000)
    with pytest.raises(cachepass.PoolError, match=r"a pool for 8 requests takes .* no more than 1000 may be kept"):
        one_call(model, "a")


@pytest.mark.parametrize("method", ["taylorseer", "recipe", "first block"])
def test_what_others_left_in_a_page_never_leaks(method):
    model = compiled(cache=SMALL[method], pool_requests=2)
    broken = calls_of(0, 4)
    for call in broken:
        call["x"] = torch.full_like(call["x"], torch.inf)
        with cachepass.rows("x", "y"):
            model(**together([call, call]))
    cachepass.release("x", "y")
    server = Server(model)
    server.serve(requests_of(model, [7, 8]), [0, 1])
    assert server.worst < 1e-6


def test_release_ends_what_is_below_a_name_and_forgives_unknown_ones():
    model = compiled()
    with cachepass.cache_context("tenant"):
        one_call(model, "a", "b/cond")
        cachepass.release("b", "never came")
        assert list(cachepass.memory(model).contexts) == ["tenant/a"]
    cachepass.release("tenant")
    assert not cachepass.memory(model).contexts


def test_reset_in_a_block_of_rows_begins_them_anew():
    model = compiled()
    requests = requests_of(model, [8, 8])
    server = Server(model)
    for _ in range(4):
        server.step(requests)
    with cachepass.rows(requests[0].name):
        cachepass.reset(model)
    requests[0].made = 0
    for _ in range(4):
        server.step(requests)
    assert server.worst < 1e-6


# ---- what cannot be told --------------------------------------------------------------------------------------------


def test_names():
    for names in ((), ("",), ("a", 3)):
        with pytest.raises(TypeError, match="rows takes names such as 'req-7'"), cachepass.rows(*names):  # type: ignore
            pass
    with pytest.raises(cachepass.RowsError, match="'a' is there twice"), cachepass.rows("a", "a"):
        pass
    with pytest.raises(cachepass.RowsError, match="1 timesteps for 2 rows"), cachepass.rows("a", "b", timesteps=[1.0]):
        pass
    with (
        cachepass.rows("a"),
        pytest.raises(cachepass.RowsError, match="a block of rows stands in another one"),
        cachepass.rows("b"),
    ):
        pass


def test_as_many_names_as_rows():
    model, calls = compiled(), calls_of(0, 3)
    with cachepass.rows("a", "b", "c"), pytest.raises(cachepass.RowsError, match="3 names for 2 rows"):
        model(**together([calls[0]] * 2))
    with cachepass.rows("a", "b"), pytest.raises(cachepass.RowsError, match="2 names for 4 rows") as raised:
        model(**together([calls[0]] * 4))
    assert "a/uncond" in (raised.value.hint or "")


def test_inputs_that_are_as_long_as_the_batch():
    """An input that all requests share, whose first dimension is as many as there are rows."""

    class Positioned(small_models.Transformer):
        def forward(self, x, timestep, table, img_ids):
            return super().forward(x + table.sum(0) + img_ids.sum(), timestep)

    torch.manual_seed(0)
    module = Positioned().eval().requires_grad_(False)
    shared = {"table": torch.randn(2, 8), "img_ids": torch.randn(2, 3)}
    calls = [calls_of(seed, 1)[0] for seed in (1, 2)]
    wanted = torch.cat([module(**call, **shared) for call in calls])

    model = compiled(module)
    with cachepass.rows("a", "b"), pytest.raises(cachepass.RowsError, match="it may be the same for all") as raised:
        model(**together(calls), **shared)
    assert 'dims={"table": None}' in (raised.value.hint or "")
    with (
        cachepass.rows("a", "b", dims={"table": None}),
        pytest.raises(cachepass.RowsError, match="input img_ids: its first dimension is 2"),
    ):
        model(**together(calls), **shared)
    with cachepass.rows("a", "b", dims={"img_ids": None, "table": None}):
        torch.testing.assert_close(model(**together(calls), **shared), wanted)
    cachepass.release("a", "b")
    with cachepass.rows("a", "b"):  # one request was captured by now, and tells
        torch.testing.assert_close(model(**together(calls), **shared), wanted)
    with (
        cachepass.rows("c", "d", dims={"tables": None}),
        pytest.raises(cachepass.RowsError, match="the call has no input 'tables'"),
    ):
        model(**together(calls), **shared)


def test_a_call_of_as_many_samples_that_are_no_rows_tells_nothing():
    """A batch of two images of one trajectory was captured before."""
    model = compiled()
    calls = [calls_of(seed, 4) for seed in (1, 2)]
    with cachepass.cache_context("images"):
        model(**together([run[0] for run in calls]))
    server = Server(model)
    server.serve(requests_of(model, [4, 5]), [0, 1])
    assert server.worst < 1e-6
    other = compiled(small_models.transformer(1))
    with cachepass.cache_context("images"):
        other(**together([run[0] for run in calls]))
    with cachepass.rows("a", "b"):
        found = other(**together([run[0] for run in calls]))
    plain = small_models.transformer(1)
    torch.testing.assert_close(found, torch.cat([plain(**run[0]) for run in calls]))
    assert set(cachepass.summary(other).variants) == {"compute", "compute x 2"}


def test_rows_in_another_dimension():
    class Turned(small_models.Transformer):
        def forward(self, x, timestep, layers):
            return super().forward(x + layers.mean(0)[:, None], timestep)

    torch.manual_seed(0)
    module = Turned().eval().requires_grad_(False)
    layers, calls = torch.randn(3, 2, 8), [calls_of(seed, 1)[0] for seed in (1, 2)]
    wanted = torch.cat([module(**call, layers=layers[:, i : i + 1]) for i, call in enumerate(calls)])
    model = compiled(module)
    with cachepass.rows("a", "b", dims={"layers": 1}):
        torch.testing.assert_close(model(**together(calls), layers=layers), wanted)
    with (
        cachepass.rows("a", "b", dims={"layers": 0}),
        pytest.raises(cachepass.RowsError, match=r"\(3, 2, 8\) has no 2 rows in dimension 0"),
    ):
        model(**together(calls), layers=layers)


def test_lists_whose_items_differ():
    name = "ZImageTransformer2DModel"
    model = compiled(zoo.build(name))
    given = together([one_request(name, seed) for seed in (1, 2)])
    given["x"][1] = torch.cat([given["x"][1]] * 2, -1)
    with cachepass.rows("a", "b"), pytest.raises(cachepass.RowsError, match="its items are of different sizes"):
        model(**given, return_dict=False)

    class Sized(small_models.Transformer):
        def forward(self, x, timestep, lengths):
            return super().forward(x[:, : lengths[0]], timestep)

    small = compiled(Sized().eval().requires_grad_(False))
    calls = together([calls_of(seed, 1)[0] for seed in (1, 2)])
    with cachepass.rows("a", "b"), pytest.raises(cachepass.RowsError, match=r"its items differ: \[3, 4\]"):
        small(**calls, lengths=[3, 4])
    with cachepass.rows("a", "b"):
        assert small(**calls, lengths=[3, 3]).shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"lowering": "cond"}, "decides inside of a program"), ({"cache": "fastercache"}, "odd|names for")],
)
def test_kinds_of_programs_that_take_no_rows(options, reason):
    if options.get("cache") == "fastercache":
        model = compiled(zoo.build("CogVideoXTransformer3DModel"), **options)
        given = together([next(steps_of("CogVideoXTransformer3DModel", seed, 3)) for seed in (1, 2)])
        given["return_dict"] = False
    else:
        model, given = compiled(**options), together([calls_of(0, 1)[0]] * 2)
    with cachepass.rows("a", "b"), pytest.raises(cachepass.CachepassError, match=reason):
        model(**given)


def test_many_graphs_take_no_rows():
    class Broken(small_models.Transformer):
        def forward(self, x, timestep):
            x = self.blocks[0](x, timestep)
            torch._dynamo.graph_break()
            return self.proj_out(self.blocks[1](x, timestep))

    model = torch.compile(
        Broken().eval().requires_grad_(False), backend="cached_inductor", options={"cache": TAYLOR, "lowering": "eager"}
    )
    with cachepass.rows("a", "b"), pytest.raises(cachepass.RowsError, match="the model is many graphs"):
        model(**together([calls_of(0, 1)[0]] * 2))


def test_a_function_is_not_parted():
    module = small_models.transformer()
    options = {"cache": TAYLOR, "lowering": "eager"}
    function = torch.compile(lambda **given: module(**given), backend="cached_inductor", options=options)
    with cachepass.rows("a", "b"), pytest.raises(cachepass.RowsError, match="was not parted"):
        function(**together([calls_of(0, 1)[0]] * 2))


def test_a_cache_that_never_fires_is_called_row_by_row():
    with pytest.warns(cachepass.CachepassWarning, match="never fires"):
        model = compiled(cache=cachepass.TaylorSeerCacheConfig(cache_interval=1))
        calls = [calls_of(seed, 1)[0] for seed in (1, 2)]
        with cachepass.rows("a", "b"):
            found = model(**together(calls))
    plain = small_models.transformer(depth=3)
    torch.testing.assert_close(found, torch.cat([plain(**call) for call in calls]))
    assert samples(found, 2)[0].shape == (1, 4, 8)
