"""Size: a call of a model, captured, and described as an archive has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..backend import build, compile_cached
from ..capture.inputs import InputLayout, find_timestep_input, read_inputs
from ..capture.numbers import keep_numbers
from ..capture.prepare import prepare
from ..capture.siblings import Siblings
from ..errors import ExportError, listing
from ..options import CompileOptions
from ..program.phases import Phase
from ..program.trace import Traced
from ..program.variants import Program
from ..recipe.vocabulary import PLAIN
from ..run.instance import HalfRun
from ..run.step import CurrentCall
from . import manifest as told
from .binding import fixed_in, leaves_of, parameters_of, record, signature_of, sources_of, template_of


@dataclass(frozen=True)
class Called:
    """A call of a model, captured.

    Attributes:
        program: Its program.
        half: Its half-batch graph as a callable, if it has one.
        names, layout: Of the graph's inputs.
        current: The call that the program takes itself to be in.
        inputs: What the graph was given.
        results: What it returned: tensors that nobody has written to.
        binding: How it calls its program.
        returned: What the model returned.
        leaves: The arguments of the call.
    """

    program: Program
    half: HalfRun | None
    names: Sequence[str]
    layout: InputLayout
    current: CurrentCall
    inputs: Sequence[Any]
    results: Sequence[Any]
    binding: told.Binding
    returned: Any
    leaves: Mapping[told.Path, Any]

    def described(
        self, module: torch.nn.Module, programs: tuple[told.Shipped, ...], part: told.BlockPart | None = None
    ) -> tuple[told.Size, dict[str, torch.Tensor]]:
        """The same for an archive, and the tensors that the model holds and no state dict has."""
        program, layout = self.program, self.layout
        sources, constants = sources_of(module, self.names, self.inputs, self.leaves)
        numbers = {source.path for source in sources if isinstance(source, told.Argument) and source.number}
        half = program.half
        size = told.Size(
            signature=parameters_of(module),
            part=part,
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
    found: list[_Traced] = []
    _refuse_int(signature_of(module).bind(*args, **kwargs).arguments, options.timestep_input)

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        prepared = prepare(gm, example, options)
        never = prepared.method.never_predicts(options.num_inference_steps)
        if never is not None:
            raise ExportError(f"the cache never fires: {never}", where="export, cache")
        current = CurrentCall()
        built = build(gm, example, prepared, options, current)
        found.append(_Traced(built.program, built.run, built.half, prepared.names, prepared.layout, current))
        return found[-1].run_recorded

    with torch.no_grad():
        returned = _torch.call_traced(module, args, kwargs, backend)
    if not found:
        raise ExportError("the model runs no tensor operation", where="export")
    return found[-1].called(returned, leaves_of(signature_of(module), args, kwargs))


@dataclass
class _Traced:
    """A graph with its program, and the call of it that was recorded."""

    program: Program
    run: Callable[..., Any]
    half: HalfRun | None
    names: Sequence[str]
    layout: InputLayout
    current: CurrentCall
    recorded: tuple[told.Binding, Sequence[Any], Sequence[Any]] | None = None

    def run_recorded(self, *inputs: Any) -> Sequence[Any]:
        """Stands in for the graph in the first call of it, and in all others."""
        binding, results = record(self.run, self.current, self.program.full.gm.graph, inputs)
        self.recorded = self.recorded or (binding, inputs, results)
        return results

    def called(self, returned: Any, leaves: Mapping[told.Path, Any]) -> Called:
        assert self.recorded is not None
        binding, inputs, results = self.recorded
        return Called(
            self.program, self.half, self.names, self.layout, self.current, inputs, results, binding, returned, leaves
        )


def repeated_blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The blocks that are worth programs of their own, by path: those whose classes diffusers' models name for it, or
    the entries of lists of modules.

    Raises:
        ExportError: There are none.
    """
    named = set(getattr(model, "_repeated_blocks", None) or ())
    found: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        is_entry = isinstance(module, torch.nn.ModuleList) and not named
        entries = module.named_children() if is_entry else ()
        if type(module).__name__ in named:
            found[path] = module
        found |= {f"{path}.{name}": entry for name, entry in entries if any(True for _ in entry.parameters())}
    outer = {path: block for path, block in found.items() if not any(path.startswith(f"{o}.") for o in found)}
    if not outer:
        raise ExportError("the model has no list of blocks", where="export, blocks")
    return outer


def capture_blocks(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: CompileOptions
) -> list[tuple[Called, torch.nn.Module, told.BlockPart]]:
    """Capture the blocks of a model in a call of it, as ``compile_repeated_blocks`` does: once for each class, and for
    each way in which blocks of a class are called. Blocks in which nothing is cached are left out.

    Raises:
        ExportError: Nothing is cached in any of them; or one cannot be taken along.
    """
    blocks = repeated_blocks(model)
    options = dataclasses.replace(options, lowering="eager")  # of what is not cached, nothing is compiled
    traced: list[tuple[_Traced, Siblings]] = []
    found: list[tuple[Called, torch.nn.Module, told.BlockPart]] = []

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        names = read_inputs(keep_numbers(gm), example).names
        dispatcher = compile_cached(gm, example, options)
        siblings, program, run = dispatcher.instances.siblings, dispatcher.program, dispatcher.compiled
        if siblings is None or not isinstance(program, Program) or run is None:
            return dispatcher.compiled or dispatcher
        one = _Traced(program, run, dispatcher.half, names, dispatcher.layout, dispatcher.current)
        traced.append((one, siblings))
        return one.run_recorded

    def note(block: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any], returned: Any) -> None:
        if len(traced) == len(found):
            return
        leaves = leaves_of(signature_of(block), given, named)
        for one, siblings in traced[len(found) :]:
            places = tuple((path, tuple(sorted(siblings.groups(path)))) for path in siblings.prefixes)
            part = told.BlockPart(type(block).__name__, siblings.prefix, places)
            found.append((one.called(returned, leaves), block, part))

    with torch.no_grad(), _torch.parts_traced(blocks.values(), backend, note):
        model(*args, **kwargs)
    if not found:
        raise ExportError("nothing is cached in any block", where="export, blocks", hint=f"blocks: {listing(blocks)}")
    return found


def _refuse_int(arguments: Mapping[str, Any], wanted: str | None) -> None:
    """Raise an ExportError for a timestep that is an int, which is a size to the compiler."""
    name = find_timestep_input(arguments, wanted)
    if name is not None and isinstance(arguments[name], int):
        raise ExportError("it is an int", where=f"argument {name}", hint="give a tensor, or a float")


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
    half = called.half
    if half is None:
        return None
    traced = called.program.half
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
