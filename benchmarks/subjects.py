"""The subjects of the benchmarks: cachepass, and what a user would pick instead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bounds import Cost, cost_of
from decisions import STEPS, Decisions, decisions
from shapes import SHAPES, build, step_inputs, timestep_of

import cachepass
from cachepass.cut import Blocks
from cachepass.forecast import Fit, Fitted, Taylor
from cachepass.run.live import programs_of
from cachepass.schedule import KeySteps
from cachepass.tuning.fitting import kept_at

TAYLOR: dict[str, Any] = {"cache_interval": 4, "disable_cache_before_step": 2, "max_order": 1}
USUAL: dict[str, Any] = {
    "cache_interval": 5,
    "disable_cache_before_step": 10,
    "max_order": 1,
}  # in papers and pipelines
TAYLORS = {"taylorseer": TAYLOR, "taylorseer-blocks": TAYLOR, "taylorseer-usual": USUAL, "tuned": TAYLOR}
PAB: dict[str, Any] = {"spatial_attention_block_skip_range": 3}
ALWAYS = (-1, 1001)
FASTER: dict[str, Any] = {
    "unconditional_batch_skip_range": 5, "unconditional_batch_timestep_skip_range": ALWAYS,
    "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 681),
}  # fmt: skip
DECIDING = {"first-block": 1, "dbcache": 2}  # methods that decide by what they measure, behind so many steps
FORMATS = {"cogvideox": "BFCHW", "dit": "BCHW"}  # shapes that carry a guidance batch


@dataclass(frozen=True)
class Case:
    """What all subjects of one table run: a model's shape, a method's settings, a device and a dtype."""

    shape: str
    method: str
    device: str
    dtype: torch.dtype

    @property
    def guided(self) -> bool:
        return self.method == "fastercache"

    def build(self) -> torch.nn.Module:
        return build(self.shape, self.device, self.dtype)

    def inputs(self, step: int) -> dict[str, Any]:
        return step_inputs(self.shape, step, STEPS, self.device, self.dtype, guided=self.guided)

    def phase(self, step: int) -> str:
        """``"compute"``, ``"predict"`` or, for guidance, ``"skip"``."""
        if self.method in DECIDING:
            return "compute" if self.decisions.computed[step] else "predict"
        return _PHASES[self.method](step)

    @property
    def decisions(self) -> Decisions:
        """Those of methods that decide by the first block's residual."""
        return decisions(self.shape, self.device, self.dtype, DECIDING[self.method])


@dataclass
class Subject:
    """One way to run a model. ``phased``: the case's phases are those of its steps.

    ``warmup`` compiles every program of a run; None: a run does. ``costs`` is what its programs do, by phase.
    """

    name: str
    call: Callable[..., Any]
    reset: Callable[[], None] = lambda: None
    phased: bool = True
    cache_bytes: Callable[[], int | None] = lambda: None
    warmup: Callable[[], object] | None = None
    costs: Callable[[], dict[str, Cost]] = dict


def taylor_phase(step: int, settings: dict[str, Any] = TAYLOR) -> str:
    before, interval = settings["disable_cache_before_step"], settings["cache_interval"]
    return "compute" if step < before or (step - before - 1) % interval == 0 else "predict"


def _pab_phase(step: int) -> str:
    skip = step > 0 and 100 < timestep_of(step, STEPS) < 800 and step % PAB["spatial_attention_block_skip_range"] != 0
    return "predict" if skip else "compute"


def _faster_phase(step: int) -> str:
    """``"compute"``: the whole batch; ``"skip"``: its conditional half; ``"predict"``: attentions forecast too."""
    if step % FASTER["unconditional_batch_skip_range"] == 0:
        return "compute"
    predicted = step % FASTER["spatial_attention_block_skip_range"] != 0 and timestep_of(step, STEPS) < 681
    return "predict" if predicted else "skip"


_PHASES: dict[str, Callable[[int], str]] = {
    "taylorseer": taylor_phase, "taylorseer-usual": lambda step: taylor_phase(step, USUAL), "pab": _pab_phase,
    "taylorseer-blocks": taylor_phase, "tuned": taylor_phase,
    "fastercache": _faster_phase, "invariant": lambda _: "compute",
}  # fmt: skip
# What a phase of ours is called in the tables.
_NAMES = {"compute": "compute", "predict": "predict", "both": "compute", "half": "skip", "half/predict": "predict"}


def plain(case: Case) -> Subject:
    """torch.compile with Inductor, no cache."""
    return Subject("plain Inductor", torch.compile(case.build(), fullgraph=True), phased=False)


def as_it_is(case: Case) -> Subject:
    """Nothing compiled, no cache."""
    return Subject("eager", case.build(), phased=False)


def plain_regional(case: Case) -> Subject:
    """Inductor block by block, no cache."""
    model = case.build()
    model.compile_repeated_blocks(fullgraph=True)  # pyright: ignore[reportCallIssue]
    return Subject("plain Inductor, compile_repeated_blocks", model, phased=False)


