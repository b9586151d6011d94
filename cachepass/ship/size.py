"""Size: a call of a model, captured, and described as an archive has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..backend import Built, build
from ..capture.inputs import find_timestep_input
from ..capture.prepare import Prepared, prepare
from ..errors import ExportError
from ..options import CompileOptions
from ..program.phases import Phase
from ..program.trace import Traced
from ..program.variants import Program
from ..recipe.vocabulary import PLAIN
from ..run.step import CurrentCall
from . import manifest as told
from .binding import fixed_in, leaves_of, record, signature_of, sources_of, template_of


@dataclass(frozen=True)
class Called:
    """A call of a model, captured.

    Attributes:
        captured: Its program, and its graph as a callable.
        prepared: What is cut in it.
        current: The call that the program takes itself to be in.
        inputs: What the graph was given.
        results: What it returned: tensors that nobody has written to.
        binding: How it calls its program.
        returned: What the model returned.
        leaves: The arguments of the call.
    """

    captured: Built
    prepared: Prepared
    current: CurrentCall
    inputs: Sequence[Any]
    results: Sequence[Any]
    binding: told.Binding
    returned: Any
    leaves: Mapping[told.Path, Any]

    def described(
        self, module: torch.nn.Module, programs: tuple[told.Shipped, ...]
    ) -> tuple[told.Size, dict[str, torch.Tensor]]:
        """The same for an archive, and the tensors that the model holds and no state dict has."""
        prepared, program = self.prepared, self.captured.program
        sources, constants = sources_of(module, prepared.names, self.inputs, self.leaves)
        numbers = {source.path for source in sources if isinstance(source, told.Argument) and source.number}
        half, layout = program.half, prepared.layout
        size = told.Size(
            inputs=sources,
            fixed=fixed_in(self.leaves, numbers),
            layout=told.Layout(layout.latents, layout.timestep, layout.conditioning, layout.names),
            plan=_plan(program),
            binding=self.binding,
            half=_half(self),
            programs=programs,
            kept=_kept(program, program.full),
            kept_half=None if half is None else _kept(program, half),
            names=_names(program.full),
            names_half=() if half is None else _names(half),
            output=template_of(self.returned, self.results, self.leaves),
            flops=program.flops(Phase(route=PLAIN)),
        )
        return size, constants


def capture_call(
    module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], options: CompileOptions
) -> Called:
    """Capture a call of a model as one graph, and record how its program is called. Nothing runs.

    Raises:
        ExportError: It cannot be taken along; or the cache never fires.
    """
    found: list[dict[str, Any]] = []

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        prepared = prepare(gm, example, options)
        _keep_timestep(prepared, signature_of(module).bind(*args, **kwargs).arguments, options.timestep_input)
        current = CurrentCall()
        captured = build(gm, example, prepared, options, current)

        def run(*inputs: Any) -> Sequence[Any]:
            binding, results = record(captured.run, current, captured.program.full.gm.graph, inputs)
            found.append(
                {
                    "captured": captured,
                    "prepared": prepared,
                    "current": current,
                    "inputs": inputs,
                    "results": results,
                    "binding": binding,
                }
            )
            return results

        return run

    with torch.no_grad():
        returned = _torch.call_traced(module, args, kwargs, backend)
    if not found:
        raise ExportError("the model runs no tensor operation", where="export")
    called = Called(**found[0], returned=returned, leaves=leaves_of(signature_of(module), args, kwargs))
    never = called.prepared.method.never_predicts(options.num_inference_steps)
    if never is not None or not called.captured.program.plan.phases:
        raise ExportError(f"the cache never fires: {never}", where="export, cache")
    return called


def _keep_timestep(prepared: Prepared, arguments: Mapping[str, Any], wanted: str | None) -> None:
    """A timestep that is a number of Python's is an input of the graph, not a constant of it: it is traced again.

    Raises:
        ExportError: It is an int, which would be a size to the compiler.
    """
    name = find_timestep_input(arguments, wanted) if prepared.layout.timestep is None else None
    value = None if name is None else arguments[name]
    if isinstance(value, int):
        raise ExportError("it is an int", where=f"argument {name}", hint="give a tensor, or a float")
    if isinstance(value, float):
        assert name is not None
        _torch.restart_dynamic(name, value)


def _plan(program: Program) -> told.Planned:
    plan = program.plan
    probe = plan.probe
    output = plan.output
    return told.Planned(
        plan.cuts,
        plan.groups,
        None
        if probe is None
        else told.Probed(probe.probe.group, probe.probe.every, probe.probe.parameters, probe.slot, probe.residual),
        None if output is None else told.Guided(output.slots, output.latents, output.halved),
    )


def _half(called: Called) -> told.HalfBinding | None:
    half = called.captured.half
    if half is None:
        return None
    traced = called.captured.program.half
    assert traced is not None
    inputs = half.call.inputs(called.inputs)
    binding, _ = record(half.run, called.current, traced.gm.graph, inputs)
    call = half.call
    return told.HalfBinding(call.picks, call.unconditional_first, call.names, call.pairs, binding)


def _kept(program: Program, traced: Traced) -> told.Kept | None:
    route = next(phase.route for phase in program.plan.phases if program.traced(phase.route) is traced)
    invariants = program.invariants(route)
    if invariants is None:
        return None
    return told.Kept(invariants.slots, invariants.checked, invariants.regions, program.flops_once(route))


def _names(traced: Traced) -> tuple[str, ...]:
    own = traced.gm.graph.find_nodes(op="placeholder")[: len(traced.inputs)]
    return tuple(traced.names.get(str(node.name), str(node.name)) for node in own)
