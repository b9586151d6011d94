"""Captures: how often Dynamo may capture a function, from where it was called, and how what it captured is dropped."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo import config, convert_frame, eval_frame

_CONVERT = convert_frame.ConvertFrameAssert.__call__.__code__


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


def _is_of(frame: types.FrameType, module: types.ModuleType) -> bool:
    return frame.f_globals.get("__name__") == module.__name__
