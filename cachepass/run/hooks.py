"""Hooks: where calls of a module begin and end, for models that are many graphs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .. import _torch


class Watcher(Protocol):
    """Who is told (a ``calls.Model``)."""

    @property
    def module(self) -> torch.nn.Module | None: ...

    @property
    def current(self) -> Any: ...

    def begin(self, begun: _torch.ModuleCall) -> None: ...

    def finish(self, call: Any, *, succeeded: bool) -> None: ...


def watch_calls(module: torch.nn.Module, watcher: weakref.ref[Any]) -> tuple[Any, ...]:
    """Tell a watcher of the calls of a module for as long as it lives."""
    before: Any = _Before(watcher)
    after: Any = _After(watcher)
    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        module.register_forward_hook(after, always_call=True),
    )
    weakref.finalize(watcher(), _remove, *handles)
    return handles


def _remove(*handles: Any) -> None:
    for handle in handles:
        handle.remove()


def _nobody() -> None:
    return None


class _Hook:
    """What a model's hooks share. A copy of the module gets copies of its hooks, which must not act for the original:
    they hold the module's own record weakly, and leave other modules alone."""

    def __init__(self, model: Callable[[], Watcher | None]) -> None:
        _hide_from_dynamo()
        self._model = model

    def __deepcopy__(self, memo: object) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (_nobody,)  # a record belongs to a process

    def _of(self, module: torch.nn.Module) -> Watcher | None:
        model = self._model()
        return model if model is not None and model.module is module else None


class _Before(_Hook):
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = self._of(module)
        if model is not None:
            model.begin(_torch.ModuleCall(module, args, kwargs))


class _After(_Hook):
    def __call__(self, module: Any, args: Any, output: Any) -> None:  # noqa: ARG002
        model = self._of(module)
        call = None if model is None else model.current
        if model is not None and call is not None:
            model.finish(call, succeeded=output is not None)  # None: it raised


@functools.cache
def _hide_from_dynamo() -> None:
    """The hooks are not traced. This is said when the first one is made: it imports Dynamo, which an exported program
    does without."""
    for hook in (_Before, _After):
        setattr(hook, "__call__", torch.compiler.disable(hook.__call__))  # noqa: B010 (for type checkers)
