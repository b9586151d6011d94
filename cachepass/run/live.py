"""Live: the programs that a model runs in, and the way to end its runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .. import _torch
from ..errors import ConfigError, listing
from ..options import CompileOptions, parse_options
from .context import check_names, surroundings
from .dispatch import LIVE, Dispatcher
from .instance import Instance
from .model import Model

ENABLED = "_cachepass"  # the attribute of a module that a cache was put into in place
_DENOISERS = re.compile(r"(transformer|unet)(_\d+)?")


def denoisers_of(pipeline: object) -> dict[str, torch.nn.Module] | None:
    """What a pipeline of diffusers calls in every step, by its names; None: it is no pipeline.

    Raises:
        ConfigError: It has nothing of that kind.
    """
    components = getattr(pipeline, "components", None)
    if isinstance(pipeline, torch.nn.Module) or not isinstance(components, dict):
        return None
    modules = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    found = {name: part for name, part in modules.items() if _DENOISERS.fullmatch(name)}
    if not found:
        raise ConfigError(
            f"{type(pipeline).__name__} has no transformer among its components: {listing(components)}",
            where=type(pipeline).__name__,
            hint="give the model itself",
        )
    return found


def denoiser_of(model: object) -> object:
    """The model, or that of a pipeline.

    Raises:
        ConfigError: A pipeline has none, or several.
    """
    found = denoisers_of(model)
    if found is None:
        return model
    if len(found) > 1:
        raise ConfigError(
            f"{type(model).__name__} has several: {listing(found)}",
            where=type(model).__name__,
            hint=f"give one of them: pipe.{next(iter(found))}",
        )
    return next(iter(found.values()))


@contextlib.contextmanager
def standing_in(model: Any, parts: Mapping[str, Any]) -> Iterator[Any]:
    """What a sampling loop is called with: the part itself, or the pipeline with its parts in place."""
    if "" in parts:
        yield parts[""]
        return
    own = {name: getattr(model, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(model, name, part)
        yield model
    finally:
        for name, part in own.items():
            setattr(model, name, part)


def original_of(model: object) -> object:
    """The module behind a pipeline, or a compiled module or function."""
    model = denoiser_of(model)
    model = getattr(model, "_orig_mod", model)
    original = getattr(model, "_torchdynamo_orig_callable", model)
    return getattr(original, "__self__", original)


def _module_of(model: object) -> torch.nn.Module:
    """The same, which must be a module."""
    module = original_of(model)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a module, a compiled module or a pipeline, got {type(model).__name__}")
    return module


def options_of(model: object) -> CompileOptions | None:
    """What a module or function was compiled with; None: not by this backend, or nobody can tell."""
    given = _torch.compile_options(denoiser_of(model))
    return None if given is None else parse_options(*given)


def programs_of(model: object) -> Iterator[tuple[Dispatcher, Instance]]:
    """The graphs that a model, or a module in it, was captured in, and as what they are called."""
    module = _module_of(model)
    for dispatcher in list(LIVE):
        for instance in dispatcher.instances.of(module):
            yield dispatcher, instance


def programs_in(module: torch.nn.Module) -> Iterator[Dispatcher]:
    """The graphs that calls of a module itself were captured in."""
    for dispatcher in list(LIVE):
        if any(i.module is not None and i.module() is module for i in list(dispatcher.instances.values())):
            yield dispatcher


def compiled_in_place() -> Iterator[torch.nn.Module]:
    """Modules that were captured as they are, by ``module.compile(...)``."""
    for dispatcher in list(LIVE):
        for instance in list(dispatcher.instances.values()):
            module = None if instance.module is None else instance.module()
            if module is not None and module._compiled_call_impl is not None:
                yield module


def release(*names: str) -> None:
    """Requests are over, or were cancelled: end their runs in all compiled models, and free what these keep.

    Names are those of :func:`cachepass.rows` or ``cache_context``, below the contexts that the caller stands in; what
    is below them (``"req-7/cond"``) is meant too. One that nothing is known of is no error: a request may be cancelled
    before its first step.

    Raises:
        TypeError: A name is not a string, or empty.
        ConcurrencyError: One of them is in the middle of a step.
    """
    check_names(names)
    records = {instance.model for dispatcher in list(LIVE) for instance in list(dispatcher.instances.values())}
    for name in names:
        for record in records:
            record.release((*surroundings().names, name))


def reset(model: torch.nn.Module | Callable[..., Any] | None = None, *, context: str | None = None) -> None:
    """End the caller's runs: the next call of ``model`` is step 0 of a new one.

    Inside of a ``cache_context`` these are the runs of this context, and of those in it. Outside of any they are all
    that this thread made, in whatever context. Runs of other threads go on. With ``context`` they are those of the
    context of this name (``"request-1"``, ``"request-1/cond"``), whoever made them.

    ``model`` is the compiled or the original module; None: every model compiled with ``cached_inductor``. Without a
    program (nothing was called yet) there is nothing to end.

    Raises:
        ConcurrencyError: One of these runs is in the middle of a step.
    """
    if model is None:
        found = [instance for dispatcher in list(LIVE) for instance in list(dispatcher.instances.values())]
    else:
        found = [instance for _, instance in programs_of(model)]
    for record in dict.fromkeys(instance.model for instance in found):
        record.reset(context)


def reset_around(module: torch.nn.Module) -> None:
    """The same for a module that is compiled itself, or inside of one that is."""
    found: set[Model] = {instance.model for _, instance in programs_of(module)}
    if not found:
        records = {instance.model for dispatcher in list(LIVE) for instance in list(dispatcher.instances.values())}
        found = {record for record in records if record.module is not None and module in record.module.modules()}
    for record in found:
        record.reset()


def forget(model: torch.nn.Module | Callable[..., Any]) -> None:
    """Free all slots of a model, and know nothing of its runs any more; its programs stay."""
    for dispatcher, instance in list(programs_of(model)):
        instance.model.forget()
        dispatcher.instances.forget(instance)  # called again, it is a new one


def recompile(
    model: Any, cache: Any, *, fullgraph: bool = True, dynamic: bool | None = None, **options: Any
) -> Callable[..., Any]:
    """Compile a model anew, with another cache: what was compiled of it before, and what that keeps, is dropped.

    Trying many configs by ``torch.compile`` alone ends at Dynamo's limit: all of them are captures of one code. Other
    models of the same class are captured again when they are called next.

    Args:
        model: The module, or what it was compiled to before.
        cache: As ``options["cache"]`` of ``torch.compile``.
        fullgraph: As for ``torch.compile``.
        dynamic: As for ``torch.compile``.
        options: Further options of the backend.

    Raises:
        ConfigError, OptionError: The config or an option is wrong; nothing was dropped.
        TypeError: ``model`` is not a module.
    """
    given = {**options, "cache": cache}
    parse_options(given)
    module = _module_of(model)
    forget(module)
    _torch.drop_captures(module)
    return torch.compile(module, backend="cached_inductor", fullgraph=fullgraph, dynamic=dynamic, options=given)
