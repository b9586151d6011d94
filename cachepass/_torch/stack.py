"""The Python stack: which calls of modules the current code runs in."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import config, convert_frame, eval_frame
from torch._dynamo.eval_frame import OptimizedModule


@dataclass(frozen=True)
class ModuleCall:
    """A call ``module(*args, **kwargs)`` that is on the Python stack."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_CALL = torch.nn.Module._call_impl.__code__
_CONVERT = convert_frame.ConvertFrameAssert.__call__.__code__


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
            if not isinstance(scope["self"], OptimizedModule):
                if wrapper is not None and _compiles_forward(wrapper, scope["self"]):
                    compiled = len(calls)
                wrapper = None
                calls.append(ModuleCall(scope["self"], scope["args"], scope["kwargs"]))
        elif not found and frame.f_code.co_name == "compile_wrapper" and _is_of(frame, eval_frame):
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


def allow_captures(count: int) -> None:
    """Let what is being compiled be captured up to so many times, as ``torch.compile(recompile_limit=...)`` would: only
    this one function, and only where its user gave no limit. Before torch 2.13, which has no limit of one function,
    nothing is changed."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CONVERT:
            converter: Any = frame.f_locals["self"]
            if getattr(converter, "_recompile_limit", 0) is None:
                converter._recompile_limit = max(count, config.recompile_limit)
            return
        frame = frame.f_back


def _is_of(frame: types.FrameType, module: types.ModuleType) -> bool:
    return frame.f_globals.get("__name__") == module.__name__


def calling_module() -> torch.nn.Module | None:
    """The module of the innermost such call."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and not isinstance(module := frame.f_locals["self"], OptimizedModule):
            return module
        frame = frame.f_back
    return None


def traced_from() -> str:
    """From where the frame that Dynamo is tracing was called: ``"module"`` (it is the ``forward`` of the innermost
    calling module), ``"compile"`` (it is what was given to ``torch.compile``) or ``"code"`` (any other code)."""
    frame, caller = sys._getframe(1), None
    while frame is not None:
        if _is_of(frame, convert_frame):
            caller = frame.f_back
        elif caller is not None and not frame.f_globals.get("__name__", "").startswith(("torch.", "contextlib")):
            break  # the compiler's own frames are over
        frame = frame.f_back
    name = "" if caller is None else caller.f_globals.get("__name__", "")
    return {torch.nn.modules.module.__name__: "module", eval_frame.__name__: "compile"}.get(name, "code")


@contextlib.contextmanager
def many_captures(times: int) -> Iterator[None]:
    """Let functions be captured so many times as often as usual: a module that is compiled in as many ways has one
    code."""
    limits = {
        "recompile_limit": config.recompile_limit * times,
        "accumulated_recompile_limit": config.accumulated_recompile_limit * times,
    }
    with config.patch(limits):
        yield


def drop_captures(module: torch.nn.Module) -> None:
    """Drop everything that was compiled of the code of a module and of those in it."""
    for part in module.modules():
        forward = inspect.unwrap(type(part).forward)
        if hasattr(forward, "__code__"):
            eval_frame.remove_from_cache(forward)
