"""What ``torch.compile`` made, and of what; without the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import wrapt

_intercepted: list[Callable[..., Any]] = []


def compile_options(compiled: object) -> tuple[dict[str, Any] | None, str | None] | None:
    """``options`` and ``mode`` of the ``torch.compile`` call that made a module or function with this project's
    backend, or of a module's own ``compile``; None: there was none, or torch keeps them elsewhere."""
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None:
        function = getattr(compiled, "_compiled_call_impl", None) or compiled
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        context = next((cell for cell in cells if hasattr(cell, "callback")), None)
    backend = getattr(context, "callback", None)
    while backend is not None:
        kwargs = getattr(backend, "kwargs", None)
        if kwargs is not None and getattr(backend.compiler_fn, "__module__", "").startswith("cachepass."):
            return kwargs.get("options"), kwargs.get("mode")
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
    return None


def on_compiled_calls(handler: Callable[..., Any]) -> None:
    """From now on, have ``handler(module, call, args, kwargs)`` called in place of every call of a module that
    ``torch.compile(module)`` made with this project's backend."""
    if handler in _intercepted:
        return
    _intercepted.append(handler)

    def install(eval_frame: Any) -> None:
        own = eval_frame.OptimizedModule.__call__

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if compile_options(self) is None:
                return own(self, *args, **kwargs)
            return handler(self._orig_mod, functools.partial(own, self), args, kwargs)

        eval_frame.OptimizedModule.__call__ = call

    wrapt.register_post_import_hook(install, "torch._dynamo.eval_frame")
