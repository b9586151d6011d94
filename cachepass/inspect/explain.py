"""Before the fact: what caching would do to a model, without running it, and on which GPU it would take how long."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import _torch
from ..backend import build
from ..capture.nodes import copied
from ..capture.prepare import Prepared, prepare
from ..config import parse_cache
from ..errors import CachepassError, ConfigError, OptionError
from ..options import CompileOptions
from ..program.progress import compiling
from ..program.trace import Traced, trace
from ..program.variants import Program
from ..run.live import denoisers_of
from ..run.step import CurrentCall, step_runner
from .findings import Findings
from .summary import Summary

if TYPE_CHECKING:
    from ..gpu.estimate import GpuEstimate
    from ..gpu.table import Gpu


@dataclass(frozen=True)
class Explanation(Findings):
    __doc__ = Findings.__doc__  # the same, for those who read it here

    def as_dict(self) -> dict[str, Any]:
        """What is printed, as plain values: cuts, phases with their operations, what is not cut, bytes, notes; and the
        estimate for a GPU, if the model was explained for one."""
        told = super().as_dict()
        if self.target is not None:
            from .target import as_dict

            told["target"] = as_dict(self, self._calls(None, None, None))
        return told

    def __str__(self) -> str:
        if self.target is None:
            return super().__str__()
        from .target import target_table

        return super().__str__() + "\n" + target_table(self, self._calls(None, None, None))

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
        gpu = None
        if self.target is not None:
            from .target import as_page

            gpu = as_page(self, calls)
        page = render(self, calls, assumed=timesteps is None, ran=ran, gpu=gpu)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page


def explain(
    model: Callable[..., Any],
    *args: Any,
    cache: object,
    options: Mapping[str, Any] | None = None,
    target: str | Gpu | None = None,
    **kwargs: Any,
) -> Explanation:
    """What ``options={"cache": cache}`` would do to ``model(*args, **kwargs)``.

    The model is traced and rewritten exactly as the backend does it; nothing runs. ``options`` may hold
    ``timestep_input``, ``timestep_scale`` and ``num_inference_steps``.

    Args:
        model: The model. It may be without memory (made under ``torch.device("meta")``), and so may its inputs: a model
            that fits into no memory at hand can be explained.
        args: Those of one call of it.
        kwargs: Its keyword arguments.
        cache: As in ``options``.
        options: Those of the backend.
        target: A GPU, which need not be there: every program is compiled for it too, and its launches, memory and time
            are estimated (``Explanation.target``). ``"a100"``, ``"h100"``, ``"l40s"``, ``"rtx4090"``, ``"b200"``, or a
            ``cachepass.Gpu``. Needs the package ``triton``. While it compiles, torch says in the whole process that it
            has this GPU, so nothing else may compile or use a GPU meanwhile.

    Raises:
        CachepassError: As the backend would.
        OptionError: There is no such target, or Triton is not installed.
    """
    found = denoisers_of(model)
    if found is not None:
        raise ConfigError(
            f"a pipeline is no model: {type(model).__name__}",
            where="explain",
            hint=f"explain(pipe.{next(iter(found))}, cache=..., **the keyword arguments of one call of it)",
        )
    gpu = None if target is None else _gpu(target)
    parsed = CompileOptions(cache=parse_cache(cache), lowering="eager", **dict(options or {}))
    result: list[tuple[Explanation, Traced | None]] = []
    original = _with_addresses(getattr(model, "_orig_mod", model))
    args, kwargs = _torch.map_tensors(_with_address, (args, kwargs))
    name = type(original).__name__ if isinstance(original, torch.nn.Module) else getattr(original, "__name__", "")

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        result.append(_explain_graph(gm, inputs, parsed, name, with_plain=gpu is not None))

    call = _torch.fresh_code(original, "cachepass_explain")
    with torch.no_grad():
        if not _torch.trace_only(call, args, kwargs, backend):
            raise CachepassError("the model runs no tensor operation", where="explain")
    explanation, plain = result[0]
    if gpu is None or plain is None:
        return explanation
    return dataclasses.replace(explanation, target=_estimate(gpu, explanation.program, plain, parsed))


def _gpu(target: str | Gpu) -> Gpu:
    from ..gpu.table import gpu_of

    gpu = gpu_of(target)
    if not _torch.has_triton():
        raise OptionError(
            "programs for a GPU are compiled by Triton, which is not installed",
            where="target",
            hint='pip install "cachepass[target]"',
        )
    return gpu


def _with_addresses(model: Any) -> Any:
    """The model with memory that nobody has touched, so that it takes up none, where it has no memory at all."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []
    if not any(tensor.is_meta for tensor in tensors):
        return model
    return copy.deepcopy(model).to_empty(device="cpu")


def _with_address(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, device="cpu") if value.is_meta else value


def _explain_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], options: CompileOptions, model: str, *, with_plain: bool
) -> tuple[Explanation, Traced | None]:
    prepared: Prepared = prepare(gm, inputs, options)
    regions = tuple(prepared.table.regions)
    plain = _plain(gm, inputs, prepared, options) if with_plain else None
    program = build(gm, inputs, prepared, options, CurrentCall()).program  # never called: nothing runs
    never = prepared.method.never_predicts(options.num_inference_steps)
    plan = program.plan
    explanation = Explanation(
        prepared.targets, plan.skips, regions, plan, plan.notes, never, model, prepared.method, options, program
    )
    return explanation, plain


def _plain(gm: fx.GraphModule, inputs: Sequence[Any], prepared: Prepared, options: CompileOptions) -> Traced:
    """The model's ATen graph without caching."""
    untouched = _torch.graph_module(gm, copied(gm.graph))
    return trace(untouched, inputs, prepared.names, prepared.varying, options, step_runner(CurrentCall()))[0]


def _estimate(gpu: Gpu, program: Program, plain: Traced, options: CompileOptions) -> GpuEstimate:
    from ..gpu.estimate import estimate

    with compiling(f"compiling for {gpu.title}", shown=options.progress):
        return estimate(gpu, program, plain)
