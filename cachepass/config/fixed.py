"""The configs of methods that follow a plan made before the run."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..errors import closest
from .base import MethodConfig, cache_config, check_identifiers, check_int, check_range


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
    skip_predict_identifiers: list[str] | None = None
    cache_identifiers: list[str] | None = None
    use_lite_mode: bool = False

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


_SPATIAL = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers", "visual_transformer_blocks")
_CROSS = ("blocks", "transformer_blocks", "layers")
ATTENTION_KINDS = ("spatial", "temporal", "cross")


@cache_config("pab")
class PyramidAttentionBroadcastConfig(MethodConfig):
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

    def check(self) -> None:
        for prefix in [f"{kind}_attention" for kind in ATTENTION_KINDS] + ["mlp"]:
            check_int(self, f"{prefix}_block_skip_range", 1, optional=True)
            check_range(self, f"{prefix}_timestep_skip_range")
            check_identifiers(self, f"{prefix}_block_identifiers", optional=False)
        callback = self.current_timestep_callback
        if callback is not None and not callable(callback):
            raise self.fail("current_timestep_callback", f"expected a function without arguments, got {callback!r}")

    def kind(self, name: str) -> tuple[int | None, tuple[float, float], tuple[str, ...]]:
        """Skip range, timestep range and identifiers of ``"spatial"``, ``"temporal"``, ``"cross"`` or ``"mlp"``."""
        return _kind_of(self, name)


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
class FasterCacheConfig(MethodConfig):
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

    def check(self) -> None:
        for prefix in ("spatial_attention", "temporal_attention", "mlp"):
            check_int(self, f"{prefix}_block_skip_range", 1, optional=True)
            check_range(self, f"{prefix}_timestep_skip_range")
            check_identifiers(self, f"{prefix}_block_identifiers", optional=False)
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

    def kind(self, name: str) -> tuple[int | None, tuple[float, float], tuple[str, ...]]:
        """Skip range, timestep range and identifiers of ``"spatial"``, ``"temporal"`` or ``"mlp"``."""
        return _kind_of(self, name)

    @property
    def strict_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that carry [uncond, cond] batches, as given."""
        return tuple(self._unconditional_conditional_input_kwargs_identifiers)

    @property
    def guided_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that may carry such batches: where none were given, some more than diffusers knows."""
        names = self.strict_inputs
        return (*names, *_MORE_GUIDED_INPUTS) if names == _GUIDED_INPUTS else names


def _kind_of(config: MethodConfig, name: str) -> tuple[int | None, tuple[float, float], tuple[str, ...]]:
    prefix = "mlp" if name == "mlp" else f"{name}_attention"
    return (
        getattr(config, f"{prefix}_block_skip_range"),
        getattr(config, f"{prefix}_timestep_skip_range"),
        tuple(getattr(config, f"{prefix}_block_identifiers")),
    )


def _check_names(config: MethodConfig, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, (list, tuple)) or not value or any(not isinstance(v, str) for v in value):
        raise config.fail(name, f"expected a list of input names, got {value!r}", "such as ['hidden_states', ...]")
