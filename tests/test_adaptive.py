"""Methods that decide in the run: every schedule with every forecast, one capture, one number per step."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from blocks import BlockCache
from small_models import Transformer, calls, transformer
from torch._dynamo.utils import counters

import cachepass
from cachepass import CacheConfig, DBCacheConfig, FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TeaCacheConfig
from cachepass.cut import BlockOutput, BlockResidual, Blocks, ModelOutput, ModuleOutput, Modules
from cachepass.forecast import DMD, Chebyshev, Hermite, Lagrange, Linear, Newton, Reuse, Taylor, Zeros
from cachepass.schedule import (
    Always,
    Every,
    Final,
    MagnitudeBudget,
    Mask,
    MaxSkips,
    Preset,
    Refresh,
    Retention,
    Threshold,
    Timesteps,
    WarmUp,
)

STEPS = 11
NEAR = 0.12  # some steps of the small model lie below it, some above
SCHEDULES = {
    "every": Every(3) & WarmUp(2),
    "timesteps": Every(2) & Timesteps(200, 800),
    "mask": Mask([1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1]),
    "preset": Preset("fast"),
    "final": WarmUp(3) & Final(2) & Every(4),
    "retention": Retention(0.3),
    "warm-up interval": WarmUp(6, interval=2) & MaxSkips(consecutive=2),
    "caps": Always() & MaxSkips(total=5, consecutive=2),
    "threshold": Threshold(NEAR),
    "threshold, warm-up, caps": Threshold(2 * NEAR) & WarmUp(2) & MaxSkips(total=4, consecutive=3, distance=0.6),
    "accumulated": Threshold(2 * NEAR, accumulate=True) & Final(1),
    "rescaled": Threshold(2 * NEAR, accumulate=True, coefficients=(0.5, 0.9, 0.01)),
    "or": Threshold(NEAR) | Mask([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1]),
    "refresh": Refresh(Threshold(2 * NEAR) & WarmUp(2), at=4, repeat=True),
    "magnitude": MagnitudeBudget((1.0, 1.1, 0.95, 1.02, 0.9, 1.0, 1.05, 0.97), 0.2, 2, 2),
    "not": ~Every(2),
}
FORECASTS = {
    "reuse": Reuse(),
    "zeros": Zeros(),
    "linear": Linear(),
    "taylor": Taylor(2),
    "taylor in timesteps": Taylor(1, spacing="timestep"),
    "hermite": Hermite(2),
    "lagrange": Lagrange(2, spacing="timestep"),
    "newton": Newton(3),
    "chebyshev": Chebyshev(),
    "dmd": DMD(history=5),
}


def compiled_with(cache: object, model: torch.nn.Module, lowering: str = "eager", **options: object):
    return torch.compile(
        model,
        backend="cached_inductor",
        fullgraph=True,
        options={"cache": cache, "lowering": lowering, "num_inference_steps": STEPS, **options},
    )


def computed(compiled) -> list[bool]:
    return [mark == "#" for mark in cachepass.summary(compiled).last_runs["default"]["blocks"]]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).norm() / b.norm()) < tolerance


def runs_alike(compiled, reference: BlockCache, runs: int = 2) -> None:
    for _ in range(runs):
        reference.reset()
        for step, (x, timestep) in enumerate(calls(STEPS)):
            assert close(compiled(x, timestep), reference(x, timestep)), f"step {step}: {reference.computed}"
        assert computed(compiled) == reference.computed


@pytest.mark.parametrize("forecast", FORECASTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.covering
def test_every_schedule_with_every_forecast(schedule, forecast):
    model = transformer(depth=3)
    bound = SCHEDULES[schedule].bind(STEPS)
    config = CacheConfig(cut=Blocks(first=1), schedule=SCHEDULES[schedule], forecast=FORECASTS[forecast])
    runs_alike(compiled_with(config, model), BlockCache(model, bound, FORECASTS[forecast]))


def test_the_schedules_of_the_table_compute_some_steps_and_predict_some():
    for name, schedule in SCHEDULES.items():
        reference = BlockCache(transformer(depth=3), schedule.bind(STEPS), Reuse())
        for call in calls(STEPS):
            reference(*call)
        assert 2 <= sum(reference.computed) <= STEPS - 2, name


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.covering(strength=2)
def test_blocks_at_both_ends_are_always_computed(first, last, residual):
    model = transformer(depth=5)
    config = CacheConfig(cut=Blocks(first, last, residual=residual), schedule=Threshold(NEAR), forecast=Linear())
    reference = BlockCache(model, Threshold(NEAR), Linear(), first=first, last=last, residual=residual)
    runs_alike(compiled_with(config, model), reference)
    assert 0 < sum(reference.computed) < STEPS


def test_teacache_looks_at_the_modulated_input_of_every_step():
    """https://arxiv.org/abs/2411.19108: accumulated, rescaled, compared with the step before, computed or not."""
    model, coefficients = transformer(depth=3), (2.0, 0.5, 0.01)
    config = TeaCacheConfig(rel_l1_thresh=0.15, coefficients=coefficients, module=r"blocks\.0\.norm")
    schedule = (Threshold(0.15, accumulate=True, coefficients=coefficients) & Final(1)).bind(STEPS)
    reference = BlockCache(model, schedule, Reuse(), first=0, every=True, modulated=True)
    compiled = compiled_with(config, model)
    runs_alike(compiled, reference)
    assert 1 < sum(reference.computed) < STEPS - 2
    found = cachepass.summary(compiled).distances["default"]
    assert [d or 0.0 for d in found] == pytest.approx([d or 0.0 for d in reference.seen], rel=1e-4)
    default = compiled_with(TeaCacheConfig(rel_l1_thresh=0.15, coefficients=coefficients), model)
    runs_alike(default, reference)  # the first norm of the first block is the one that was named


