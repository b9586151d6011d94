"""What ``torch.compile`` made, and of what; without the compiler."""

from __future__ import annotations

from typing import Any


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
