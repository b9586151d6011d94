"""The configs of methods that decide in the run, and of any combination of a cut, a schedule and a forecast.

Each says what it is made of as a :class:`Recipe`: where, when, and what stands in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from ..recipe.checks import check_among, check_flag, check_function, check_grid, check_int, check_number
from ..recipe.cut import BlockOutput, BlockResidual, Blocks, Cut, Latents, ModelOutput, ModuleOutput, Modules, Probe
from ..recipe.forecast import DMD, ForecastRule, Reuse, Taylor
from ..recipe.recipe import Group, Part, Recipe
from ..recipe.schedule import (
    Always,
    Final,
    MagnitudeBudget,
    Mask,
    MaxSkips,
    Refresh,
    Schedule,
    Threshold,
    WarmUp,
)
from ..recipe.spectrum import SeaFilter
from .base import MethodConfig, cache_config

#: From diffusers 0.42.1 (``FLUX_MAG_RATIOS``), source https://github.com/Zehong-Ma/MagCache: FLUX.1 in 28 steps.
FLUX_MAG_RATIOS = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
    0.89062,
)  # fmt: skip


def _one_group(
    cut: Cut, schedule: Schedule, forecast: ForecastRule, probe: Probe | None = None, metric: str = "relative_l1"
) -> Recipe:
    name = "blocks" if isinstance(cut, Blocks) else "modules"
    return Recipe((Group(name, schedule, (Part(cut, forecast),), probe, metric),))


@cache_config("cache")
class CacheConfig(MethodConfig):
    """Any cut with any schedule and any forecast.

    ::

        from cachepass.cut import Blocks
        from cachepass.forecast import Taylor
        from cachepass.schedule import Threshold, WarmUp

        CacheConfig(cut=Blocks(first=1), schedule=Threshold(0.1) & WarmUp(4), forecast=Taylor(2))

    Attributes:
        cut: What is forecast: ``Blocks(...)``, or ``Modules(...)`` (a string or list of strings means ``Modules``).
        schedule: When: a value of ``cachepass.schedule``, or several combined by ``&``, ``|`` and ``~``.
        forecast: What stands in: a value of ``cachepass.forecast``.
        probe: What a ``Threshold`` in the schedule looks at: a value of ``cachepass.cut``. None: the residual of the
            blocks that ``cut`` always computes first, or of the first block.
    """

    cut: Cut | str | Sequence[str] = Blocks(first=1)
    schedule: Schedule = Threshold(0.1)
    forecast: ForecastRule = Reuse()
    probe: Probe | None = None

    def check(self) -> None:
        cut = self.cut
        if isinstance(cut, str):
            cut = Modules(cut)
        elif isinstance(cut, (list, tuple)):
            cut = Modules(*cut)
        object.__setattr__(self, "cut", cut)
        for name, kind in (("cut", (Blocks, Modules)), ("schedule", Schedule), ("forecast", ForecastRule)):
            if not isinstance(getattr(self, name), kind):
                raise self.fail(name, f"expected a value of cachepass.{name}, got {getattr(self, name)!r}")
        probes = (BlockResidual, BlockOutput, ModuleOutput, Latents, ModelOutput)
        if self.probe is not None and not isinstance(self.probe, probes):
            raise self.fail("probe", f"expected a probe of cachepass.cut, got {self.probe!r}")
        if self.probe is not None and self.schedule.threshold is None:
            raise self.fail("probe", "nothing decides by it", "give the schedule a Threshold, or no probe")

    def recipe(self, num_inference_steps: int | None) -> Recipe:
        schedule, probe, cut = self.schedule.bind(num_inference_steps), self.probe, self.cut
        assert isinstance(cut, (Blocks, Modules))
        if probe is None and schedule.threshold is not None:
            probe = BlockResidual(max(cut.first, 1) if isinstance(cut, Blocks) else 1)
        return _one_group(cut, schedule, self.forecast, probe)


@cache_config("first_block_cache")
class FirstBlockCacheConfig(MethodConfig):
    """First-block cache (ParaAttention; diffusers' hook): if the first block changes its stream much as it did at the
    last computed step, the other blocks are taken to do so too.

    Attributes:
        threshold: Relative L1 distance of the first block's residual up to which a step is predicted, >= 0.
    """

    threshold: float = 0.05

    def check(self) -> None:
        check_number(self, "threshold", 0)

    def recipe(self, num_inference_steps: int | None) -> Recipe:  # noqa: ARG002
        return _one_group(Blocks(first=1), Threshold(self.threshold, inclusive=True), Reuse(), BlockResidual(1))


@cache_config("mag_cache")
class MagCacheConfig(MethodConfig):
    """MagCache (https://arxiv.org/abs/2506.09045), with the semantics of diffusers' hook: the residual of all blocks is
    reused while the error that calibrated ratios of its magnitude foretell stays small. Nothing is read in the run.

    With ``calibrate=True`` nothing is predicted, and a run measures the ratios: ``cachepass.mag_ratios(model)``.

    Attributes:
        threshold: Bound of the accumulated error, >= 0, included.
        max_skip_steps: Longest row of predicted steps, >= 0.
        retention_ratio: Share of a run's first steps that are computed, 0 to 1.
        num_inference_steps: Steps of a run, >= 1; ``options["num_inference_steps"]`` goes before it.
        mag_ratios: By step, the mean growth of the residual's tokens over the step before; a list of another length is
            stretched to the steps of a run. They belong to a checkpoint (``FLUX_MAG_RATIOS``: FLUX.1).
        calibrate: Measure the ratios.
    """

    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    num_inference_steps: int = 28
    mag_ratios: Sequence[float] | torch.Tensor | None = None
    calibrate: bool = False

    def check(self) -> None:
        check_number(self, "threshold", 0)
        check_int(self, "max_skip_steps", 0)
        check_number(self, "retention_ratio", 0, 1)
        check_int(self, "num_inference_steps", 1)
        check_flag(self, "calibrate")
        if self.mag_ratios is None and not self.calibrate:
            raise self.fail(
                "mag_ratios",
                "there are none",
                "they belong to a checkpoint: measure them in a run with "
                "calibrate=True (cachepass.mag_ratios), or give cachepass.FLUX_MAG_RATIOS",
            )
        ratios: Any = self.mag_ratios
        if ratios is not None:
            ratios = tuple(ratios.tolist() if isinstance(ratios, torch.Tensor) else ratios)
            if not ratios or not all(isinstance(r, (int, float)) and math.isfinite(r) and r >= 0 for r in ratios):
                raise self.fail("mag_ratios", f"expected numbers >= 0, got {self.mag_ratios!r}")
            object.__setattr__(self, "mag_ratios", ratios)

    def recipe(self, num_inference_steps: int | None) -> Recipe:
        if self.calibrate:
            return _one_group(Blocks(), Threshold(0.0), Reuse(), BlockResidual(None, every=True), "magnitude")
        steps = num_inference_steps or self.num_inference_steps
        assert isinstance(self.mag_ratios, tuple)
        retained = int(self.retention_ratio * steps + 0.5)
        schedule = MagnitudeBudget(_stretched(self.mag_ratios, steps), self.threshold, self.max_skip_steps, retained)
        return _one_group(Blocks(), schedule, Reuse())


def _stretched(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """The ratios of a run of so many steps: of each step the nearest one. Rounded in float32, as diffusers does it."""
    if len(ratios) == steps:
        return tuple(ratios)
    if steps == 1:
        return (ratios[-1],)
    places = (torch.arange(steps, dtype=torch.float32) * ((len(ratios) - 1) / (steps - 1))).round().long()
    return tuple(ratios[i] for i in places.tolist())


@cache_config("sea_cache")
class SeaCacheConfig(MethodConfig):
    """SeaCache (https://arxiv.org/abs/2602.18993), with the semantics of diffusers' hook: steps are predicted while the
    latents, filtered by how much signal there is at their noise level, have changed little in sum.

    Attributes:
        threshold: Budget of the accumulated relative L1 distance, >= 0.
        residual_order: 0: reuse the residual of all blocks; 1: extrapolate it along a line.
        retention_steps, cache_end_steps: So many first and last steps are computed, >= 0; the last ones need
            ``options["num_inference_steps"]``.
        max_consecutive_cached: Longest row of predicted steps; 0: no limit.
        power_exp: Exponent of the clean signal's power spectrum, > 0.
        raw_vision_callback: ``(None, (), {name: latents}) -> [(C, T, H, W), ...]``, traced into the graph. None: images
            and videos as they are; tokens on their ``latent_grid``.
        latent_grid: (frames, height, width) or (height, width) in tokens, where latents are tokens. None: they are
            taken as one line.
    """

    threshold: float = 0.25
    residual_order: int = 1
    retention_steps: int = 1
    cache_end_steps: int = 1
    max_consecutive_cached: int = 2
    power_exp: float = 3.0
    raw_vision_callback: Callable[..., Any] | None = None
    latent_grid: tuple[int, ...] | None = None

    def check(self) -> None:
        check_number(self, "threshold", 0)
        check_int(self, "residual_order", 0, 1)
        for name in ("retention_steps", "cache_end_steps", "max_consecutive_cached"):
            check_int(self, name, 0)
        check_number(self, "power_exp", 0, above=True)
        check_function(self, "raw_vision_callback")
        if self.latent_grid is not None:
            check_grid(self, "latent_grid")

    def recipe(self, num_inference_steps: int | None) -> Recipe:
        schedule = Threshold(self.threshold, accumulate=True) & WarmUp(self.retention_steps)
        if self.cache_end_steps:
            schedule &= Final(self.cache_end_steps)
        if self.max_consecutive_cached:
            schedule &= MaxSkips(consecutive=self.max_consecutive_cached)
        grid = None if self.latent_grid is None else tuple(self.latent_grid)
        indicator = SeaFilter(self.power_exp, grid, self.raw_vision_callback)
        forecast = Taylor(1) if self.residual_order else Reuse()
        return _one_group(Blocks(), schedule.bind(num_inference_steps), forecast, Latents(indicator, sigma=True))


@cache_config("teacache")
class TeaCacheConfig(MethodConfig):
    """TeaCache (https://arxiv.org/abs/2411.19108): steps are predicted while the modulated input of the first block,
    rescaled by a polynomial that was fitted to the model's outputs, has changed little in sum.

    Attributes:
        rel_l1_thresh: Budget of the accumulated, rescaled distance, >= 0.
        coefficients: Of the polynomial, highest order first, at most 7; empty: the distance as it is. They belong to a
            checkpoint: ``cachepass.fit_teacache`` fits them.
        module: Regex (``re.fullmatch`` on module paths) of the module whose output is looked at. None: the first norm
            in the first block.
        final_steps: So many last steps are computed, >= 0; it needs ``options["num_inference_steps"]``.
    """

    rel_l1_thresh: float = 0.2
    coefficients: Sequence[float] = ()
    module: str | None = None
    final_steps: int = 1

    def check(self) -> None:
        check_number(self, "rel_l1_thresh", 0)
        check_int(self, "final_steps", 0)
        coefficients: Any = self.coefficients
        if (
            not isinstance(coefficients, (list, tuple))
            or len(coefficients) > 7
            or not all(isinstance(c, (int, float)) and math.isfinite(c) for c in coefficients)
        ):
            raise self.fail("coefficients", f"expected up to 7 numbers, got {coefficients!r}")
        object.__setattr__(self, "coefficients", tuple(map(float, coefficients)))
        ModuleOutput(self.module)

    def recipe(self, num_inference_steps: int | None) -> Recipe:
        schedule: Schedule = Threshold(self.rel_l1_thresh, accumulate=True, coefficients=self.coefficients)
        if self.final_steps:
            schedule &= Final(self.final_steps)
        return _one_group(Blocks(), schedule.bind(num_inference_steps), Reuse(), ModuleOutput(self.module))


@cache_config("dbcache")
class DBCacheConfig(MethodConfig):
    """DBCache, with cache-dit 1.5's names and semantics: the first and last blocks are always computed, and the others'
    residual stands in for them where that of the first ones has changed little.

    Attributes:
        Fn_compute_blocks: So many first blocks are computed, >= 1; their residual is looked at.
        Bn_compute_blocks: So many last blocks are computed, >= 0.
        residual_diff_threshold: Relative L1 distance below which a step is predicted. >= 1: always; <= 0: never.
        max_accumulated_residual_diff_threshold: Sum of all distances measured in a run from which all is computed.
        max_warmup_steps: So many first steps are computed, >= 0.
        warmup_interval: Of these, every so manieth, >= 1.
        max_cached_steps, max_continuous_cached_steps: Most predicted steps in a run, and in a row; -1: no limit.
        num_inference_steps: Steps of a run; ``options["num_inference_steps"]`` goes before it.
        steps_computation_mask: By step, 1: compute. 0: decide by the distance (policy ``"dynamic"``) or predict
            (``"static"``).
        steps_computation_policy: ``"dynamic"`` or ``"static"``.
        force_refresh_step_hint: The history is forgotten before this step.
        force_refresh_step_policy: ``"once"``, or ``"repeat"``: before each multiple of it.
        calibrator: What forecasts the residual in place of reuse: a value of ``cachepass.forecast``, or a calibrator's
            config of cache-dit's (TaylorSeer, DMD).
        enable_separate_cfg, cfg_compute_first, cfg_diff_compute_separate: cache-dit's way to tell two calls per step
            apart, for which ``cachepass.cache_context`` is here. Accepted with their defaults.
    """

    fewer: ClassVar[str] = "give DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0); "
    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    num_inference_steps: int | None = None
    steps_computation_mask: Sequence[int] | None = None
    steps_computation_policy: str = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"
    calibrator: Any = None

    def check(self) -> None:
        check_int(self, "Fn_compute_blocks", 1)
        check_int(self, "Bn_compute_blocks", 0)
        check_number(self, "residual_diff_threshold")
        check_int(self, "max_warmup_steps", 0)
        check_int(self, "warmup_interval", 1)
        for name in ("max_cached_steps", "max_continuous_cached_steps"):
            check_int(self, name, -1)
        check_int(self, "num_inference_steps", 1, optional=True)
        check_int(self, "force_refresh_step_hint", 1, optional=True)
        if self.max_accumulated_residual_diff_threshold is not None:
            check_number(self, "max_accumulated_residual_diff_threshold", 0)
        check_among(self, "steps_computation_policy", "policy", ("dynamic", "static"))
        check_among(self, "force_refresh_step_policy", "policy", ("once", "repeat"))
        if self.enable_separate_cfg or self.cfg_compute_first or not self.cfg_diff_compute_separate:
            raise self.fail(
                "enable_separate_cfg",
                "calls are not told apart by counting them",
                "name the two calls of a step: cachepass.cache_context('cond') and ('uncond'); "
                "enable_cache does so for pipelines",
            )
        if self.steps_computation_mask is not None:
            object.__setattr__(self, "steps_computation_mask", Mask(self.steps_computation_mask).computed)
        object.__setattr__(self, "calibrator", self._forecast())

    def where(self, group: str, part: Part | None = None) -> str:  # noqa: ARG002
        return type(self).__name__ if part is None else f"{type(self).__name__}.Fn_compute_blocks, Bn_compute_blocks"

    def _forecast(self) -> ForecastRule | None:
        """cache-dit's calibrators by what they say; its Taylor series forms differences at steps from 3 on."""
        given = self.calibrator
        if given is None or isinstance(given, ForecastRule):
            return given
        kind = getattr(given, "calibrator_type", None)
        if not getattr(given, "enable_calibrator", False):
            return None
        if kind == "taylorseer":
            return Taylor(given.taylorseer_order, since=3)
        if kind == "dmd":
            return DMD(given.dmd_history, given.dmd_rank, given.dmd_ridge)
        raise self.fail(
            "calibrator",
            f"{given!r} is neither a forecast nor a calibrator that is known here",
            "give a value of cachepass.forecast, such as Taylor(1)",
        )

    def recipe(self, num_inference_steps: int | None) -> Recipe:  # noqa: ARG002
        caps = MaxSkips(
            total=None if self.max_cached_steps < 0 else self.max_cached_steps,
            consecutive=None if self.max_continuous_cached_steps < 0 else self.max_continuous_cached_steps,
            distance=self.max_accumulated_residual_diff_threshold or None,
        )
        limit = self.residual_diff_threshold
        near = Always() if limit >= 1 else ~Always() if limit <= 0 else Threshold(limit)
        schedule: Schedule = near & caps & WarmUp(self.max_warmup_steps, self.warmup_interval)
        if self.steps_computation_mask is not None:
            mask = Mask(self.steps_computation_mask, beyond=False)
            schedule = mask if self.steps_computation_policy == "static" else mask & near & caps
        if self.force_refresh_step_hint is not None:
            schedule = Refresh(schedule, self.force_refresh_step_hint, self.force_refresh_step_policy == "repeat")
        first = self.Fn_compute_blocks
        probe = None if schedule.threshold is None else BlockResidual(first)
        return _one_group(Blocks(first, self.Bn_compute_blocks), schedule, self.calibrator or Reuse(), probe)


__all__ = [
    "FLUX_MAG_RATIOS", "CacheConfig", "DBCacheConfig", "FirstBlockCacheConfig", "MagCacheConfig", "SeaCacheConfig",
    "TeaCacheConfig",
]  # fmt: skip
