"""diffusers pipelines with a cache, in one line:

    from cachepass.integrations.diffusers import enable_cache

    enable_cache(pipe, cachepass.TaylorSeerCacheConfig(cache_interval=4))
    image = pipe(prompt).images[0]

The pipeline's denoisers are compiled in place, innermost: below the hooks of accelerate and diffusers (offloading), and
whether these come first or later. The timesteps are those of the pipeline that calls, and of its scheduler: in the unit
of the configs, without reading from the device. Contexts and the ends of runs are heard as for every model of diffusers
(``run/listening.py``).
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..capture.inputs import kind_of
from ..errors import ConfigError, NotCompiledError
from ..options import parse_options
from ..run.context import cache_context, context_of, guidance_partner, telling
from ..run.live import ENABLED, denoiser_of, denoisers_of, forget
from ..run.rows.called import called
from ..ship.export import Exported
from ..ship.export import export as export_model
from ..tuning.tune import tune as tune_model
from ..tuning.tuning import Tuning


def enable_cache(
    target: Any, cache: Any, *, fullgraph: bool = True, dynamic: bool | None = None, **options: Any
) -> None:
    """Compile a pipeline's denoisers in place, with a cache.

    Args:
        target: A ``DiffusionPipeline`` (all of its transformers: Wan 2.2 has two) or a model. A model alone is cached
            as ``torch.compile`` does it, and timesteps are read from its input (``timestep_scale``) where no pipeline
            calls it.
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
    parse_options(given)
    modules = _denoisers(target)
    for name, module in modules.items():
        if module.__dict__.get(ENABLED) is not None or getattr(module, "is_cache_enabled", False):
            raise ConfigError("a cache is on already", where=name, hint="call disable_cache first")
        if not _places(module):
            raise ConfigError(
                f"its forward was replaced by {module.forward}",
                where=name,
                hint="call enable_cache before whatever replaces it",
            )
    for module in modules.values():
        enabled = _Enabled(None if module is target else weakref.ref(target))
        compiled = torch.compile(
            type(module).forward, backend="cached_inductor", fullgraph=fullgraph, dynamic=dynamic, options=given
        )
        _replace(module, _forward(compiled, type(module).forward, enabled))
        module.__dict__[ENABLED] = enabled


def tune(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    steps: int | Sequence[int] | None = None,
    quality: float | Callable[[Any, Any], bool] | None = None,
    seed: int = 0,
    tuning: Mapping[str, Any] | None = None,
    **call: Any,
) -> Tuning:
    """Find the best cache for a pipeline, as it is called, and a budget: :func:`cachepass.tune`.

        tuning = tune(pipe, ["a fox in snow", "a lighthouse"], steps=10, num_inference_steps=50)
        enable_cache(pipe, tuning.config(), num_inference_steps=50)

    Args:
        pipe: A ``DiffusionPipeline`` with one transformer, whose cache is not on.
        prompts: What it is called with, in turn: each is its first argument, or a dict of keyword arguments. Two or
            four do; with fewer than the runs there are, they are taken again with other seeds.
        steps, quality: As for :func:`cachepass.tune`.
        seed: Of the first generation's random numbers; the others count on.
        tuning: Further arguments of :func:`cachepass.tune` (``runs``, ``validate``, ``tries``, ``max_bytes``, ...).
        call: Further arguments of the pipeline, the same for all.

    Raises:
        ConfigError, OptionError: As for :func:`cachepass.tune`; or a cache is on.
    """
    if not prompts or isinstance(prompts, (str, bytes)):
        raise ConfigError(
            f"expected a list of prompts, got {prompts!r}", where="tune.prompts", hint='["a fox in snow"]'
        )

    def sample(target: Any, run: int) -> Any:
        prompt = prompts[run % len(prompts)]
        given = dict(prompt) if isinstance(prompt, Mapping) else {}
        first = () if isinstance(prompt, Mapping) else (prompt,)
        generator = torch.Generator().manual_seed(seed + run)
        return target(*first, **{"generator": generator, **given, **call})

    return tune_model(pipe, sample, steps=steps, quality=quality, **(tuning or {}))


class _Enough(Exception):
    """Ends a pipeline's call: every way in which it calls its transformer was seen."""


