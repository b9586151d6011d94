"""Real diffusers pipelines with ``enable_cache``: equal to diffusers' own hooks in the same pipelines."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import types
from typing import Any

import pytest
import torch
from pipelines import FLUX_CONTROLNET, PIPELINES, WAN_22, Case
from reference import FasterCache
from small_models import transformer
from zoo import relative_error, sweep_over

import cachepass
from cachepass.integrations.diffusers import disable_cache, enable_cache
from cachepass.run.live import programs_of
from cachepass.testing import count_compiles

STEPS = 9
TOLERANCE = 1e-5  # relative, fp32
TAYLOR: dict[str, Any] = {"cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1,
                          "cache_identifiers": [r".*\.attn\d?"]}  # fmt: skip
PAB: dict[str, Any] = {
    f"{kind}_attention_{what}": value
    for kind in ("spatial", "temporal", "cross")
    for what, value in (("block_skip_range", 2), ("timestep_skip_range", (100, 900)))
}
# What the models have of these kinds; to the hooks LTX's cross-attentions are spatial ones.
KINDS = {"Wan": ("spatial", "cross"), "Latte": ("spatial", "temporal", "cross"), "PixArt": ("spatial", "cross"),
         "LTX": ("spatial", "cross")}  # fmt: skip
FASTER: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 900),
    "temporal_attention_block_skip_range": 2, "temporal_attention_timestep_skip_range": (-1, 900),
    "unconditional_batch_skip_range": 3, "unconditional_batch_timestep_skip_range": (-1, 900),
    "low_frequency_weight_update_timestep_range": (99, 901), "high_frequency_weight_update_timestep_range": (-1, 301),
}  # fmt: skip
FASTER_MODELS = ("CogVideoX", "Latte", "PixArt")  # the pipelines with guidance batches in which the hooks work
# Diffusers' hooks for PAB keep one state for both calls of a step.
WITHOUT_GUIDANCE = {"Flux": {"true_cfg_scale": 1.0}, "Wan": {"guidance_scale": 1.0},
                    "HunyuanVideo": {"true_cfg_scale": 1.0}, "QwenImage": {"true_cfg_scale": 1.0}}  # fmt: skip


def hooked(name: str, method: str, fields: dict[str, Any]) -> Any:
    """The pipeline with diffusers' hooks, told the timestep by the transformer's input, and a context where the
    pipeline opens none."""
    import diffusers
    from diffusers.hooks import (
        apply_faster_cache,
        apply_pyramid_attention_broadcast,
        apply_taylorseer_cache,
    )
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    case, now = PIPELINES[name], [0.0]
    pipe = case.make()

    def tell(module: Any, _: Any, kwargs: Any) -> None:
        timestep = float(kwargs["timestep"].flatten()[0])
        now[0] = 1000 * timestep if name in ("Flux", "QwenImage") else timestep
        if not case.contexts:
            _set_cache_context(module, CacheContext("default"))

    pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True)
    if method == "taylorseer":
        apply_taylorseer_cache(pipe.transformer, diffusers.TaylorSeerCacheConfig(**fields))
    elif method == "pab":
        config = diffusers.PyramidAttentionBroadcastConfig(**fields, current_timestep_callback=lambda: now[0])
        apply_pyramid_attention_broadcast(pipe.transformer, config)
    else:
        config = diffusers.FasterCacheConfig(**fields, current_timestep_callback=lambda: now[0])
        apply_faster_cache(pipe.transformer, config)
    return pipe


def fields_of(name: str, method: str) -> dict[str, Any]:
    if method == "taylorseer":
        return TAYLOR | {"taylor_factors_dtype": torch.float32}
    fields, kinds = (FASTER, ("spatial",)) if method == "fastercache" else (PAB, KINDS.get(name, ("spatial",)))
    absent = {"spatial", "temporal", "cross"} - {*kinds, *KINDS.get(name, ())}
    given = {key: value for key, value in fields.items() if key.split("_")[0] not in absent}
    if (name, method) == ("Latte", "pab"):  # its temporal blocks' paths hold "transformer_blocks" too
        given["spatial_attention_block_identifiers"] = ("^transformer_blocks",)
    return given | ({"tensor_format": PIPELINES[name].latents} if method == "fastercache" else {})


@pytest.mark.parametrize(("name", "method"), [
    *itertools.product(PIPELINES, ("taylorseer", "pab")), *((name, "fastercache") for name in FASTER_MODELS),
])  # fmt: skip
@pytest.mark.covering
def test_pipelines_give_what_diffusers_hooks_give(name, method):
    from diffusers.hooks import HookRegistry

    case, fields = PIPELINES[name], fields_of(name, method)
    more = WITHOUT_GUIDANCE.get(name, {}) if method == "pab" else {}
    expected_pipe, pipe = hooked(name, method, fields), case.make()
    enable_cache(pipe, {"method": method, **fields}, lowering="eager")
    with count_compiles() as counts:
        for seed in (0, 1):
            got = case.run(pipe, STEPS, seed, **more)
            assert relative_error(got, case.run(expected_pipe, STEPS, seed, **more)) < TOLERANCE
            HookRegistry.check_if_exists_or_initialize(expected_pipe.transformer).reset_stateful_hooks(recurse=True)
    calls = 1 if more else case.calls
    assert (counts.graphs, counts.graph_breaks, counts.recompiles) == (2 if method == "fastercache" else 1, 0, 0)
    summary = cachepass.summary(pipe.transformer)
    assert (summary.runs, summary.steps) == (2 * calls, 2 * STEPS * calls)
    assert summary.contexts == (case.contexts[:calls] or ("default",))
    assert sum(summary.predicted.values()) > 0


class Defined:
    """In place of a transformer: FasterCache by its definition on guidance batches. Where the pipeline makes two calls,
    the first one runs both, and the second one gets the other half."""

    def __init__(self, pipe: Any, case: Case, reference: FasterCache, scale: float) -> None:
        self.case, self.reference, self.scale = case, reference, scale
        self.uncond: dict[str, Any] = {}
        self.answer: torch.Tensor | None = None
        if case.calls == 2:  # what the second call of a step is given stays the same but for latents and timestep
            calls: list[dict[str, Any]] = []
            spy = pipe.transformer.register_forward_pre_hook(lambda *given: calls.append(given[2]), with_kwargs=True)
            case.run(pipe, 1)
            spy.remove()
            self.uncond = calls[1]

    def __call__(self, hidden_states: torch.Tensor, *, return_dict: bool = True, **cond: Any) -> Any:
        output = self._output(cond | {"hidden_states": hidden_states, "return_dict": False})
        return types.SimpleNamespace(sample=output) if return_dict else (output,)

    def _output(self, cond: dict[str, Any]) -> torch.Tensor:
        if self.answer is not None:
            answer, self.answer = self.answer, None
            return answer
        now, given = self.scale * float(cond["timestep"].flatten()[0]), dict(cond)
        if self.case.calls == 2:
            for name, value in self.uncond.items():
                own = cond[name]
                if name in self.reference.config.guided_inputs and own is not None:
                    given[name] = torch.cat([own if name in ("hidden_states", "timestep") else value, own])
                elif name == "img_shapes":
                    given[name] = own * 2
        output = self.reference(now, len(given["hidden_states"]), **given)
        if self.case.calls == 2:
            self.answer, output = output.chunk(2)
        return output


@pytest.mark.parametrize("name", sweep_over(
    ["Flux", "Wan", "SD3", "HunyuanVideo", "LTX", "DiT", "QwenImage"], few=["Flux", "Wan", "DiT", "QwenImage"],
))  # fmt: skip
def test_fastercache_in_pipelines_where_the_hooks_of_diffusers_fail(name):
    """They know no two calls per step, no tokens and no batch that begins with the conditional half."""
    case = PIPELINES[name]
    config = cachepass.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=3,
        tensor_format=case.latents,
        latent_grid=case.grid,
        unconditional_first=case.unconditional_first,
    )
    pipe, expected = case.make(), case.make()
    enable_cache(pipe, config, lowering="eager")
    with count_compiles() as counts:
        results = [case.run(pipe, STEPS, seed) for seed in (0, 1)]
    assert (counts.graph_breaks, counts.recompiles) == (0, 0)
    assert counts.graphs == (1 if case.calls == 2 else 2)  # at half batch too
    summary = cachepass.summary(pipe.transformer)
    assert summary.predicted["unconditional"] >= 2 * 4 and summary.predicted["spatial"] > 0
    program = next(programs_of(pipe.transformer))[0].program
    kinds = {cut.region: cut.group for cut in program.plan.cuts}
    reference = FasterCache(expected.transformer, config, kinds)
    defined = Defined(expected, case, reference, 1000 if name in ("Flux", "QwenImage") else 1)
    reference.model, model = copy.copy(expected.transformer), expected.transformer
    model.forward = defined
    for seed, result in enumerate(results):
        reference.start()
        assert relative_error(result, case.run(expected, STEPS, seed)) < TOLERANCE


def test_a_pipeline_that_opens_no_contexts():
    """The calls of a step are told apart all the same: as with the contexts that the pipeline opens."""
    case, pipe, silent = PIPELINES["Flux"], PIPELINES["Flux"].make(), PIPELINES["Flux"].make()
    for each in (pipe, silent):
        enable_cache(each, fields_of("Flux", "pab") | {"method": "pab"}, lowering="eager")
    silent.transformer.cache_context = contextlib.nullcontext
    for seed in (0, 1):
        assert torch.equal(case.run(silent, STEPS, seed), case.run(pipe, STEPS, seed))
    named, unnamed = cachepass.summary(pipe.transformer), cachepass.summary(silent.transformer)
    assert unnamed.contexts == ("default", "call 2")
    assert list(unnamed.by_context.values()) == list(named.by_context.values())
    assert list(unnamed.last_runs.values()) == list(named.last_runs.values())


def test_both_transformers_of_a_pipeline_are_cached():
    """Wan 2.2 runs one for the noisy steps and another for the rest."""
    import diffusers
    from diffusers.hooks import apply_taylorseer_cache

    case, expected, fields = WAN_22, WAN_22.make(), fields_of("Wan", "taylorseer")
    for part in (expected.transformer, expected.transformer_2):
        apply_taylorseer_cache(part, diffusers.TaylorSeerCacheConfig(**fields))
    pipe = case.make()
    enable_cache(pipe, fields | {"method": "taylorseer"}, lowering="eager")
    for seed in (0, 1):
        assert relative_error(case.run(pipe, 12, seed), case.run(expected, 12, seed)) < TOLERANCE
    steps = []
    for part in (pipe.transformer, pipe.transformer_2):
        summary = cachepass.summary(part)
        assert summary.predicted and summary.runs == 2 * 2
        steps.append(summary.steps)
    assert sum(steps) == 2 * 12 * 2 and min(steps) > 0


def test_controlnet_beside_a_cached_transformer():
    case = FLUX_CONTROLNET
    expected, pipe = case.make(), case.make()
    enable_cache(pipe, {"method": "invariant"}, lowering="eager")
    assert relative_error(case.run(pipe, 4), case.run(expected, 4)) < TOLERANCE
    disable_cache(pipe)
    enable_cache(pipe, TAYLOR | {"method": "taylorseer"}, lowering="eager")
    case.run(pipe, STEPS)
    assert cachepass.summary(pipe.transformer).predicted


def adapter(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def offload(pipe: Any) -> None:
    """As ``enable_model_cpu_offload`` does with a device at hand."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))