# ---- one capture, one number per step -------------------------------------------------------------------------------

DECIDING = {
    "first block": FirstBlockCacheConfig(threshold=NEAR),
    "dbcache": DBCacheConfig(
        Fn_compute_blocks=1, residual_diff_threshold=NEAR, max_warmup_steps=2, calibrator=Taylor(1)
    ),
    "teacache": TeaCacheConfig(rel_l1_thresh=0.3),
    "block output": CacheConfig(schedule=Threshold(0.1), forecast=Linear(), probe=BlockOutput(1)),
}


def reads(run) -> int:
    """How often a number was read from a tensor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.name == "aten::_local_scalar_dense" for event in profile.events())


@pytest.mark.parametrize(("method", "lowering"), [*((method, "eager") for method in DECIDING),
                                                  ("first block", "specialize"),
                                                  ("dbcache", "specialize")])  # fmt: skip
def test_one_capture_no_break_no_recompile_and_one_number_per_step(method, lowering):
    counters.clear()
    compiled = compiled_with(DECIDING[method], transformer(depth=3), lowering)
    for run in range(3):
        counts = []
        for call in calls(STEPS):
            counts.append(reads(lambda call=call: compiled(*call)) if run else compiled(*call))
        if run:
            asked = [int(d is not None) for d in cachepass.summary(compiled).distances["default"]]
            assert counts == asked and sum(asked) >= STEPS - 3  # none where the schedule says so by itself
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    summary = cachepass.summary(compiled)
    assert {name for name in summary.variants if name != "once"} == {"decide", "compute", "predict"}
    assert summary.predicted["blocks"] and summary.computed["blocks"]
    assert summary.cache_bytes == summary.planned_bytes


@pytest.mark.parametrize(("method", "lowering"), [*((method, "cond") for method in DECIDING),
                                                  ("teacache", "specialize")])  # fmt: skip
def test_the_program_may_decide_by_itself(method, lowering):
    """The same decisions and results, whether the host decides between two programs or one program decides."""
    model = transformer(depth=3)
    compiled, plain = compiled_with(DECIDING[method], model, lowering), compiled_with(DECIDING[method], model)
    for _ in range(2):
        for call in calls(STEPS):
            assert close(compiled(*call), plain(*call), 1e-5)
        assert computed(compiled) == computed(plain)
        found, wanted = (cachepass.summary(c).distances["default"] for c in (compiled, plain))
        assert [d is None for d in found] == [d is None for d in wanted]
        assert [d for d in found if d] == pytest.approx([d for d in wanted if d], rel=1e-4)
    assert 0 < sum(computed(plain)) < STEPS


def test_a_schedule_without_a_threshold_reads_nothing():
    compiled = compiled_with(
        MagCacheConfig(mag_ratios=[1.0, 1.05, 0.97], num_inference_steps=STEPS, threshold=0.2), transformer(depth=3)
    )
    counts = [reads(lambda call=call: compiled(*call)) for call in calls(STEPS)]
    assert sum(counts) == 0 and 0 < sum(computed(compiled)) < STEPS


# ---- states ---------------------------------------------------------------------------------------------------------


def test_contexts_decide_by_themselves():
    model = transformer(depth=3)
    compiled = compiled_with(FirstBlockCacheConfig(threshold=NEAR), model)
    references = {name: BlockCache(model, Threshold(NEAR, inclusive=True), Reuse()) for name in ("cond", "uncond")}
    for step, (x, timestep) in enumerate(calls(STEPS)):
        for name, call in (("cond", (x, timestep)), ("uncond", (x * (1 + 0.1 * (step >= 2)), timestep))):
            with cachepass.cache_context(name):
                assert close(compiled(*call), references[name](*call))
    marks = cachepass.summary(compiled).last_runs
    for name, reference in references.items():
        assert [mark == "#" for mark in marks[name]["blocks"]] == reference.computed
    assert references["cond"].computed != references["uncond"].computed


@pytest.mark.parametrize("lowering", ["eager", "cond"])
def test_a_failed_step_leaves_the_decisions_as_they_were(monkeypatch, lowering):
    """The step is repeated; what was counted and kept before it still holds, or is computed anew."""
    model = transformer(depth=3)
    compiled = compiled_with(CacheConfig(schedule=Threshold(NEAR) & MaxSkips(total=4)), model, lowering)
    for failing in (3, 5):
        cachepass.reset(compiled)
        for step, call in enumerate(calls(STEPS)):
            if step == failing:
                from cachepass.run.state import RunState

                with monkeypatch.context() as patch:
                    patch.setattr(RunState, "commit", _fail)
                    with pytest.raises(MemoryError):
                        compiled(*call)
            result = compiled(*call)
            assert torch.isfinite(result).all()
        assert len(computed(compiled)) == STEPS
        assert 1 <= STEPS - sum(computed(compiled)) <= 4


def _fail(*_args, **_kwargs):
    raise MemoryError("out of memory")


def test_a_diverged_run_does_not_reach_the_next():
    model = transformer(depth=3)
    compiled = compiled_with(FirstBlockCacheConfig(threshold=NEAR), model)
    reference = BlockCache(model, Threshold(NEAR, inclusive=True), Reuse())
    for x, timestep in calls(STEPS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cachepass.CachepassWarning)  # the cache never fired, indeed
            compiled(x * float("nan"), timestep)
    assert all(computed(compiled))  # what is no number is near to nothing
    runs_alike(compiled, reference)


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_mag_ratios_are_measured_and_used():
    model = transformer(depth=3)
    compiled = compiled_with(MagCacheConfig(calibrate=True), model)
    residuals = []
    for x, timestep in calls(STEPS):
        compiled(x, timestep)
        value = x
        for block in model.blocks:
            value = block(value, timestep)
        residuals.append(value - x)
    wanted = [1.0] + [float((new.norm(dim=-1) / old.norm(dim=-1)).mean()) for old, new in itertools.pairwise(residuals)]
    ratios = cachepass.mag_ratios(compiled)
    assert ratios == pytest.approx(wanted, rel=1e-5)
    assert cachepass.summary(compiled).predicted == {"blocks": 0} or not cachepass.summary(compiled).predicted
    cached = compiled_with(MagCacheConfig(mag_ratios=ratios, threshold=0.3, num_inference_steps=STEPS), model)
    for call in calls(STEPS):
        cached(*call)
    assert 0 < sum(computed(cached)) < STEPS


def test_teacaches_polynomial_is_fitted_to_the_models_output():
    model = transformer(depth=3)

    def run(model):
        return [model(*call) for call in calls(STEPS)]

    fit = cachepass.fit_teacache(model, run, degree=2)
    outputs = run(model)
    changes = [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(outputs)]
    modulated = [model.blocks[0].norm(x) for x, _ in calls(STEPS)]
    distances = [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(modulated)]
    assert fit.changes == pytest.approx(changes, rel=1e-4)
    assert fit.distances == pytest.approx(distances, rel=1e-4)
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (distances, changes))
    matrix = torch.stack([x**2, x, torch.ones_like(x)], 1)
    best = torch.linalg.lstsq(matrix, y[:, None]).solution[:, 0]
    assert fit.coefficients == pytest.approx(best.tolist(), rel=1e-2)
    assert fit.error == pytest.approx(float((matrix @ best - y).square().mean().sqrt()), rel=1e-2)


@pytest.mark.parametrize("degree", [0, 7, 10, True])
def test_a_fit_needs_a_degree_and_enough_steps(degree):
    with pytest.raises(cachepass.ConfigError, match="fit_teacache"):
        cachepass.fit_teacache(transformer(), lambda model: [model(*call) for call in calls(5)], degree=degree)
    with pytest.raises(cachepass.ConfigError, match="distances were measured"):
        cachepass.fit_teacache(transformer(), lambda model: [model(*call) for call in calls(4)])


def test_ratios_of_a_model_that_measured_none():
    compiled = compiled_with(FirstBlockCacheConfig(), transformer())
    for call in calls(3):
        compiled(*call)
    with pytest.raises(cachepass.ConfigError, match="nothing was measured"):
        cachepass.mag_ratios(compiled)


# ---- seeing ---------------------------------------------------------------------------------------------------------


def test_the_timeline_says_what_only_the_data_decide():
    model, call = transformer(depth=3), calls(1)[0]
    config = CacheConfig(schedule=Threshold(NEAR) & WarmUp(2) & Final(1))
    explanation = cachepass.explain(model, *call, cache=config, options={"num_inference_steps": 6})
    (lane,) = explanation.timeline(6)
    assert str(lane) == "default blocks: ##???#  3 computed, 0 predicted, 3 decided by the data"
    assert "blocks.1..blocks.2" in str(explanation)
    assert "decided" in explanation.to_html()
    fixed = cachepass.explain(model, *call, cache=CacheConfig(schedule=MaxSkips(consecutive=2)))
    (lane,) = fixed.timeline(7)
    assert "#..#..#" in str(lane)


def test_the_latents_are_found_by_name_and_said():
    class Named(Transformer):
        """Its text comes first in the graph."""

        def forward(self, latents, timestep, text):
            return super().forward(torch.cat([text, latents], 1), timestep)

    x, timestep = calls(1)[0]
    explanation = cachepass.explain(
        Named().eval(),
        x,
        timestep,
        x + 1,
        cache=SeaCacheConfig(cache_end_steps=0),
        options={"num_inference_steps": STEPS},
    )
    assert "the probe looks at the input latents" in explanation.notes


def test_a_warm_up_compiles_what_the_data_may_decide():
    compiled = compiled_with(FirstBlockCacheConfig(threshold=NEAR), transformer(depth=3))
    summary = cachepass.warmup(compiled, *calls(1)[0], progress=False)
    assert {name for name in summary.variants if name != "once"} == {"decide", "compute", "predict"}
    before = dict(cachepass.summary(compiled).variants)
    for call in calls(STEPS):
        compiled(*call)
    assert cachepass.summary(compiled).variants == before


# ---- modules, one by one --------------------------------------------------------------------------------------------


def test_modules_by_themselves_follow_a_probe_too():
    """Attentions forecast each by itself, while the first block's residual decides on all of them."""
    model = transformer(depth=3)
    assert CacheConfig(cut="attention").cut == Modules("attention")
    cut = Modules(r"blocks\.[12]\.attn")
    config = CacheConfig(cut=cut, schedule=Threshold(NEAR), forecast=Linear(), probe=BlockResidual(1))
    compiled, never = compiled_with(config, model), transformer(depth=3)
    error = []
    for call in calls(STEPS):
        error.append(float((compiled(*call) - never(*call)).norm() / never(*call).norm()))
    marks = cachepass.summary(compiled).last_runs["default"]["modules"]
    assert "." in marks and "#" in marks
    assert all((e < 1e-6) == (mark == "#") for e, mark in zip(error, marks, strict=True))