def export(
    pipe: Any, *args: Any, cache: Any, path: str | Path, options: Mapping[str, Any] | None = None, **call: Any
) -> Exported:
    """Export a pipeline's transformer as the pipeline calls it: :func:`cachepass.export`, whose inputs are those of the
    first steps of ``pipe(*args, **call)``.

        export(pipe, "a fox in snow", num_inference_steps=28, cache="taylorseer", path="flux.cpz")
        pipe.transformer = cachepass.load("flux.cpz", pipe.transformer)

    Prompts of another length are another size: where the pipeline does not pad them, both calls of a step are exported.

    Args:
        pipe: A ``DiffusionPipeline`` with one transformer, whose cache is not on.
        args: Those of a call of it.
        cache: As ``options["cache"]`` of ``torch.compile``.
        path: The archive.
        options: Those of the backend. ``num_inference_steps`` is the call's, if it has one.
        call: Keyword arguments of the call; ``weights`` and ``blocks`` are those of :func:`cachepass.export`.

    Raises:
        CachepassError: As :func:`cachepass.export`; or the pipeline has several transformers.
    """
    module = denoiser_of(pipe)
    assert isinstance(module, torch.nn.Module)
    steps = call.get("num_inference_steps")
    options = {**({} if steps is None else {"num_inference_steps": steps}), **(options or {})}
    further = {name: call.pop(name) for name in ("weights", "blocks") if name in call}
    signature = inspect.signature(module.forward)
    seen: dict[tuple[str, Hashable], dict[str, Any]] = {}

    def note(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = signature.bind(*given, **named).arguments
        kind = context_of(module), kind_of(list(arguments.values()))
        if kind in seen:
            raise _Enough
        seen[kind] = dict(arguments)

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(*args, **call)
    except _Enough:
        pass
    finally:
        handle.remove()
    (context, _), first = next(iter(seen.items()))
    _, *shapes = {kind: arguments for (_, kind), arguments in seen.items()}.values()
    with cache_context(context) if guidance_partner(context) is not None else nullcontext():
        return export_model(module, **first, cache=cache, path=path, shapes=shapes, options=options, **further)


def disable_cache(target: Any) -> None:
    """Undo ``enable_cache``, and free what the cache keeps.

    Raises:
        NotCompiledError: There is no cache to disable.
    """
    modules = _denoisers(target)
    for name, module in modules.items():
        if module.__dict__.get(ENABLED) is None:
            raise NotCompiledError("its cache is not on", where=name, hint="enable_cache comes first")
    for module in modules.values():
        _replace(module, None)
        del module.__dict__[ENABLED]
        forget(module)


def _denoisers(target: Any) -> dict[str, torch.nn.Module]:
    if isinstance(target, torch.nn.Module):
        return {type(target).__name__: target}
    found = denoisers_of(target)
    if found is None:
        raise ConfigError(
            f"neither a pipeline nor a model: {type(target).__name__}",
            where="enable_cache",
            hint="give a DiffusionPipeline, or its transformer",
        )
    return found


# ---- the call -------------------------------------------------------------------------------------------------------


class _Enabled:
    """What a cached module knows of the pipelines that call it.

    The pipeline that it was enabled in is held weakly, and asked where the caller is none: in loops that are written by
    hand around its scheduler.
    """

    def __init__(self, pipeline: weakref.ref[Any] | None) -> None:
        self._pipeline = pipeline
        self._before = _timesteps(getattr(None if pipeline is None else pipeline(), "scheduler", None))
        self._local = threading.local()  # each thread has a pipeline of its own

    def __deepcopy__(self, memo: object) -> _Enabled:
        return _Enabled(self._pipeline)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a cache belongs to a process: what is loaded has none

    def step(self) -> AbstractContextManager[None]:
        """Around one call: what its pipeline says of the step."""
        scheduler, now = self._caller()
        timesteps = _timesteps(scheduler)
        return telling(timestep=self._timestep(scheduler, timesteps, now), schedule=timesteps)

    def _caller(self) -> tuple[Any, Any]:
        """The scheduler of the pipeline that calls, and its current timestep."""
        frame = sys._getframe(2)
        while frame is not None:
            names = frame.f_code.co_varnames
            if "components" in names or names[:1] == ("self",):
                scope = frame.f_locals
                pipeline: Any = scope.get("components", scope.get("self"))
                if hasattr(type(pipeline), "components") and hasattr(pipeline, "scheduler"):
                    return pipeline.scheduler, getattr(pipeline, "_current_timestep", scope.get("t"))
            frame = frame.f_back
        pipeline = None if self._pipeline is None else self._pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        used = _timesteps(scheduler) is not self._before or getattr(scheduler, "step_index", None) is not None
        return (scheduler if used else None), getattr(pipeline, "_current_timestep", None)

    def _timestep(self, scheduler: Any, timesteps: torch.Tensor | None, now: Any) -> float | None:
        """The timestep in 0 to 1000; None: it cannot be had without waiting for the device."""
        if now is not None and (not torch.is_tensor(now) or (now.numel() == 1 and now.device.type == "cpu")):
            return float(now)
        if timesteps is None:
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
        known, values = getattr(self._local, "schedule", (None, ()))
        if known is not timesteps:
            values = timesteps.tolist()  # one wait for the device in each run
            self._local.schedule = timesteps, values
        return float(values[index]) if 0 <= index < len(values) else None


def _timesteps(scheduler: Any) -> torch.Tensor | None:
    """The timesteps of a scheduler's current run."""
    timesteps = getattr(scheduler, "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 else None


def _forward(compiled: Callable[..., Any], original: Callable[..., Any], enabled: _Enabled) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with (self.__dict__.get(ENABLED) or enabled).step():
            return called(self, functools.partial(compiled, self), args, kwargs)

    return forward


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