def group_offload(pipe: Any) -> None:
    """A hook of diffusers on the transformer itself."""
    from diffusers.hooks import HookRegistry, ModelHook

    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(ModelHook(), "nothing")


def cache(pipe: Any) -> None:
    enable_cache(pipe, TAYLOR | {"method": "taylorseer"}, lowering="eager")


def to_double(pipe: Any) -> None:
    pipe.to(torch.float64)


@pytest.mark.parametrize("changes", sweep_over(
    [(adapter, offload), (adapter, group_offload), (offload, group_offload), (to_double,)],
    few=[(adapter, group_offload), (to_double,)],
))  # fmt: skip
def test_the_order_of_enabling_and_of_other_changes_is_free(changes):
    case, results = PIPELINES["Flux"], []
    for order in itertools.permutations((cache, *changes)):
        if order[-1] is not cache and [c for c in order if c is not cache] != list(changes):
            continue  # the order of the others among themselves is another matter
        torch._dynamo.reset()
        pipe = case.make()
        for change in order:
            change(pipe)
        results.append(case.run(pipe, STEPS))
        assert cachepass.summary(pipe.transformer).predicted, order
    assert len(results) > 1
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_changes_after_the_first_run():
    case, pipe = PIPELINES["Flux"], PIPELINES["Flux"].make()
    cache(pipe)
    before = case.run(pipe, STEPS)
    adapter(pipe)
    offload(pipe)
    changed = case.run(pipe, STEPS)
    assert relative_error(changed, before) > 1e-4
    fresh = case.make()
    adapter(fresh)
    cache(fresh)
    assert torch.equal(changed, case.run(fresh, STEPS))


