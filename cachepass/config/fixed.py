"""TaylorSeer, and what stays the same within a run alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..errors import NoMatchError, warn
from ..recipe.checks import check_flag, check_int, check_patterns
from ..recipe.cut import Modules
from ..recipe.forecast import Taylor, Zeros
from ..recipe.recipe import Group, Part, Recipe
from ..recipe.schedule import Before, Every, WarmUp
from ..recipe.vocabulary import Region
from .base import MethodConfig, cache_config

_ATTENTION = (
    r"^blocks.*attn",
    r"^transformer_blocks.*attn",
    r"^single_transformer_blocks.*attn",
    r"^temporal_transformer_blocks.*attn",
)
_LITE_ZEROS = (r"^[^.]*block[^.]*\.[^.]+$",)
_LITE_FORECAST = (r"^proj_out$",)


@cache_config("taylorseer")
class TaylorSeerCacheConfig(MethodConfig):
    """TaylorSeer (https://arxiv.org/abs/2503.06923): module outputs forecast by a Taylor series in the step index.

    Attributes:
        cache_interval: Steps from one full computation to the next, >= 1 (1: never predict).
        disable_cache_before_step: Steps ``0 .. value - 1`` are computed (warm-up).
        disable_cache_after_step: Steps ``>= value`` are computed; None: no such limit.
        max_order: Highest order of the series, 0 to 4. ``max_order + 1`` outputs are kept per cut.
        taylor_factors_dtype: Dtype in which the history is kept; None: the module's own dtype.
        skip_predict_identifiers: Regexes (``re.fullmatch`` on module paths) of modules that return zeros on predicted
            steps.
        cache_identifiers: Regexes (``re.fullmatch``) of modules whose outputs are forecast. None: diffusers' default
            patterns; where those match nothing, every attention found by what it does.
        use_lite_mode: Forecast ``proj_out`` only, blocks return zeros; overrides both identifier lists.
    """

    cache_interval: int = 5
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    max_order: int = 1
    taylor_factors_dtype: torch.dtype | None = torch.bfloat16
    skip_predict_identifiers: Sequence[str] | None = None
    cache_identifiers: Sequence[str] | None = None
    use_lite_mode: bool = False

    def recipe(self, num_inference_steps: int | None) -> Recipe:  # noqa: ARG002
        before, after = self.disable_cache_before_step, self.disable_cache_after_step
        schedule = Every(self.cache_interval, before + 1) & WarmUp(before)
        if after is not None:
            schedule &= Before(after)
        forecast = Taylor(self.max_order), self.taylor_factors_dtype
        zeros = self.skip_predict_identifiers or ()
        if self.use_lite_mode:
            parts = [
                Part(Modules(*_LITE_ZEROS, must_match="none"), Zeros()),
                Part(Modules(*_LITE_FORECAST, must_match="none"), *forecast),
            ]
        else:
            parts = [Part(Modules(*zeros), Zeros())] if zeros else []
            cut = Modules(*_ATTENTION, otherwise="attention", must_match="any")
            parts.append(Part(Modules(*self.cache_identifiers) if self.cache_identifiers else cut, *forecast))
        return Recipe((Group("taylorseer", schedule, tuple(parts)),))

    def where(self, group: str, part: Part | None = None) -> str:  # noqa: ARG002
        field = "cache_interval" if part is None else "cache_identifiers"
        zeros = part is not None and isinstance(part.forecast, Zeros)
        return f"{type(self).__name__}.{'skip_predict_identifiers' if zeros else field}"

    def review(self, regions: Sequence[Region]) -> None:
        if not self.use_lite_mode:
            return
        name = type(self).__name__
        if self.skip_predict_identifiers or self.cache_identifiers:
            warn(f"{name}: use_lite_mode overrides cache_identifiers and skip_predict_identifiers")
        if not any(region.matches(p) for region in regions for p in _LITE_FORECAST):
            warn(
                f"{name}: use_lite_mode forecasts '^proj_out$', which matches no module of this model: on predicted "
                "steps its blocks return zeros and nothing stands in for them, as in diffusers. Give cache_identifiers "
                "for the model's last projection and skip_predict_identifiers for its blocks.",
            )

    def review_parts(self, regions: Sequence[Region], model: Sequence[str]) -> None:
        outside = [path for path in model if any(re.fullmatch(p, path) for p in _LITE_FORECAST)]
        if self.use_lite_mode and outside and not any(r.matches(p) for r in regions for p in _LITE_FORECAST):
            raise NoMatchError(
                f"use_lite_mode forecasts {outside[0]}, which is in no compiled graph: blocks would return zeros, and "
                "nothing would stand in for them",
                where=type(self).__name__,
                hint="compile the whole model as one graph, or give cache_identifiers",
            )

    def why_never(self, num_inference_steps: int | None) -> str | None:
        if self.cache_interval == 1:
            return "cache_interval=1 computes every step"
        if self.recipe(None).groups[0].schedule.never_predicts(num_inference_steps) is None:
            return None
        limits = {"num_inference_steps": num_inference_steps, "disable_cache_after_step": self.disable_cache_after_step}
        given = ", ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
        return f"with {given} and disable_cache_before_step={self.disable_cache_before_step} every step is computed"

    def check(self) -> None:
        check_int(self, "cache_interval", 1)
        check_int(self, "disable_cache_before_step", 0)
        check_int(self, "disable_cache_after_step", 0, optional=True)
        check_int(self, "max_order", 0, 4)
        check_patterns(self, "skip_predict_identifiers", optional=True)
        check_patterns(self, "cache_identifiers", optional=True)
        check_flag(self, "use_lite_mode")
        dtype = self.taylor_factors_dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
            object.__setattr__(self, "taylor_factors_dtype", dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise self.fail(
                "taylor_factors_dtype",
                f"expected a floating-point torch.dtype or None, got {dtype!r}",
                "torch.float32 or torch.bfloat16; None keeps the module's own dtype",
            )
        after, before = self.disable_cache_after_step, self.disable_cache_before_step
        if after is not None and after < before:
            raise self.fail(
                "disable_cache_after_step",
                f"{after} lies before disable_cache_before_step={before}: no step is left",
                "predicted steps lie in [disable_cache_before_step, disable_cache_after_step)",
            )


@cache_config("invariant")
class InvariantConfig(MethodConfig):
    """Nothing is forecast: what stays the same within a run is computed once, and results are exact.

    Text projections, keys and values of cross-attentions, rotary tables, text refiners. Every other method does this
    too, unless ``options["invariants"]`` is False; this one does nothing else.
    """

    def recipe(self, num_inference_steps: int | None) -> Recipe:  # noqa: ARG002
        return Recipe()