def ours_regional(case: Case) -> Subject:
    """cachepass block by block: each class of block is compiled once."""
    model = case.build()
    model.compile_repeated_blocks(  # pyright: ignore[reportCallIssue]
        backend="cached_inductor", fullgraph=True, options=_options(case)
    )

    def warmup() -> object:
        return cachepass.warmup(model, **case.inputs(0), progress=False)

    return Subject(
        "cachepass, compile_repeated_blocks",
        model,
        lambda: cachepass.reset(model),
        True,
        lambda: cachepass.summary(model).cache_bytes,
        warmup,
    )


def ours(lowering: str, **more: Any) -> Callable[[Case], Subject]:
    """cachepass with the case's method; ``more``: further options, which the name says."""

    def make(case: Case) -> Subject:
        options = _options(case) | {"lowering": lowering} | more
        compiled = torch.compile(case.build(), backend="cached_inductor", fullgraph=True, options=options)

        def cache_bytes() -> int:
            summary = cachepass.summary(compiled)
            assert summary.cache_bytes == summary.planned_bytes, "the plan says every byte"
            return summary.cache_bytes

        def warmup() -> object:
            timesteps = [timestep_of_inputs(case.inputs(step)) for step in range(STEPS)]
            return cachepass.warmup(compiled, **case.inputs(0), timesteps=timesteps, progress=False)

        said = "".join(f", {name}={value}" for name, value in more.items())
        return Subject(
            f"cachepass ({lowering}{said})",
            compiled,
            lambda: cachepass.reset(compiled),
            True,
            cache_bytes,
            warmup,
            lambda: dict(_costs(compiled)),
        )

    return make


def _costs(compiled: torch.nn.Module) -> Iterator[tuple[str, Cost]]:
    dispatcher, _ = next(programs_of(compiled))
    program = dispatcher.program
    assert program is not None
    for phase in program.plan.phases:
        variant = program.specialized(phase)
        if variant.name in _NAMES:
            yield _NAMES[variant.name], cost_of(variant.gm)


def _options(case: Case) -> dict[str, Any]:
    return {"cache": our_cache(case), "timestep_scale": SHAPES[case.shape].unit, "num_inference_steps": STEPS}


def our_cache(case: Case) -> Any:
    if case.method.startswith("taylorseer"):
        return {"method": "taylorseer", **_taylor(case)}
    if case.method == "pab":
        return {"method": "pab", **PAB}
    if case.method == "fastercache":
        return {"method": "fastercache", **FASTER, "tensor_format": FORMATS[case.shape]}
    if case.method == "first-block":
        return {"method": "first_block_cache", "threshold": case.decisions.threshold}
    if case.method == "dbcache":
        return {"method": "dbcache", **_deciding(case), "calibrator": Taylor(TAYLOR["max_order"], since=3)}
    if case.method == "tuned":
        return _tuned()
    return {"method": case.method}


def _taylor(case: Case) -> dict[str, Any]:
    """Of TaylorSeer, as diffusers and we call it."""
    shape = SHAPES[case.shape]
    identifier = shape.blocks if case.method == "taylorseer-blocks" else shape.attention
    return {**TAYLORS[case.method], "cache_identifiers": [identifier], "taylor_factors_dtype": case.dtype}


def _tuned() -> cachepass.TunedConfig:
    """The shape of what ``cachepass.tune`` finds; the weights' values cost nothing."""
    computed = [step for step in range(STEPS) if taylor_phase(step) == "compute"]
    timesteps = tuple(timestep_of(step, STEPS) for step in range(STEPS))
    table = tuple(
        Fit(step, kept, (1.5, *(0.5 / (1 - len(kept)) for _ in kept[1:])))
        for step, kept in kept_at(computed, STEPS, 3)
        if len(kept) > 1
    )
    return cachepass.TunedConfig(
        cut=Blocks(), schedule=KeySteps(computed, timesteps), forecast=Fitted(3, timesteps, table)
    )


def _deciding(case: Case) -> dict[str, Any]:
    """Of DBCache."""
    return {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": DECIDING["dbcache"],
        "residual_diff_threshold": case.decisions.threshold,
    }


def hooks(how: str) -> Callable[[Case], Subject]:
    """Diffusers' own hooks under ``"torch.compile"`` (which breaks the graph at each of them), or with
    ``"compile_repeated_blocks"``."""

    def make(case: Case) -> Subject:
        import diffusers
        from diffusers.hooks import (
            HookRegistry,
            apply_faster_cache,
            apply_pyramid_attention_broadcast,
            apply_taylorseer_cache,
        )
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        model, now, shape = case.build(), [0.0], SHAPES[case.shape]
        clock: Any = lambda: now[0]  # noqa: E731
        if case.method == "fastercache":
            apply_faster_cache(
                model,
                diffusers.FasterCacheConfig(
                    **FASTER, tensor_format=FORMATS[case.shape], current_timestep_callback=clock
                ),
            )
        elif case.method == "first-block":
            diffusers.hooks.apply_first_block_cache(
                model, diffusers.FirstBlockCacheConfig(threshold=case.decisions.threshold)
            )
        elif case.method == "pab":
            config = diffusers.PyramidAttentionBroadcastConfig(**PAB, current_timestep_callback=clock)
            apply_pyramid_attention_broadcast(model, config)
        else:
            apply_taylorseer_cache(model, diffusers.TaylorSeerCacheConfig(**_taylor(case)))
        function: Any = torch.compile(model) if how == "torch.compile" else model
        if how == "compile_repeated_blocks":
            model.compile_repeated_blocks()  # pyright: ignore[reportCallIssue]

        def call(**inputs: Any) -> Any:
            now[0] = timestep_of_inputs(inputs) * shape.unit
            _set_cache_context(model, CacheContext("benchmark"))
            return function(**inputs)

        def reset() -> None:
            HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)

        return Subject(f"diffusers hooks, {how}", call, reset, True, lambda: bytes_of_hooks(model))

    return make