def test_a_probe_behind_what_it_decides_on_measures_and_skips_nothing():
    config = CacheConfig(schedule=Threshold(NEAR), probe=ModelOutput())
    with pytest.raises(cachepass.ConfigError, match="depends on what it decides"):
        compiled_with(config, transformer(depth=3))(*calls(1)[0])
    config = CacheConfig(cut=Blocks(first=1), schedule=Threshold(NEAR), probe=BlockResidual(3))
    with pytest.raises(cachepass.ConfigError, match="depends on what it decides"):
        compiled_with(config, transformer(depth=3))(*calls(1)[0])


@pytest.mark.parametrize(("config", "match"), [
    (CacheConfig(cut=Blocks(first=2, last=1)), "always computed, and the model has 3"),
    (DBCacheConfig(Fn_compute_blocks=8), "always computed, and the model has 3"),
    (CacheConfig(cut=Blocks(first=1), schedule=Threshold(NEAR), probe=BlockResidual(4)), "looks at 4 blocks"),
    (CacheConfig(schedule=Threshold(NEAR), probe=ModuleOutput("nothing")), "matches no module"),
    (CacheConfig(cut=Blocks(identifiers=[r"layers\.\d+"])), "matches no module"),
    (CacheConfig(cut="nothing"), "matches no module"),
])  # fmt: skip
def test_what_does_not_fit_the_model(config, match):
    with pytest.raises(cachepass.CachepassError, match=match):
        compiled_with(config, transformer(depth=3))(*calls(1)[0])


def test_blocks_compiled_one_by_one_are_no_stack():
    model = transformer(depth=3)
    for block in model.blocks:
        block.compile(
            backend="cached_inductor",
            options={"cache": FirstBlockCacheConfig(), "lowering": "eager", "num_inference_steps": STEPS},
        )
    with pytest.raises(cachepass.PartialGraphError, match="in one graph"):
        model(*calls(1)[0])
