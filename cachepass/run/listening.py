"""What diffusers says of a call: heard wherever a model is compiled, without any other line of the user's.

    model.cache_context("cond", step_index=..., ...)   the call belongs to this context
    model._reset_stateful_cache()                      pipelines say so at their end: the run is over

Both arrive in a function of diffusers, which is replaced by one that listens first: when the backend is imported, which
``torch.compile(model, backend="cached_inductor")`` does, or when diffusers is imported after that. Diffusers itself is
never imported here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import wrapt

_HEARD = "_cachepass_heard"  # marks a function that listens already


def listen(on_context: Callable[[Any, Any], None], on_end: Callable[[Any], None]) -> None:
    """Call ``on_context`` with a model and every context that diffusers opens (None: closes) around its calls, and
    ``on_end`` with every model whose caches diffusers empties. Versions of diffusers that have no such function say
    nothing."""

    def hear_contexts(hooks: Any) -> None:
        _hear(hooks, "_set_cache_context", on_context)

    def hear_ends(cache_utils: Any) -> None:
        _hear(getattr(cache_utils, "CacheMixin", None), "_reset_stateful_cache", lambda model, *_, **__: on_end(model))

    wrapt.register_post_import_hook(hear_contexts, "diffusers.hooks.hooks")
    wrapt.register_post_import_hook(hear_ends, "diffusers.models.cache_utils")


def _hear(holder: Any, name: str, listener: Callable[..., None]) -> None:
    """Have a listener called in front of a function, with its arguments."""
    original = getattr(holder, name, None)
    if original is None or hasattr(original, _HEARD):
        return

    @functools.wraps(original)
    def heard(*args: Any, **kwargs: Any) -> Any:
        listener(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(heard, _HEARD, True)
    setattr(holder, name, heard)
