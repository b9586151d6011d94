"""diffusers pipelines with a cache, in one line:

    from cachepass.integrations.diffusers import enable_cache

    enable_cache(pipe, cachepass.TaylorSeerCacheConfig(cache_interval=4))
    image = pipe(prompt).images[0]

The pipeline's denoisers are compiled in place, innermost: below the hooks of accelerate and diffusers (offloading), and
whether these come first or later. What the cache must know of a step is taken from the pipeline:

    contexts    from ``transformer.cache_context``, which pipelines open; calls beyond the first one in a step get one
    timesteps   from the pipeline and its scheduler, in the unit of the configs, without reading from the device
    ends        from ``maybe_free_model_hooks``, which pipelines call at their end
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .. import _torch
from ..errors import ConfigError, NotCompiledError, listing
from ..inspect.summary import forget, reset
from ..options import parse_options
from ..runtime.context import DEFAULT, cache_context, current_context

_DENOISERS = re.compile(r"(transformer|unet)(_\d+)?")
_STATE = "_cachepass"  # the attribute of a module whose cache is on


def enable_cache(target: Any, cache: Any, *, fullgraph: bool = True, dynamic: bool | None = None,
                 **options: Any) -> None:  # fmt: skip
    """Compile a pipeline's denoisers in place, with a cache.

    Args:
        target: A ``DiffusionPipeline`` (all of its transformers: Wan 2.2 has two) or a model. A model alone is cached
            as ``torch.compile`` does it: timesteps are read from its input (``timestep_scale``), and calls in one step
            are told apart by ``cache_context`` only.
        cache: As ``options["cache"]`` of ``torch.compile``: a config of ours or of diffusers, a dict, or a name.
        fullgraph: As for ``torch.compile``.
        dynamic: As for ``torch.compile``.
        options: Further ``options`` of the backend: ``lowering``, ``mode``, ``num_inference_steps``, Inductor's.

    The order of this, ``.to()``, LoRA adapters, offloading and ``set_timesteps`` is free. Nothing is compiled before
    the first call. ``cachepass.summary(pipe.transformer)`` says what was done.

    Raises:
        ConfigError, OptionError: The config or an option is wrong, there is no transformer, or a cache is on already.
    """
    given = {"cache": cache, **options}
    parse_options(given, None, _torch.inductor_keys(), _torch.inductor_modes())
    modules = _denoisers(target)
    for name, module in modules.items():
        if module.__dict__.get(_STATE) is not None or getattr(module, "is_cache_enabled", False):
            raise ConfigError("a cache is on already", where=name, hint="call disable_cache first")
        if not _places(module):
            raise ConfigError(f"its forward was replaced by {module.forward}", where=name,
                              hint="call enable_cache before whatever replaces it")  # fmt: skip
    for module in modules.values():
        enabled = _Enabled(None if module is target else weakref.ref(target))
        compiled = torch.compile(type(module).forward, backend="cached_inductor", fullgraph=fullgraph, dynamic=dynamic,
                                 options=given)  # fmt: skip
        _replace(module, _forward(compiled, type(module).forward, enabled))
        for attribute, function in (("cache_context", _cache_context), ("_reset_stateful_cache", _end_of_run)):
            module.__dict__[attribute] = _bound(function, attribute, module)
        module.__dict__[_STATE] = enabled


def disable_cache(target: Any) -> None:
    """Undo ``enable_cache``, and free what the cache keeps.

    Raises:
        NotCompiledError: There is no cache to disable.
    """
    modules = _denoisers(target)
    for name, module in modules.items():
        if module.__dict__.get(_STATE) is None:
            raise NotCompiledError("its cache is not on", where=name, hint="enable_cache comes first")
    for module in modules.values():
        _replace(module, None)
        for attribute in ("cache_context", "_reset_stateful_cache", _STATE):
            del module.__dict__[attribute]
        forget(module)


def _denoisers(target: Any) -> dict[str, torch.nn.Module]:
    if isinstance(target, torch.nn.Module):
        return {type(target).__name__: target}
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise ConfigError(f"neither a pipeline nor a model: {type(target).__name__}", where="enable_cache",
                          hint="give a DiffusionPipeline, or its transformer")  # fmt: skip
    found = {name: part for name, part in components.items()
             if _DENOISERS.fullmatch(name) and isinstance(part, torch.nn.Module)}  # fmt: skip
    if not found:
        raise ConfigError(f"{type(target).__name__} has no transformer among its components: {listing(components)}",
                          where="enable_cache", hint="give the model itself")  # fmt: skip
    return found


# ---- the call -------------------------------------------------------------------------------------------------------


class _Enabled:
    """What a cached module knows of the pipeline that calls it."""

    def __init__(self, pipeline: weakref.ref[Any] | None) -> None:
        self._pipeline = pipeline
        self._schedule: tuple[torch.Tensor, list[float]] | None = None
        self._step: object = None
        self._calls = 0

    def __deepcopy__(self, memo: object) -> _Enabled:
        return _Enabled(self._pipeline)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a cache belongs to a process: what is loaded has none

    def step(self) -> AbstractContextManager[None]:
        """Around one call: its context and timestep."""
        pipeline = None if self._pipeline is None else self._pipeline()
        now = getattr(pipeline, "_current_timestep", None)
        # Every turn of a pipeline's loop has another tensor for its timestep: the same one is the same step.
        self._calls = self._calls + 1 if now is not None and now is self._step else 0
        self._step = now
        name = current_context()
        if name == DEFAULT and self._calls:
            name = f"call {self._calls + 1}"
        return cache_context(name, timestep=None if pipeline is None else self._timestep(pipeline, now))

    def _timestep(self, pipeline: Any, now: Any) -> float | None:
        """In 0..1000; None: where it cannot be had without waiting for the device."""
        if now is not None and (not torch.is_tensor(now) or (now.numel() == 1 and now.device.type == "cpu")):
            return float(now)
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
            return None
        if now is not None:
            if now.numel() != 1 or now.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
                return None
            index = now.storage_offset() - timesteps.storage_offset()
        elif hasattr(scheduler, "step_index"):
            index = getattr(scheduler, "step_index", None)
            if index is None:  # no step was made yet
                index = getattr(scheduler, "begin_index", None) or 0
        else:
            return None
        if self._schedule is None or self._schedule[0] is not timesteps:
            self._schedule = timesteps, timesteps.tolist()  # one wait for the device in each run
        values = self._schedule[1]
        return float(values[index]) if 0 <= index < len(values) else None


def _forward(compiled: Callable[..., Any], original: Callable[..., Any], enabled: _Enabled) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with (self.__dict__.get(_STATE) or enabled).step():
            return compiled(self, *args, **kwargs)

    return forward


def _bound(function: Callable[..., Any], attribute: str, module: torch.nn.Module) -> Callable[..., Any]:
    """A method of a module. Methods are pickled by their names, so a loaded module has its class's own; where the class
    has none, it has this one."""
    if not hasattr(type(module), attribute):
        return functools.partial(function, module)
    own = types.FunctionType(function.__code__, function.__globals__, attribute, function.__defaults__)
    return types.MethodType(own, module)


def _cache_context(self: torch.nn.Module, name: str, **_: Any) -> AbstractContextManager[None]:  # noqa: ARG001
    return cache_context(name)


def _end_of_run(self: torch.nn.Module, recurse: bool = True) -> None:
    reset(self)
    original = getattr(type(self), "_reset_stateful_cache", None)
    if original is not None:
        original(self, recurse)


# ---- in place -------------------------------------------------------------------------------------------------------


def _replace(module: torch.nn.Module, forward: Callable[..., Any] | None) -> None:
    """Have ``forward`` called wherever the class's own, or the one put there before, is called now: by the module
    itself, or by the innermost hook of accelerate or diffusers. None: the class's own again."""
    new = types.MethodType(forward or type(module).forward, module)
    for holder, attribute in _places(module):
        setattr(holder, attribute, new)
    if forward is None and module.forward == new:
        del module.__dict__["forward"]


def _places(module: torch.nn.Module) -> list[tuple[Any, str]]:
    """Where a module's own ``forward`` is called from: itself, or a library that wrapped it."""
    references = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ())
    known = [(module, "forward"), (module, "_old_forward")]  # the latter is accelerate's
    known += [(reference, name) for reference in references for name in ("forward", "original_forward")]
    own = inspect.unwrap(type(module).forward)
    found = []
    for holder, name in known:
        value = getattr(holder, name, None)
        if isinstance(value, types.MethodType) and value.__self__ is module and inspect.unwrap(value.__func__) is own:
            found.append((holder, name))
    return found
