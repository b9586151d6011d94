"""The configs of methods whose kinds of modules have a skip range each: Pyramid Attention Broadcast and FasterCache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

from ..errors import warn
from ..recipe.checks import (
    check_among,
    check_flag,
    check_function,
    check_grid,
    check_int,
    check_patterns,
    check_range,
)
from ..recipe.cut import Modules
from ..recipe.forecast import Extrapolate, ForecastRule, Reuse
from ..recipe.frequency import LatentFormat
from ..recipe.guidance import Guidance, Ramp
from ..recipe.recipe import Group, Part, Recipe
from ..recipe.schedule import Every, Timesteps
from ..recipe.vocabulary import Region
from .base import MethodConfig, cache_config


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
            cut = Modules(
                *identifiers,
                kind=_KIND_OF.get(name, name),
                search=True,
                must_match="any" if own else "none",
                otherwise=None if own else (otherwise or {}).get(name),
            )
            made.append(Group(name, Every(skip_range) & Timesteps(*bounds), (Part(cut, forecast),)))
        return tuple(made)

    def where(self, group: str, part: Part | None = None) -> str:
        field = "block_skip_range" if part is None else "block_identifiers"
        return f"{type(self).__name__}.{_prefix(group)}_{field}"

    def check_kinds(self) -> None:
        for prefix in map(_prefix, self.kinds):
            check_int(self, f"{prefix}_block_skip_range", 1, optional=True)
            check_range(self, f"{prefix}_timestep_skip_range")
            check_patterns(self, f"{prefix}_block_identifiers")

    def why_idle(self, recipe: Recipe, timesteps: tuple[float, float] | None) -> str:
        return _out_of_range({group.name: self.kind(group.name)[1] for group in recipe.groups}, timesteps)


# Spatial and temporal attentions look alike: identifiers tell them apart.
_KIND_OF = {"spatial": "self-attention", "temporal": "self-attention", "cross": "cross-attention"}


def _prefix(kind: str) -> str:
    return "mlp" if kind == "mlp" else f"{kind}_attention"


def _out_of_range(ranges: Mapping[str, tuple[float, float]], timesteps: tuple[float, float] | None) -> str:
    """Why a run predicted nothing: no timestep that could be skipped lay in the ranges."""
    seen = f"{timesteps[0]:g} to {timesteps[1]:g}" if timesteps else "none"
    listed = ", ".join(f"{name} {bounds}" for name, bounds in ranges.items())
    return (
        f"no step that could be skipped had a timestep within its range ({listed}); timesteps seen: {seen}. "
        'Where the model\'s timesteps run neither from 1000 to 0 nor from 1 to 0 give options["timestep_scale"]'
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
        check_function(self, "current_timestep_callback", "a function without arguments")


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
        "^blocks.*attn",
        "^transformer_blocks.*attn",
        "^single_transformer_blocks.*attn",
    )
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
            schedule,
            LatentFormat(self.tensor_format, grid, self.unconditional_first),
            self.guided_inputs,
            self.strict_inputs,
            self._ramp("low"),
            self._ramp("high"),
            settings=type(self).__name__,
        )
        return Recipe(groups, guidance)

    def _ramp(self, kind: str) -> Ramp:
        return Ramp(
            getattr(self, f"alpha_{kind}_frequency"),
            getattr(self, f"{kind}_frequency_weight_update_timestep_range"),
            getattr(self, f"{kind}_frequency_weight_callback"),
        )

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
        low, high = self.unconditional_batch_timestep_skip_range
        order = "with two calls per step, the one in the context 'cond' must come before the one in 'uncond'"
        why = _out_of_range({"unconditional": (low, high)}, timesteps)
        if timesteps is not None and timesteps[0] < high and low < timesteps[1]:
            return f"{order}. Else {why}"
        return f"{why}. Else {order}"

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
            check_function(self, name)
        _check_names(self, "_unconditional_conditional_input_kwargs_identifiers")
        check_flag(self, "is_guidance_distilled", "unconditional_first")
        self._check_format()

    def _check_format(self) -> None:
        check_among(self, "tensor_format", "format", TENSOR_FORMATS)
        grid, tokens = self.latent_grid, self.tensor_format == "BSC"
        if not tokens and grid is not None:
            raise self.fail(
                "latent_grid",
                f"{grid!r} is given, but tensor_format is {self.tensor_format!r}",
                'a grid belongs to tensor_format="BSC"',
            )
        if not tokens or (self.is_guidance_distilled and grid is None):
            return
        check_grid(self, "latent_grid", 'tensor_format="BSC" needs the grid that the tokens stand for')

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
