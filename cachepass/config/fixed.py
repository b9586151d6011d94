"""The configs of methods that follow a plan made before the run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch

from ..errors import NoMatchError, closest, warn
from ..recipe.cut import Modules
from ..recipe.forecast import Extrapolate, ForecastRule, Reuse, Taylor, Zeros
from ..recipe.frequency import LatentFormat
from ..recipe.guidance import Guidance, Ramp
from ..recipe.recipe import Group, Part, Recipe
from ..recipe.schedule import Before, Every, Timesteps, WarmUp
from ..recipe.vocabulary import Region
from .base import MethodConfig, cache_config, check_identifiers, check_int, check_range

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
            parts = [Part(Modules(*_LITE_ZEROS, must_match="none"), Zeros()),
                     Part(Modules(*_LITE_FORECAST, must_match="none"), *forecast)]  # fmt: skip
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
            warn(f"{name}: use_lite_mode overrides cache_identifiers and skip_predict_identifiers", stacklevel=2)
        if not any(region.matches(p) for region in regions for p in _LITE_FORECAST):
            warn(
                f"{name}: use_lite_mode forecasts '^proj_out$', which matches no module of this model: on predicted "
                "steps its blocks return zeros and nothing stands in for them, as in diffusers. Give cache_identifiers "
                "for the model's last projection and skip_predict_identifiers for its blocks.", stacklevel=2,
            )  # fmt: skip

    def review_parts(self, regions: Sequence[Region], model: Sequence[str]) -> None:
        outside = [path for path in model if any(re.fullmatch(p, path) for p in _LITE_FORECAST)]
        if self.use_lite_mode and outside and not any(r.matches(p) for r in regions for p in _LITE_FORECAST):
            raise NoMatchError(
                f"use_lite_mode forecasts {outside[0]}, which is in no compiled graph: blocks would return zeros, and "
                "nothing would stand in for them", where=type(self).__name__,
                hint="compile the whole model as one graph, or give cache_identifiers",
            )  # fmt: skip

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
        check_identifiers(self, "skip_predict_identifiers")
        check_identifiers(self, "cache_identifiers")
        if not isinstance(self.use_lite_mode, bool):
            raise self.fail("use_lite_mode", f"expected a bool, got {self.use_lite_mode!r}")
        dtype = self.taylor_factors_dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
            object.__setattr__(self, "taylor_factors_dtype", dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise self.fail(
                "taylor_factors_dtype", f"expected a floating-point torch.dtype or None, got {dtype!r}",
                "torch.float32 or torch.bfloat16; None keeps the module's own dtype",
            )  # fmt: skip
        after, before = self.disable_cache_after_step, self.disable_cache_before_step
        if after is not None and after < before:
            raise self.fail(
                "disable_cache_after_step", f"{after} lies before disable_cache_before_step={before}: no step is left",
                "predicted steps lie in [disable_cache_before_step, disable_cache_after_step)",
            )  # fmt: skip


@cache_config("invariant")
class InvariantConfig(MethodConfig):
    """Nothing is forecast: what stays the same within a run is computed once, and results are exact.

    Text projections, keys and values of cross-attentions, rotary tables, text refiners. Every other method does this
    too, unless ``options["invariants"]`` is False; this one does nothing else.
    """

    def recipe(self, num_inference_steps: int | None) -> Recipe:  # noqa: ARG002
        return Recipe()


class _KindsConfig(MethodConfig):
    """Kinds of modules with a skip range, a timestep range and identifiers each: one group for each kind."""

    kinds: ClassVar[tuple[str, ...]] = ()

    def kind(self, name: str) -> tuple[int | None, tuple[float, float], tuple[str, ...]]:
        """Skip range, timestep range and identifiers of a kind, such as ``"spatial"`` or ``"mlp"``."""
        fields = [
            f"{_prefix(name)}_{field}" for field in ("block_skip_range", "timestep_skip_range", "block_identifiers")
        ]
        skip_range, bounds, identifiers = (getattr(self, field) for field in fields)
        return skip_range, tuple(bounds), tuple(identifiers)

    def groups(self, forecast: ForecastRule, otherwise: Mapping[str, str] | None = None) -> tuple[Group, ...]:
        """``otherwise``: what a kind takes where its default identifiers match nothing."""
        made = []
        for name in self.kinds:
            skip_range, bounds, identifiers = self.kind(name)
            if skip_range is None:
                continue
            own = identifiers != tuple(getattr(type(self), f"{_prefix(name)}_block_identifiers"))
            cut = Modules(*identifiers, kind=_KIND_OF.get(name, name), search=True, must_match="any" if own else "none",
                          otherwise=None if own else (otherwise or {}).get(name))  # fmt: skip
            made.append(Group(name, Every(skip_range) & Timesteps(*bounds), (Part(cut, forecast),)))
        return tuple(made)

    def where(self, group: str, part: Part | None = None) -> str:
        field = "block_skip_range" if part is None else "block_identifiers"
        return f"{type(self).__name__}.{_prefix(group)}_{field}"

    def check_kinds(self) -> None:
        for prefix in map(_prefix, self.kinds):
            check_int(self, f"{prefix}_block_skip_range", 1, optional=True)
            check_range(self, f"{prefix}_timestep_skip_range")
            check_identifiers(self, f"{prefix}_block_identifiers", optional=False)

    def why_idle(self, recipe: Recipe, timesteps: tuple[float, float] | None) -> str:
        ranges = ", ".join(f"{group.name} {self.kind(group.name)[1]}" for group in recipe.groups)
        return _out_of_range(ranges, timesteps)


# Spatial and temporal attentions look alike: identifiers tell them apart.
_KIND_OF = {"spatial": "self-attention", "temporal": "self-attention", "cross": "cross-attention"}


def _prefix(kind: str) -> str:
    return "mlp" if kind == "mlp" else f"{kind}_attention"


def _out_of_range(ranges: str, timesteps: tuple[float, float] | None) -> str:
    """Why a run predicted nothing: no timestep that could be skipped lay in the ranges."""
    seen = f"{timesteps[0]:g} to {timesteps[1]:g}" if timesteps else "none"
    return (
        f"no step that could be skipped had a timestep within its range ({ranges}); timesteps seen: {seen}. "
        'Where the model\'s input is scaled (1 to 0 instead of 1000 to 0) give options["timestep_scale"]=1000'
    )


_SPATIAL = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers", "visual_transformer_blocks")
_CROSS = ("blocks", "transformer_blocks", "layers")
ATTENTION_KINDS = ("spatial", "temporal", "cross")


@cache_config("pab")
class PyramidAttentionBroadcastConfig(_KindsConfig):
    """Pyramid Attention Broadcast (https://arxiv.org/abs/2408.12588): attention outputs reused over several steps.

    Each kind (spatial, temporal, cross; and the paper's MLP) has a skip range ``N``: of ``N`` steps one is computed
    (None: the kind is left alone), a timestep range ``(lo, hi)``, both exclusive, in which steps may be skipped, and
    identifiers, regexes (``re.search`` on module paths) that say which modules the kind covers.

    Attributes:
        current_timestep_callback: Returns the current timestep. None: it is read from the model's timestep input.
    """

    spatial_attention_block_skip_range: int | None = None
    temporal_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[float, float] = (100, 800)
    temporal_attention_timestep_skip_range: tuple[float, float] = (100, 800)
    cross_attention_timestep_skip_range: tuple[float, float] = (100, 800)
    spatial_attention_block_identifiers: tuple[str, ...] = _SPATIAL
    temporal_attention_block_identifiers: tuple[str, ...] = ("temporal_transformer_blocks",)
    cross_attention_block_identifiers: tuple[str, ...] = _CROSS
    current_timestep_callback: Callable[[], float] | None = None
    mlp_block_skip_range: int | None = None
    mlp_timestep_skip_range: tuple[float, float] = (100, 800)
    mlp_block_identifiers: tuple[str, ...] = _SPATIAL

    kinds: ClassVar[tuple[str, ...]] = (*ATTENTION_KINDS, "mlp")

    def recipe(self, num_inference_steps: int | None) -> Recipe:
        if all(self.kind(kind)[0] is None for kind in self.kinds):
            warn("PyramidAttentionBroadcastConfig: no skip range is given; using spatial_attention_block_skip_range=2")
            chosen = dataclasses.replace(self, spatial_attention_block_skip_range=2)  # pyright: ignore
            return chosen.recipe(num_inference_steps)
        return Recipe(self.groups(Reuse()))

    def why_never(self, num_inference_steps: int | None) -> str | None:
        if all(self.kind(kind)[0] in (1, None) for kind in self.kinds) and any(self.kind(k)[0] for k in self.kinds):
            return "every skip range is 1, which computes every step"
        return "a run of one step has nothing to reuse" if num_inference_steps == 1 else None

    def why_left(self, region: Region) -> str | None:
        known = region.is_attention or region.is_mlp
        return "no kind with a skip range has an identifier for it" if known else None

    def check(self) -> None:
        self.check_kinds()
        callback = self.current_timestep_callback
        if callback is not None and not callable(callback):
            raise self.fail("current_timestep_callback", f"expected a function without arguments, got {callback!r}")


# Inputs that carry [uncond, cond] batches: diffusers' list, and further names under which its models take them. The
# longer list applies as long as the user gives none.
_GUIDED_INPUTS = ("hidden_states", "encoder_hidden_states", "timestep", "attention_mask", "encoder_attention_mask")
_MORE_GUIDED_INPUTS = (
    "added_cond_kwargs", "cap_feats", "class_labels", "encoder_hidden_states_image", "encoder_hidden_states_mask",
    "encoder_hidden_states_t5", "guidance", "image_embeds", "image_meta_size", "latents_clean", "latents_history_2x",
    "latents_history_4x", "pooled_projections", "sample", "style", "t",
    "text_embedding_mask", "text_embedding_mask_t5", "x",
)  # fmt: skip
TENSOR_FORMATS = ("BCFHW", "BFCHW", "BCHW", "BSC")


@cache_config("fastercache")
class FasterCacheConfig(_KindsConfig):
    """FasterCache (https://arxiv.org/abs/2410.19355): attention outputs extrapolated, unconditional branch estimated.

    A step whose unconditional half is skipped runs the transformer on the conditional half of the batch. The
    unconditional output is estimated as ``cond + a_low * D_low + a_high * D_high``, where ``D_low`` and ``D_high`` are
    the low and high spatial frequencies of ``uncond - cond`` at the last full step; on such steps attentions may be
    forecast too, as ``h_0 + w * (h_0 - h_1)``. All timestep ranges ``(lo, hi)`` are exclusive.

    Attributes:
        spatial_attention_block_skip_range, temporal_attention_block_skip_range, mlp_block_skip_range: Of ``N`` steps
            one computes this kind of module, the others may forecast it; None: never forecast.
        spatial_attention_timestep_skip_range, temporal_attention_timestep_skip_range, mlp_timestep_skip_range:
            Timesteps in which the kind may be forecast.
        low_frequency_weight_update_timestep_range, high_frequency_weight_update_timestep_range: Timesteps in which a
            skipped step multiplies the weight of ``D_low`` (``D_high``) by its alpha.
        alpha_low_frequency, alpha_high_frequency: Those factors, > 0.
        unconditional_batch_skip_range: Of ``N`` steps one computes the unconditional half (1: all of them do).
        unconditional_batch_timestep_skip_range: Timesteps in which the unconditional half may be skipped.
        spatial_attention_block_identifiers, temporal_attention_block_identifiers, mlp_block_identifiers: Regexes
            (``re.search`` on module paths) of the kinds' modules. Where diffusers' own spatial patterns match nothing,
            every self-attention found by what it does is taken.
        attention_weight_callback: Module -> ``w`` of its forecast; None: 0.5.
        low_frequency_weight_callback, high_frequency_weight_callback: Model -> factor on each skipped step, in place of
            the alphas and their ranges.
        tensor_format: Layout of the model's output: ``"BCFHW"``, ``"BFCHW"``, ``"BCHW"``, or ``"BSC"`` (tokens).
        is_guidance_distilled: The model takes no [uncond, cond] batch: only attentions are forecast.
        current_timestep_callback: Returns the current timestep. None: it is read from the model's timestep input.
        _unconditional_conditional_input_kwargs_identifiers: Names of the inputs that carry [uncond, cond] batches.
        latent_grid: For ``"BSC"``: (frames, height, width) or (height, width) in tokens.
        unconditional_first: Batches are [uncond, cond]; False: [cond, uncond].
    """

    spatial_attention_block_skip_range: int | None = 2
    temporal_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[float, float] = (-1, 681)
    temporal_attention_timestep_skip_range: tuple[float, float] = (-1, 681)
    low_frequency_weight_update_timestep_range: tuple[float, float] = (99, 901)
    high_frequency_weight_update_timestep_range: tuple[float, float] = (-1, 301)
    alpha_low_frequency: float = 1.1
    alpha_high_frequency: float = 1.1
    unconditional_batch_skip_range: int = 5
    unconditional_batch_timestep_skip_range: tuple[float, float] = (-1, 641)
    spatial_attention_block_identifiers: tuple[str, ...] = (
        "^blocks.*attn", "^transformer_blocks.*attn", "^single_transformer_blocks.*attn",
    )  # fmt: skip
    temporal_attention_block_identifiers: tuple[str, ...] = ("^temporal_transformer_blocks.*attn",)
    attention_weight_callback: Callable[[torch.nn.Module], float] | None = None
    low_frequency_weight_callback: Callable[[torch.nn.Module], float] | None = None
    high_frequency_weight_callback: Callable[[torch.nn.Module], float] | None = None
    tensor_format: str = "BCFHW"
    is_guidance_distilled: bool = False
    current_timestep_callback: Callable[[], float] | None = None
    _unconditional_conditional_input_kwargs_identifiers: tuple[str, ...] = _GUIDED_INPUTS
    latent_grid: tuple[int, ...] | None = None
    unconditional_first: bool = True
    mlp_block_skip_range: int | None = None
    mlp_timestep_skip_range: tuple[float, float] = (-1, 681)
    mlp_block_identifiers: tuple[str, ...] = _SPATIAL

    kinds: ClassVar[tuple[str, ...]] = ("spatial", "temporal", "mlp")

    def recipe(self, num_inference_steps: int | None) -> Recipe:  # noqa: ARG002
        otherwise = {}
        if self.kind("spatial")[2] == FasterCacheConfig.spatial_attention_block_identifiers:
            otherwise["spatial"] = "self-attention"
        groups = self.groups(Extrapolate(callback=self.attention_weight_callback), otherwise)
        if self.is_guidance_distilled:
            return Recipe(groups)
        grid = None if self.latent_grid is None else tuple(self.latent_grid)
        schedule = Every(self.unconditional_batch_skip_range) & Timesteps(*self.unconditional_batch_timestep_skip_range)
        guidance = Guidance(
            schedule, LatentFormat(self.tensor_format, grid, self.unconditional_first), self.guided_inputs,
            self.strict_inputs, self._ramp("low"), self._ramp("high"), settings=type(self).__name__,
        )  # fmt: skip
        return Recipe(groups, guidance)

    def _ramp(self, kind: str) -> Ramp:
        return Ramp(getattr(self, f"alpha_{kind}_frequency"),
                    getattr(self, f"{kind}_frequency_weight_update_timestep_range"),
                    getattr(self, f"{kind}_frequency_weight_callback"))  # fmt: skip

    def why_never(self, num_inference_steps: int | None) -> str | None:
        if num_inference_steps == 1:
            return "a run of one step has nothing to reuse"
        if self.is_guidance_distilled:
            if all(self.kind(kind)[0] in (1, None) for kind in self.kinds):
                return "every skip range is 1 or None, which computes every step"
        elif self.unconditional_batch_skip_range == 1:
            return (
                "unconditional_batch_skip_range=1 computes the unconditional branch on every step, and modules are "
                "forecast only on steps that skip it (is_guidance_distilled=True, if the model has no such branch)"
            )
        return None

    def why_idle(self, recipe: Recipe, timesteps: tuple[float, float] | None) -> str:
        if self.is_guidance_distilled:
            return super().why_idle(recipe, timesteps)
        ranges = f"unconditional {self.unconditional_batch_timestep_skip_range}"
        two_calls = ". With two calls per step, the one in the context 'cond' must come before the one in 'uncond'"
        return _out_of_range(ranges, timesteps) + two_calls

    def why_left(self, region: Region) -> str | None:
        if not region.is_attention:
            return None
        return "FasterCache leaves it" if region.is_cross else "no kind with a skip range has an identifier"

    def check(self) -> None:
        self.check_kinds()
        check_int(self, "unconditional_batch_skip_range", 1)
        check_range(self, "unconditional_batch_timestep_skip_range")
        for kind in ("low", "high"):
            check_range(self, f"{kind}_frequency_weight_update_timestep_range")
            alpha = getattr(self, f"alpha_{kind}_frequency")
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise self.fail(f"alpha_{kind}_frequency", f"expected a positive number, got {alpha!r}")
        callbacks = [f"{name}_weight_callback" for name in ("attention", "low_frequency", "high_frequency")]
        for name in (*callbacks, "current_timestep_callback"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise self.fail(name, f"expected a function, got {getattr(self, name)!r}")
        _check_names(self, "_unconditional_conditional_input_kwargs_identifiers")
        for name in ("is_guidance_distilled", "unconditional_first"):
            if not isinstance(getattr(self, name), bool):
                raise self.fail(name, f"expected a bool, got {getattr(self, name)!r}")
        self._check_format()

    def _check_format(self) -> None:
        if self.tensor_format not in TENSOR_FORMATS:
            raise self.fail("tensor_format", f"there is no format {self.tensor_format!r}",
                             closest(str(self.tensor_format), TENSOR_FORMATS))  # fmt: skip
        grid, tokens = self.latent_grid, self.tensor_format == "BSC"
        if not tokens and grid is not None:
            raise self.fail("latent_grid", f"{grid!r} is given, but tensor_format is {self.tensor_format!r}",
                             'a grid belongs to tensor_format="BSC"')  # fmt: skip
        if not tokens or (self.is_guidance_distilled and grid is None):
            return
        if not isinstance(grid, (tuple, list)) or len(grid) not in (2, 3) or any(
            isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in grid
        ):  # fmt: skip
            raise self.fail("latent_grid", f"expected (height, width) or (frames, height, width), got {grid!r}",
                             'tensor_format="BSC" needs the grid that the tokens stand for')  # fmt: skip

    @property
    def strict_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that carry [uncond, cond] batches, as given."""
        return tuple(self._unconditional_conditional_input_kwargs_identifiers)

    @property
    def guided_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that may carry such batches: where none were given, some more than diffusers knows."""
        names = self.strict_inputs
        return (*names, *_MORE_GUIDED_INPUTS) if names == _GUIDED_INPUTS else names


def _check_names(config: MethodConfig, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, (list, tuple)) or not value or any(not isinstance(v, str) for v in value):
        raise config.fail(name, f"expected a list of input names, got {value!r}", "such as ['hidden_states', ...]")