def timestep_of_inputs(inputs: dict[str, Any]) -> float:
    return float(inputs["timestep"].flatten()[0])


def bytes_of_hooks(model: torch.nn.Module) -> int:
    """Bytes of the memory that the hooks keep alive (a view keeps all of its tensor's)."""
    storages: dict[int, int] = {}
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            manager = getattr(hook, "state_manager", None)
            states = [hook.state] if manager is None else list(manager._state_cache.values())
            for state in states:
                names = ("cache", "taylor_factors", "low_frequency_delta", "high_frequency_delta")
                for tensor in _tensors([getattr(state, name, None) for name in names]):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def cache_dit(case: Case) -> Subject | None:
    """cache-dit with the same computed steps and its Taylor calibrator; None where it is not installed.

    It forecasts whole block ranges and always computes the first block, and which of its steps are which is not visible
    from outside.
    """
    try:
        import cache_dit as package  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    model = case.build()
    if case.method == "dbcache":
        settings = _deciding(case)
    else:
        mask = [1 if case.phase(step) == "compute" else 0 for step in range(STEPS)]
        settings = {
            "Fn_compute_blocks": 1,
            "Bn_compute_blocks": 0,
            "steps_computation_mask": mask,
            "steps_computation_policy": "static",
        }
    config = package.DBCacheConfig(num_inference_steps=STEPS, enable_separate_cfg=False, **settings)
    order = TAYLORS.get(case.method, TAYLOR)["max_order"]
    calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=order)
    package.enable_cache(model, cache_config=config, calibrator_config=calibrator)
    model.compile_repeated_blocks()  # pyright: ignore[reportCallIssue]

    def reset() -> None:  # by itself it begins a new run one call late, seen in 1.5.3
        package.refresh_context(model, cache_config=copy.deepcopy(config), calibrator_config=copy.deepcopy(calibrator))

    return Subject("cache-dit, compile_repeated_blocks", model, reset, phased=case.method == "dbcache")


def by_blocks(make: Callable[[Case], Subject | None]) -> Callable[[Case], Subject | None]:
    """None for models whose class does not say which blocks to compile (``compile_repeated_blocks`` refuses them)."""

    def make_if_named(case: Case) -> Subject | None:
        with torch.device("meta"):
            model: Any = SHAPES[case.shape].build()
        return make(case) if model._repeated_blocks else None

    return make_if_named


OURS_BY_COND = ours("cond")
OURS_AS_CUDA_GRAPHS = ours("specialize", **{"triton.cudagraphs": True})
_HOOKS = [hooks("torch.compile"), by_blocks(hooks("compile_repeated_blocks"))]
SUBJECTS: dict[str, list[Callable[[Case], Subject | None]]] = {
    "taylorseer": [plain, ours("specialize"), OURS_BY_COND, *_HOOKS],
    # With compile_repeated_blocks PAB's hooks recompile at every count of their iterations, up to Dynamo's limit.
    "pab": [plain, ours("specialize"), OURS_BY_COND, hooks("torch.compile")],
    "taylorseer-blocks": [plain, ours("specialize"), *_HOOKS, by_blocks(cache_dit)],
    "fastercache": [plain, ours("specialize"), *_HOOKS],
    "first-block": [plain, ours("specialize"), OURS_BY_COND, *_HOOKS],
    "dbcache": [plain, ours("specialize"), OURS_BY_COND, by_blocks(cache_dit)],
    "invariant": [plain, ours("specialize")],
    "tuned": [plain, ours("specialize")],
    "compile time": [plain, by_blocks(plain_regional), ours("specialize"), by_blocks(ours_regional)],
    "compile time, all": [plain, by_blocks(plain_regional), ours("specialize"), ours("specialize", share_blocks=False),
                          OURS_BY_COND, by_blocks(ours_regional), *_HOOKS],
    "growth": [plain, ours("specialize")],
    "gpu": [plain, ours("specialize"), OURS_AS_CUDA_GRAPHS, *_HOOKS, by_blocks(cache_dit)],
    "whole": [by_blocks(plain_regional), ours("specialize"), OURS_AS_CUDA_GRAPHS,
              by_blocks(hooks("compile_repeated_blocks"))],
    "toy": [as_it_is, ours("eager")],
    "sharing": [ours("specialize"), ours("specialize", share_blocks=False)],
}  # fmt: skip
METHODS = [*_PHASES, *DECIDING]
