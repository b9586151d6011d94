"""What the user says: one config class per method, and the compile options.

The configs carry diffusers' class and field names, defaults and meaning, so ``diffusers.TaylorSeerCacheConfig(...)``
itself, ``{"method": "taylorseer", ...}`` and ``"taylorseer"`` all parse to the same object. Everything is checked when
the object is made, before any model is traced.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

from .errors import ConfigError, OptionError, closest

LOWERINGS = ("specialize", "cond", "eager")
_ALIASES = {"pyramid_attention_broadcast": "pab"}
_METHODS: dict[str, type[CacheConfig]] = {}
_T = TypeVar("_T", bound="CacheConfig")


class CacheConfig:
    """Base of the method configs: a frozen dataclass whose ``_check`` runs at construction."""

    method: ClassVar[str] = ""

    def _check(self) -> None:
        raise NotImplementedError

    @classmethod
    def _fail(cls, name: str, what: str, hint: str | None = None) -> ConfigError:
        return ConfigError(what, where=f"{cls.__name__}.{name}", hint=hint)


def _method(name: str) -> Callable[[type[_T]], type[_T]]:
    """Class decorator: a frozen dataclass registered under ``name`` that names the closest field on a typo."""

    def wrap(cls: type[_T]) -> type[_T]:
        cls = dataclass(frozen=True)(cls)
        known = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
        plain = cls.__init__

        @functools.wraps(plain)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for key in kwargs:
                if key not in known:
                    raise ConfigError(f"unknown field {key!r}", where=cls.__name__, hint=closest(key, known))
            plain(self, *args, **kwargs)
            self._check()

        cls.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
        cls.method = name
        _METHODS[name] = cls
        return cls

    return wrap


@_method("taylorseer")
class TaylorSeerCacheConfig(CacheConfig):
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

    def _check(self) -> None:
        _check_int(self, "cache_interval", 1)
        _check_int(self, "disable_cache_before_step", 0)
        _check_int(self, "disable_cache_after_step", 0, optional=True)
        _check_int(self, "max_order", 0, 4)
        _check_identifiers(self, "skip_predict_identifiers")
        _check_identifiers(self, "cache_identifiers")
        if not isinstance(self.use_lite_mode, bool):
            raise self._fail("use_lite_mode", f"expected a bool, got {self.use_lite_mode!r}")
        dtype = self.taylor_factors_dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
            object.__setattr__(self, "taylor_factors_dtype", dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise self._fail(
                "taylor_factors_dtype", f"expected a floating-point torch.dtype or None, got {dtype!r}",
                "torch.float32 or torch.bfloat16; None keeps the module's own dtype",
            )  # fmt: skip
        after, before = self.disable_cache_after_step, self.disable_cache_before_step
        if after is not None and after < before:
            raise self._fail(
                "disable_cache_after_step", f"{after} lies before disable_cache_before_step={before}: no step is left",
                "predicted steps lie in [disable_cache_before_step, disable_cache_after_step)",
            )  # fmt: skip


_SPATIAL = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers", "visual_transformer_blocks")
_CROSS = ("blocks", "transformer_blocks", "layers")
ATTENTION_KINDS = ("spatial", "temporal", "cross")


@_method("pab")
class PyramidAttentionBroadcastConfig(CacheConfig):
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

    def _check(self) -> None:
        for prefix in [f"{kind}_attention" for kind in ATTENTION_KINDS] + ["mlp"]:
            _check_int(self, f"{prefix}_block_skip_range", 1, optional=True)
            _check_range(self, f"{prefix}_timestep_skip_range")
            _check_identifiers(self, f"{prefix}_block_identifiers", optional=False)
        callback = self.current_timestep_callback
        if callback is not None and not callable(callback):
            raise self._fail("current_timestep_callback", f"expected a function without arguments, got {callback!r}")

    def kind(self, name: str) -> tuple[int | None, tuple[float, float], tuple[str, ...]]:
        """Skip range, timestep range and identifiers of ``"spatial"``, ``"temporal"``, ``"cross"`` or ``"mlp"``."""
        prefix = "mlp" if name == "mlp" else f"{name}_attention"
        return (
            getattr(self, f"{prefix}_block_skip_range"),
            getattr(self, f"{prefix}_timestep_skip_range"),
            tuple(getattr(self, f"{prefix}_block_identifiers")),
        )


def _check_int(config: CacheConfig, name: str, low: int, high: float = math.inf, *, optional: bool = False) -> None:
    value = getattr(config, name)
    if optional and value is None:
        return
    bound = f">= {low}" if high == math.inf else f"{low} to {high:.0f}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise config._fail(name, f"expected an int ({bound}), got {value!r} ({type(value).__name__})")
    if not low <= value <= high:
        raise config._fail(name, f"{value} is out of range", f"allowed: {bound}")


def _check_range(config: CacheConfig, name: str) -> None:
    value = getattr(config, name)
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        raise config._fail(name, f"expected two numbers (lo, hi), got {value!r}")
    if not value[0] < value[1]:
        raise config._fail(name, f"the range {tuple(value)} is empty or reversed", "give (lo, hi) with lo < hi")


def _check_identifiers(config: CacheConfig, name: str, *, optional: bool = True) -> None:
    value = getattr(config, name)
    if optional and value is None:
        return
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or any(not isinstance(v, str) for v in value):
        raise config._fail(name, f"expected a list of regex strings, got {value!r}", f"write [{value!r}] for one")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise config._fail(name, f"{pattern!r} is not a regex: {error}") from None


def method_names() -> list[str]:
    return sorted(_METHODS)


def parse_cache(value: object) -> CacheConfig:
    """A config from what ``options["cache"]`` may hold: ours, diffusers', a dict with ``"method"``, or a name."""
    if isinstance(value, CacheConfig):
        return value
    if isinstance(value, str):
        return _config_class(value)()
    if isinstance(value, Mapping):
        fields = dict(value)
        name = fields.pop("method", None)
        if not isinstance(name, str):
            raise OptionError('a dict needs the key "method"', where='options["cache"]', hint=_methods_hint())
        return _config_class(name)(**fields)
    ours = {cls.__name__: cls for cls in _METHODS.values()}.get(type(value).__name__)
    if ours is not None and dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ours(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    raise OptionError(
        f"cannot be read as a cache config: {value!r} ({type(value).__name__})",
        where='options["cache"]', hint="give a config object, a dict or a method's name. " + _methods_hint(),
    )  # fmt: skip


def _config_class(name: str) -> Callable[..., CacheConfig]:
    key = _ALIASES.get(name, name)
    if key not in _METHODS:
        raise OptionError(f"there is no method {name!r}", where='options["cache"]', hint=closest(name, _METHODS))
    return _METHODS[key]


def _methods_hint() -> str:
    return "methods: " + ", ".join(method_names())


@dataclass(frozen=True)
class CompileOptions:
    """``torch.compile(..., options=...)``, parsed.

    Attributes:
        cache: The method's config; None: plain Inductor.
        lowering: ``"specialize"`` (one straight-line program per phase), ``"cond"`` (one program with conditional
            branches) or ``"eager"`` (the rewritten variants, uncompiled).
        timestep_input: Name of the graph input that holds the timestep; None: found by name.
        timestep_scale: Factor from the input's unit to the unit of the config's ranges (1000 for FLUX-like models,
            whose input runs from 1 to 0).
        num_inference_steps: Calls per run. When given, runs are told apart by counting alone.
        inductor: Everything else, as Inductor config patches.
    """

    cache: CacheConfig | None = None
    lowering: str = "specialize"
    timestep_input: str | None = None
    timestep_scale: float = 1.0
    num_inference_steps: int | None = None
    inductor: dict[str, Any] = field(default_factory=dict)


def parse_options(
    options: Mapping[str, Any] | None,
    mode: str | None,
    inductor_keys: set[str],
    modes: Mapping[str, dict[str, Any]],
) -> CompileOptions:
    """Split ``options`` into ours and Inductor's.

    ``"mode"`` may stand among the options too, since torch.compile takes either ``mode=`` or ``options=``. A mode's
    patches come first; single options override them.
    """
    given = dict(options or {})
    name: Any = given.pop("mode", mode) or "default"
    if name not in modes:
        raise OptionError(f"there is no mode {name!r}", where="torch.compile mode", hint=closest(str(name), modes))
    ours: dict[str, Any] = {}
    patches: dict[str, Any] = dict(modes[name])
    names = [f.name for f in dataclasses.fields(CompileOptions) if f.name != "inductor"]
    for key, value in given.items():
        if key in names:
            ours[key] = value
        elif key.replace("-", "_") in inductor_keys:
            patches[key.replace("-", "_")] = value
        else:
            raise OptionError(
                f"unknown option {key!r}", where="torch.compile options",
                hint=_option_hint(key, ["mode", *names], inductor_keys),
            )  # fmt: skip
    if ours.get("cache") is not None:
        ours["cache"] = parse_cache(ours["cache"])
    parsed = CompileOptions(**ours, inductor=patches)
    _check_options(parsed)
    return parsed


def _option_hint(key: str, names: list[str], inductor_keys: set[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, [*names, *inductor_keys], n=1, cutoff=0.6)
    prefix = f"did you mean {near[0]!r}? " if near else ""
    return prefix + "cachepass's own: " + ", ".join(names) + "; every Inductor config key is accepted too"


def _check_options(options: CompileOptions) -> None:
    def fail(name: str, what: str, hint: str | None = None) -> OptionError:
        return OptionError(what, where=f'options["{name}"]', hint=hint)

    if options.lowering not in LOWERINGS:
        raise fail("lowering", f"there is no lowering {options.lowering!r}", closest(str(options.lowering), LOWERINGS))
    steps = options.num_inference_steps
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise fail("num_inference_steps", f"expected an int >= 1 or None, got {steps!r}")
    name = options.timestep_input
    if name is not None and not isinstance(name, str):
        raise fail("timestep_input", f"expected the name of a model input, got {name!r}")
    scale = options.timestep_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise fail("timestep_scale", f"expected a positive number, got {scale!r}")
