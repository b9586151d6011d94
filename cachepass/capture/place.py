"""Place: where a captured graph stands in the model that its user calls.

    locate : Dynamo graph, options -> Place, or None: the graph is the whole model

A graph is a part of a model if it ends at a graph break or begins behind one, or if its code is a module inside a call
of the model: a block that is compiled by itself, alone or because the code around it breaks. Its modules are then named
by their paths in the model, and one graph may be called for many of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..options import CompileOptions
from .inputs import find_timestep_input, named_inputs


@dataclass(frozen=True)
class Place:
    """Where a graph stands that is a part of its model.

    Attributes:
        call: Of the model.
        prefix: Path of the captured module.
        siblings: Paths of all modules of its class, for which the graph may be called too.
        root: Path and class name of the captured module, if the graph is all of it, or its end.
        rest: The graph is its end, behind a graph break: what came in front of it is always computed.
        why: It is a part, for messages.
        timestep: Which of the model's inputs is the timestep.
    """

    call: _torch.ModuleCall
    prefix: str
    siblings: tuple[str, ...]
    root: tuple[str, str] | None
    rest: bool
    why: str
    timestep: str | None

    def paths(self) -> dict[int, str]:
        """The model's modules, by id."""
        return {id(module): name for name, module in self.call.module.named_modules()}

    @property
    def inputs(self) -> list[str]:
        """Names of the model's inputs in this call."""
        return list(named_inputs(self.call))


def locate(gm: fx.GraphModule, options: CompileOptions) -> Place | None:
    """Where the graph that Dynamo just captured stands. None: it is the whole model, or nothing is called around it."""
    frame = _torch.current_frame()
    calls, compiled = _torch.calling_modules()
    if frame is None or compiled is None:
        return None  # a function was compiled, and no module is called in it: they were all inlined
    inner = calls[0].module
    whole = not _torch.stops_at_break(gm) and not _torch.is_resumed(frame)
    # Below the hooks of offloading the class's ``forward`` is compiled, of which the module's own has no trace.
    forward = _torch.traced_from() in ("module", "compile") or frame.code in _torch.codes_of(inner.forward)
    step = step_call(calls[compiled:], options.timestep_input)
    if whole and forward and step.module is inner:
        return None
    prefix, siblings = _path(step.module, inner)
    rest = not _torch.stops_at_break(gm) and _is_rest_of(frame, inner)
    root = (prefix, type(inner).__name__) if prefix and ((forward and whole) or rest) else None
    why = "the graph breaks" if root is None or rest else f"{type(inner).__name__} is compiled by itself"
    timestep = find_timestep_input(named_inputs(step), options.timestep_input)
    return Place(step, prefix, siblings, root, rest, why, timestep)


def _is_rest_of(frame: _torch.Frame, module: torch.nn.Module) -> bool:
    """A frame is what follows the last graph break in a module's ``forward``: its outputs are the module's."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    if code is None or not _torch.is_resumed(frame) or frame.code.co_filename != code.co_filename:
        return False
    name, _, line = frame.code.co_name.rpartition("_at_")
    last = max(number for _, _, number in code.co_lines() if number is not None)
    return name.endswith(f"_in_{code.co_name}") and code.co_firstlineno <= int(line) <= last


def _path(model: torch.nn.Module, module: torch.nn.Module) -> tuple[str, tuple[str, ...]]:
    """The path of a module in the model, and the paths of all modules of its class."""
    named = dict(model.named_modules())
    prefix = next((name for name, m in named.items() if m is module), "")
    alike = tuple(name for name, m in named.items() if type(m) is type(module)) if prefix else ("",)
    return prefix, alike


def step_call(calls: Sequence[_torch.ModuleCall], timestep: str | None) -> _torch.ModuleCall:
    """Of nested calls of modules, from the compiled one outwards, the one that is a step: its module is the model.

    It is the innermost call with a timestep, or the one that hands its timestep on to it, if that is a module many
    times as large: a block. (One timestep for each token is told from an embedding of the timestep, which some blocks
    get under the same name, by standing further out.) Without a timestep, it is the outermost call.
    """
    inputs = [named_inputs(call) for call in calls]
    step: tuple[_torch.ModuleCall, Any] | None = None
    for call, named in zip(calls, inputs, strict=True):
        name = find_timestep_input(named, timestep, per_token=False)
        if name is not None and (step is None or (named[name] is step[1] and _is_part(step[0].module, call.module))):
            step = call, named[name]
    if step is not None:
        return step[0]
    for call, named in zip(reversed(calls), reversed(inputs), strict=True):
        if find_timestep_input(named, timestep) is not None:
            return call
    return calls[-1]


def _is_part(module: torch.nn.Module, model: torch.nn.Module) -> bool:
    """A block rather than a model in a wrapper: there are others of its class, or most parameters are elsewhere."""
    alike = sum(type(other) is type(module) for other in model.modules())
    own, whole = (sum(p.numel() for p in m.parameters()) for m in (module, model))
    return alike > 1 or 2 * own < whole
