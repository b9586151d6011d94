"""The Python stack: which calls of modules the current code runs in."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModuleCall:
    """A call ``module(*args, **kwargs)`` that is on the Python stack."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_CALL = torch.nn.Module._call_impl.__code__
_COMPILER = "torch._dynamo.eval_frame"  # imported by whoever compiles; an exported program runs without it


def calling_modules() -> tuple[list[ModuleCall], int | None]:
    """The calls of modules that the current Python frame runs in, innermost first, and which of them is of the module
    that was given to ``torch.compile`` (None: a function was).

    A ``forward`` that was compiled by itself and runs in a call of its module is that module. Calls that Dynamo inlined
    are not on the stack; the wrappers that ``torch.compile(module)`` makes are left out.
    """
    calls: list[ModuleCall] = []
    compiled: int | None = None
    wrapper = None  # the innermost frame of torch.compile's own, until it is known what was given to it
    frame, found = sys._getframe(1), False
    while frame is not None:
        if frame.f_code is _CALL:
            scope = frame.f_locals
            if not _is_compiled(scope["self"]):
                if wrapper is not None and _compiles_forward(wrapper, scope["self"]):
                    compiled = len(calls)
                wrapper = None
                calls.append(ModuleCall(scope["self"], scope["args"], scope["kwargs"]))
        elif not found and frame.f_code.co_name == "compile_wrapper" and _is_of(frame, _COMPILER):
            found, wrapper = True, frame
            compiled = len(calls) - 1 if calls else None
        frame = frame.f_back
    return calls, compiled


def _compiles_forward(wrapper: types.FrameType, module: torch.nn.Module) -> bool:
    """What torch.compile was given is the ``forward`` of a module: its class's, called on it, or its own."""
    function, args = wrapper.f_locals.get("fn"), wrapper.f_locals.get("args", ())
    receiver = getattr(function, "__self__", args[0] if args else None)
    if isinstance(receiver, torch.nn.Module) and receiver is not module:
        return False
    own = {*codes_of(module.forward), *codes_of(type(module).forward)}
    return any(code in own for code in codes_of(function))


def codes_of(function: Callable[..., Any] | None) -> list[types.CodeType]:
    """The code of a function, and of all that it wraps."""
    found: list[types.CodeType] = []
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None:
            found.append(code)
        function = getattr(function, "__wrapped__", None)
    return found


def _is_of(frame: types.FrameType, module: str) -> bool:
    return frame.f_globals.get("__name__") == module


def _is_compiled(module: torch.nn.Module) -> bool:
    """It is what ``torch.compile(module)`` returned, around the module itself."""
    compiler = sys.modules.get(_COMPILER)
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def calling_module() -> torch.nn.Module | None:
    """The module of the innermost such call."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and not _is_compiled(module := frame.f_locals["self"]):
            return module
        frame = frame.f_back
    return None