def test_disabling_restores_the_model_and_frees_its_slots():
    case, pipe = PIPELINES["Wan"], PIPELINES["Wan"].make()
    plain = case.run(pipe, STEPS)
    attributes = set(vars(pipe.transformer))
    cache(pipe)
    assert relative_error(case.run(pipe, STEPS), plain) > 1e-6
    assert cachepass.summary(pipe.transformer).cache_bytes > 0
    disable_cache(pipe)
    assert set(vars(pipe.transformer)) - {"_diffusers_hook"} == attributes - {"_diffusers_hook"}
    with pytest.raises(cachepass.NotCompiledError, match="no cached_inductor program belongs"):
        cachepass.summary(pipe.transformer)
    assert torch.equal(case.run(pipe, STEPS), plain)


def test_another_method_after_disabling():
    """Nothing of the first one is left: in no count, no slot and no result. Enabled again, it begins anew."""
    case, pipe, results = PIPELINES["Wan"], PIPELINES["Wan"].make(), []
    for fields, groups in (
        (TAYLOR | {"method": "taylorseer"}, {"taylorseer"}),
        (fields_of("Wan", "pab") | {"method": "pab"}, {"spatial", "cross"}),
        (TAYLOR | {"method": "taylorseer"}, {"taylorseer"}),
    ):
        enable_cache(pipe, fields, lowering="eager")
        results.append(case.run(pipe, STEPS))
        found = cachepass.summary(pipe.transformer)
        assert (found.runs, found.steps, set(found.computed)) == (2, 2 * STEPS, groups)
        assert found.cache_bytes == 2 * found.planned_bytes > 0  # the plan is for one context
        disable_cache(pipe)
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


