"""Live: the programs that a model runs in, and the way to end its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import _torch
from ..options import CompileOptions, parse_options
from .dispatch import LIVE, Dispatcher
from .instance import Instance
from .model import Model


def original_of(model: object) -> object:
    """The module behind a compiled module or function."""
    model = getattr(model, "_orig_mod", model)
    original = getattr(model, "_torchdynamo_orig_callable", model)
    return getattr(original, "__self__", original)


def options_of(model: object) -> CompileOptions | None:
    """What a module or function was compiled with; None: not by this backend, or nobody can tell."""
    given = _torch.compile_options(model)
    return None if given is None else parse_options(*given, _torch.inductor_keys(), _torch.inductor_modes())


def programs_of(model: object) -> Iterator[tuple[Dispatcher, Instance]]:
    """The graphs that a model, or a module in it, was captured in, and as what they are called."""
    module = original_of(model)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a module or a compiled module, got {type(model).__name__}")
    for dispatcher in list(LIVE):
        for instance in dispatcher.instances.of(module):
            yield dispatcher, instance


def reset(model: torch.nn.Module | Callable[..., Any] | None = None) -> None:
    """End the caller's runs: the next call of ``model`` is step 0 of a new one.

    Inside of a ``cache_context`` these are the runs of this context, and of those in it. Outside of any they are all
    that this thread made, in whatever context. Runs of other threads go on.

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
        record.reset()


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
