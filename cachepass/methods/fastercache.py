"""FasterCache (https://arxiv.org/abs/2410.19355), with the semantics of diffusers' hook.

Attentions (and feed-forwards) are forecast from their last two outputs, ``h_0 + w * (h_0 - h_1)``, a prediction being
the newest entry of the history afterwards; only their conditional half is kept, and they are forecast only on steps
that skip the unconditional branch, or on any step of a guidance-distilled model. Where diffusers forecasts from nothing
(a distilled model whose first timestep lies in the range), the step is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from ..config import FasterCacheConfig
from ..errors import ConfigError
from ..recipe.forecast import Forecast
from ..recipe.frequency import (
    Latents,
    answer_unconditional,
    complete_batch,
    keep_conditional,
    keep_difference,
    keep_difference_to,
)
from .base import GroupHistory, Guidance, Method, Region, Route, Selection, Skip, Step, Target
from .kinds import describe_ranges, fits, kind_of, out_of_range, require_kinds

GROUP = "unconditional"
_KINDS = ("spatial", "temporal", "mlp")
_DEFAULT_WEIGHT = 0.5

BOTH = Route("both", predicts=False, writes=("low", "high"), transform=keep_difference)
HALF = Route("half", half=True, reads=("low", "high"), weighted=True, transform=complete_batch)
COND = Route("cond", writes=("cond",), transform=keep_conditional)
UNCOND = Route("uncond", predicts=False, keeps=False, reads=("cond",), writes=("low", "high"),
               transform=keep_difference_to)  # fmt: skip
ANSWER = Route("answer", predicts=False, keeps=False, reads=("cond", "low", "high"), weighted=True,
               transform=answer_unconditional)  # fmt: skip


class FasterCache(Method):
    """Groups: ``spatial``, ``temporal``, ``mlp``, and ``unconditional`` for the branch itself."""

    needs_timestep = True

    def __init__(self, config: FasterCacheConfig) -> None:
        self.config = config
        self.kinds = tuple(kind for kind in _KINDS if config.kind(kind)[0] is not None)
        callbacks = (config.attention_weight_callback, config.low_frequency_weight_callback,
                     config.high_frequency_weight_callback)  # fmt: skip
        self.needs_model = any(callback is not None for callback in callbacks)
        per_region = config.attention_weight_callback is not None
        self._forecast = Forecast("extrapolate", history=2, recursive=True, per_region=per_region)
        if not config.is_guidance_distilled:
            grid = tuple(config.latent_grid) if config.latent_grid is not None else None
            latents = Latents(config.tensor_format, grid, config.unconditional_first)
            self.guidance = Guidance(
                group=GROUP, latents=latents, settings=type(config).__name__, inputs=config.guided_inputs,
                strict_inputs=config.strict_inputs, slots={"low": True, "high": True, "cond": False},
                both=BOTH, half=HALF, cond=COND, uncond=UNCOND, answer=ANSWER,
            )  # fmt: skip

    def select(self, regions: Sequence[Region], model: Sequence[str] | None = None) -> Selection:
        targets: list[Target] = []
        skips, notes = [], []
        for region in regions:
            kind = kind_of(region, self.kinds, self.config)
            if kind is not None:
                targets.append(Target(region, kind, self._forecast))
            elif region.is_attention:
                why = "FasterCache leaves it" if region.is_cross else "no kind with a skip range has an identifier"
                skips.append(Skip(region.id, f"{region.kind}: {why}"))
        patterns = self.config.kind("spatial")[2]
        named = any(re.search(p, path) for path in model or () for p in patterns)
        if "spatial" in self.kinds and not named and not any(target.group == "spatial" for target in targets):
            found = self._spatial_by_dataflow(regions, targets)
            if found:
                notes.append(f"the default identifiers match nothing; {len(found)} attention modules found instead")
                skips = [skip for skip in skips if skip.region not in {target.region.id for target in found}]
                targets += found
        distilled = self.config.is_guidance_distilled
        if model is None:
            require_kinds(self.kinds, targets, regions, self.config, at_least_one=distilled)
        return Selection(tuple(targets), tuple(skips), tuple(notes))

    def _spatial_by_dataflow(self, regions: Sequence[Region], taken: Sequence[Target]) -> list[Target]:
        """Every self-attention, for models whose names diffusers' default patterns do not know."""
        if (
            tuple(self.config.spatial_attention_block_identifiers)
            != FasterCacheConfig.spatial_attention_block_identifiers
        ):
            return []
        others = {target.region.id for target in taken}
        return [Target(r, "spatial", self._forecast) for r in regions if fits("spatial", r) and r.id not in others]

    # ---- schedule ---------------------------------------------------------------------------------------------------

    def predicts(self, group: str, step: Step) -> bool:
        config = self.config
        if group == GROUP:
            skip_range, bounds = config.unconditional_batch_skip_range, config.unconditional_batch_timestep_skip_range
        else:
            skip_range, bounds, _ = config.kind(group)
        assert skip_range is not None
        return step.index % skip_range != 0 and _within(step, bounds)

    def never_predicts(self, num_inference_steps: int | None) -> str | None:
        if num_inference_steps == 1:
            return "a run of one step has nothing to reuse"
        if self.config.is_guidance_distilled:
            if all(self.config.kind(kind)[0] == 1 for kind in self.kinds):
                return "every skip range is 1 or None, which computes every step"
        elif self.config.unconditional_batch_skip_range == 1:
            return (
                "unconditional_batch_skip_range=1 computes the unconditional branch on every step, and modules are "
                "forecast only on steps that skip it (is_guidance_distilled=True, if the model has no such branch)"
            )
        return None

    def why_idle(self, timesteps: tuple[float, float] | None) -> str:
        if self.config.is_guidance_distilled:
            return out_of_range(describe_ranges(self.kinds, self.config), timesteps)
        ranges = f"{GROUP} {self.config.unconditional_batch_timestep_skip_range}"
        two_calls = ". With two calls per step, the one in the context 'cond' must come before the one in 'uncond'"
        return out_of_range(ranges, timesteps) + two_calls

    # ---- weights ----------------------------------------------------------------------------------------------------

    def weights(self, group: str, step: Step, history: GroupHistory, region: str = "") -> tuple[float, ...]:
        if group == GROUP:
            low, high = history.weights or (1.0, 1.0)
            return low * self._factor("low", step), high * self._factor("high", step)
        if len(history.steps) < 2:
            return 1.0, 0.0  # one output is known: it is its own predecessor
        weight = _DEFAULT_WEIGHT
        if self.config.attention_weight_callback is not None:
            model = self._model(step, "attention_weight_callback")
            weight = float(self.config.attention_weight_callback(model.get_submodule(region)))
        return 1.0 + weight, -weight

    def _factor(self, kind: str, step: Step) -> float:
        name = f"{kind}_frequency_weight_callback"
        callback: Callable[[torch.nn.Module], float] | None = getattr(self.config, name)
        if callback is not None:
            return float(callback(self._model(step, name)))
        within = _within(step, getattr(self.config, f"{kind}_frequency_weight_update_timestep_range"))
        return getattr(self.config, f"alpha_{kind}_frequency") if within else 1.0

    def _model(self, step: Step, callback: str) -> torch.nn.Module:
        if step.model is None:
            raise ConfigError("takes a module, and what was compiled is not one", where=f"FasterCacheConfig.{callback}",
                              hint="compile the transformer itself, not a function that calls it")  # fmt: skip
        return step.model


def _within(step: Step, bounds: tuple[float, float]) -> bool:
    assert step.timestep is not None
    return bounds[0] < step.timestep < bounds[1]