@pytest.mark.parametrize("hook", [offload, group_offload])
def test_disabling_below_a_hook(hook):
    case, pipe = PIPELINES["Flux"], PIPELINES["Flux"].make()
    plain = case.run(pipe, STEPS)
    cache(pipe)
    hook(pipe)
    case.run(pipe, STEPS)
    disable_cache(pipe)
    assert torch.equal(case.run(pipe, STEPS), plain)


def test_a_copy_of_a_cached_model_has_states_of_its_own():
    case, pipe = PIPELINES["CogVideoX"], PIPELINES["CogVideoX"].make()
    cache(pipe)
    expected = case.run(pipe, STEPS)
    other = case.make()
    other.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(case.run(other, STEPS), expected)
    assert cachepass.summary(other.transformer).steps == cachepass.summary(pipe.transformer).steps == STEPS


@pytest.mark.parametrize("name", ["CogVideoX", "Flux"])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.covering
def test_a_saved_model_is_loaded_without_its_cache(name, ran, tmp_path):
    case, pipe = PIPELINES[name], PIPELINES[name].make()
    plain = case.run(pipe, STEPS)
    cache(pipe)
    if ran:
        cached = case.run(pipe, STEPS)
    torch.save(pipe.transformer, tmp_path / "transformer.pt")
    other = case.make()
    for load in (
        lambda: torch.load(tmp_path / "transformer.pt", weights_only=False),
        lambda: pickle.loads(pickle.dumps(pipe.transformer)),
    ):
        other.transformer = load()
        assert torch.equal(case.run(other, STEPS), plain)
        with pytest.raises(cachepass.NotCompiledError):
            disable_cache(other)
    cache(other)  # and it can be cached again
    result = case.run(other, STEPS)
    assert not ran or torch.equal(result, cached)


