"""Before the fact: what caching would do to a model, without compiling a kernel and without running it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..backend import build
from ..capture.prepare import Prepared, prepare
from ..config import parse_cache
from ..errors import CachepassError, ConfigError
from ..options import CompileOptions
from ..run.live import denoisers_of
from ..run.step import CurrentCall
from .findings import Findings
from .summary import Summary


@dataclass(frozen=True)
class Explanation(Findings):
    __doc__ = Findings.__doc__  # the same, for those who read it here

    def to_html(
        self,
        path: str | Path | None = None,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        contexts: Sequence[str] | None = None,
        ran: Summary | None = None,
    ) -> str:
        """All of this as one HTML page that needs no network; written to ``path`` if that is given.

        The arguments are those of ``timeline``; ``ran`` is what the compiled model did, ``cachepass.summary(model)``:
        of a method that decides in the run, only that says how much was saved.
        """
        from .report.page import render  # only here: who wants no page need not load the template engine

        calls = self._calls(num_inference_steps, timesteps, contexts)
        page = render(self, calls, assumed=timesteps is None, ran=ran)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page


def explain(
    model: Callable[..., Any], *args: Any, cache: object, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """What ``options={"cache": cache}`` would do to ``model(*args, **kwargs)``.

    The model is traced and rewritten exactly as the backend does it; nothing is lowered and nothing runs. ``options``
    may hold ``timestep_input``, ``timestep_scale`` and ``num_inference_steps``.

    Raises:
        CachepassError: As the backend would.
    """
    found = denoisers_of(model)
    if found is not None:
        raise ConfigError(
            f"a pipeline is no model: {type(model).__name__}",
            where="explain",
            hint=f"explain(pipe.{next(iter(found))}, cache=..., **the keyword arguments of one call of it)",
        )
    parsed = CompileOptions(cache=parse_cache(cache), lowering="eager", **dict(options or {}))
    result: list[Explanation] = []
    original = getattr(model, "_orig_mod", model)
    name = type(original).__name__ if isinstance(original, torch.nn.Module) else getattr(original, "__name__", "")

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        result.append(_explain_graph(gm, inputs, parsed, name))

    call = _fresh_code(original)
    with torch.no_grad():
        if not _torch.trace_only(call, args, kwargs, backend):
            raise CachepassError("the model runs no tensor operation", where="explain")
    return result[0]


def _fresh_code(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same function over a code object of its own: Dynamo's caches are per code object, so none is touched."""
    method = model.forward if isinstance(model, torch.nn.Module) else model
    function = getattr(method, "__func__", method)
    if not isinstance(function, types.FunctionType):
        return lambda *args, **kwargs: model(*args, **kwargs)
    fresh = types.FunctionType(
        function.__code__.replace(co_name="cachepass_explain"),
        function.__globals__,
        "cachepass_explain",
        function.__defaults__,
        function.__closure__,
    )
    fresh.__kwdefaults__ = function.__kwdefaults__
    owner = getattr(method, "__self__", None)
    return fresh if owner is None else types.MethodType(fresh, owner)


def _explain_graph(gm: fx.GraphModule, inputs: Sequence[Any], options: CompileOptions, model: str) -> Explanation:
    prepared: Prepared = prepare(gm, inputs, options)
    regions = tuple(prepared.table.regions)
    program = build(gm, inputs, prepared, options, CurrentCall()).program  # never called: nothing runs
    never = prepared.method.never_predicts(options.num_inference_steps)
    plan = program.plan
    return Explanation(
        prepared.targets, plan.skips, regions, plan, plan.notes, never, model, prepared.method, options, program
    )
