"""TaylorSeer (https://arxiv.org/abs/2503.06923), with the semantics of diffusers' hook of the same name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..config import TaylorSeerCacheConfig
from ..errors import NoMatchError, warn
from ..recipe.forecast import ZEROS, taylor, taylor_weights
from .base import GroupHistory, Method, Region, Selection, Step, Target, no_match

GROUP = "taylorseer"
_ATTENTION = (
    r"^blocks.*attn",
    r"^transformer_blocks.*attn",
    r"^single_transformer_blocks.*attn",
    r"^temporal_transformer_blocks.*attn",
)
_LITE_ZEROS = (r"^[^.]*block[^.]*\.[^.]+$",)
_LITE_FORECAST = (r"^proj_out$",)


class TaylorSeer(Method):
    """Forecast the outputs of the chosen modules by a Taylor series in the step index; one group, one schedule."""

    def __init__(self, config: TaylorSeerCacheConfig) -> None:
        self.config = config
        self._forecast = taylor(config.max_order)

    def select(self, regions: Sequence[Region], model: Sequence[str] | None = None) -> Selection:
        config, notes = self.config, []
        zeros = tuple(config.skip_predict_identifiers or ())
        active = tuple(config.cache_identifiers or ())
        if config.use_lite_mode:
            if model is None and (zeros or active):
                self._warn("use_lite_mode overrides cache_identifiers and skip_predict_identifiers")
            zeros, active = _LITE_ZEROS, _LITE_FORECAST
            if model is None and not _matching(active, regions):
                self._warn(
                    "use_lite_mode forecasts '^proj_out$', which matches no module of this model: on predicted steps "
                    "its blocks return zeros and nothing stands in for them, as in diffusers. Give "
                    "cache_identifiers for the model's last projection and skip_predict_identifiers for its blocks."
                )
        elif not active:
            active = _ATTENTION
            if not _matching(active, regions) and not any(
                re.fullmatch(p, path) for path in model or () for p in active
            ):
                found = [r for r in regions if r.is_attention]
                active = tuple(re.escape(r.path) for r in found)
                if found:
                    notes.append(f"the default identifiers match nothing; {len(found)} attention modules found instead")
        if model is None:
            self._require(active, zeros, regions)
        targets = []
        for region in regions:
            if any(region.matches(p) for p in zeros):
                targets.append(Target(region, GROUP, ZEROS))
            elif any(region.matches(p) for p in active):
                targets.append(Target(region, GROUP, self._forecast, config.taylor_factors_dtype))
        return Selection(tuple(targets), notes=tuple(notes))

    def check(self, regions: Sequence[Region], model: Sequence[str]) -> None:
        outside = [path for path in model if any(re.fullmatch(p, path) for p in _LITE_FORECAST)]
        if self.config.use_lite_mode and outside and not _matching(_LITE_FORECAST, regions):
            raise NoMatchError(
                f"use_lite_mode forecasts {outside[0]}, which is in no compiled graph: blocks would return zeros, and "
                "nothing would stand in for them", where=type(self.config).__name__,
                hint="compile the whole model as one graph, or give cache_identifiers",
            )  # fmt: skip
        super().check(regions, model)

    def _require(self, active: Sequence[str], zeros: Sequence[str], regions: Sequence[Region]) -> None:
        """Patterns that the user wrote must each match; the built-in ones must match together."""
        candidates = [r.path for r in regions if r.is_attention] or [r.path for r in regions]
        fields = [("cache_identifiers", active), ("skip_predict_identifiers", zeros)]
        for name, patterns in fields:
            if not self.config.use_lite_mode and getattr(self.config, name) is not None:
                unmatched = [p for p in patterns if not _matching((p,), regions)]
                if unmatched:
                    raise no_match(f"{type(self.config).__name__}.{name}", unmatched, candidates)
        if not _matching((*active, *zeros), regions):
            raise no_match(type(self.config).__name__, active or _ATTENTION, candidates, "give cache_identifiers; ")

    def _warn(self, message: str) -> None:
        warn(f"{type(self.config).__name__}: {message}", stacklevel=2)

    def _computes(self, step: int) -> bool:
        config = self.config
        after = config.disable_cache_after_step
        return (
            step < config.disable_cache_before_step
            or (step - config.disable_cache_before_step - 1) % config.cache_interval == 0
            or (after is not None and step >= after)
        )

    def predicts(self, group: str, step: Step) -> bool:  # noqa: ARG002 (one group)
        return not self._computes(step.index)

    def never_predicts(self, num_inference_steps: int | None) -> str | None:
        config = self.config
        if config.cache_interval == 1:
            return "cache_interval=1 computes every step"
        after = config.disable_cache_after_step
        horizon = config.disable_cache_before_step + config.cache_interval + 2
        limits = {"num_inference_steps": num_inference_steps, "disable_cache_after_step": after}
        bound = min([horizon, *(v for v in limits.values() if v is not None)])
        if any(not self._computes(step) for step in range(1, bound)):
            return None
        given = ", ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
        return f"with {given} and disable_cache_before_step={config.disable_cache_before_step} every step is computed"

    def weights(self, group: str, step: Step, history: GroupHistory, region: str = "") -> tuple[float, ...]:  # noqa: ARG002
        return taylor_weights(self.config.max_order, history.steps, step.index)


def _matching(patterns: Sequence[str], regions: Sequence[Region]) -> list[Region]:
    return [r for r in regions if any(r.matches(p) for p in patterns)]