def test_a_saved_model_of_any_class_is_loaded_without_its_cache():
    model = transformer()
    enable_cache(model, "pab", lowering="eager")
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.forward.__func__ is type(model).forward
    enable_cache(loaded, "pab", lowering="eager")


def test_a_run_that_fails_in_the_middle_leaves_the_next_one_whole():
    case, pipe = PIPELINES["Flux"], PIPELINES["Flux"].make()
    cache(pipe)
    expected = case.run(pipe, STEPS)

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:  # noqa: ARG001
        if step == 5:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        case.run(pipe, STEPS, callback_on_step_end=stop)
    assert torch.equal(case.run(pipe, STEPS), expected)


def test_timesteps_come_from_the_pipeline():
    """FLUX's transformer gets t / 1000; ranges are in 0..1000 all the same, and no input is read."""
    case, pipe = PIPELINES["Flux"], PIPELINES["Flux"].make()
    fields = fields_of("Flux", "pab")
    enable_cache(pipe, fields | {"method": "pab"}, lowering="eager")
    case.run(pipe, STEPS)
    seen = next(iter(model_of_pipe(pipe).runs)).clock.highest
    assert seen is None  # the run is over
    assert cachepass.summary(pipe.transformer).predicted["spatial"] > 0
    disable_cache(pipe)
    enable_cache(pipe, fields | {"method": "pab", "spatial_attention_timestep_skip_range": (0, 1)}, lowering="eager")
    with pytest.warns(cachepass.CachepassWarning, match="never fired"):
        case.run(pipe, STEPS)


def model_of_pipe(pipe: Any) -> Any:
    return next(programs_of(pipe.transformer))[1].model


def test_errors():
    pipe = PIPELINES["DiT"].make()
    with pytest.raises(cachepass.NotCompiledError, match="not on"):
        disable_cache(pipe)
    with pytest.raises(cachepass.ConfigError, match="neither a pipeline nor a model: int"):
        enable_cache(3, "taylorseer")
    with pytest.raises(cachepass.OptionError, match="there is no method"):
        enable_cache(pipe, "taylor")
    with pytest.raises(cachepass.OptionError, match="unknown option"):
        enable_cache(pipe, "taylorseer", lowring="eager")
    assert "forward" not in vars(pipe.transformer)
    enable_cache(pipe, "taylorseer", lowering="eager")
    with pytest.raises(cachepass.ConfigError, match="on already"):
        enable_cache(pipe, "taylorseer")
    disable_cache(pipe)
    pipe.transformer.forward = print
    with pytest.raises(cachepass.ConfigError, match="its forward was replaced"):
        enable_cache(pipe, "taylorseer")
    hooked_pipe = hooked("Flux", "taylorseer", TAYLOR)
    hooked_pipe.transformer._cache_config = object()
    with pytest.raises(cachepass.ConfigError, match="on already"):
        enable_cache(hooked_pipe, "taylorseer")
