"""Place: where a captured graph stands in the model that its user calls.

    locate : Dynamo graph, options -> Place, or None: the graph is the whole model

A graph is a part of a model if it ends at a graph break or begins behind one, or if its code is a module inside a call
of the model: a block that is compiled by itself, alone or because the code around it breaks. Its modules are then named
by their paths in the model, and one graph may be called for many of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..graph.inputs import find_timestep_input, named_inputs
from ..methods import Target
from ..options import CompileOptions
from .instance import Part
from .registry import model_of, step_call
from .siblings import Siblings


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

    def part(self, siblings: Siblings, targets: Sequence[Target], options: CompileOptions) -> Part:
        """What the dispatcher needs to know of it. It outlives this call, so nothing of the call goes into it.

        Raises:
            ConfigError: The method's settings cut a group in part of a module and wholly in another of its class.
        """
        for prefix in siblings.prefixes:
            siblings.groups(prefix, targets)
        model = model_of(self.call.module, siblings.method, options)
        model.watch(self.call)
        model.found(region for prefix in siblings.prefixes for region in siblings.under(prefix))
        if self.prefix and (self.rest or self.root is None):
            model.broken.update(siblings.prefixes)
        return Part(model, siblings, tuple(targets))


def locate(gm: fx.GraphModule, options: CompileOptions) -> Place | None:
    """Where the graph that Dynamo just captured stands. None: it is the whole model, or nothing is called around it."""
    frame = _torch.current_frame()
    calls, compiled = _torch.calling_modules()
    if frame is None or compiled is None:
        return None  # a function was compiled, and no module is called in it: they were all inlined
    inner = calls[0].module
    whole = not _torch.stops_at_break(gm) and not _torch.is_resumed(frame)
    forward = _torch.traced_from() == "module" or frame.code in _codes(inner.forward)
    step = step_call(calls[compiled:], options.timestep_input)
    if whole and forward and step.module is inner:
        return None
    prefix, siblings = _path(step.module, inner)
    rest = not _torch.stops_at_break(gm) and _is_rest_of(frame, inner)
    root = (prefix, type(inner).__name__) if prefix and ((forward and whole) or rest) else None
    why = "the graph breaks" if root is None or rest else f"{type(inner).__name__} is compiled by itself"
    timestep = find_timestep_input(named_inputs(step), options.timestep_input)
    return Place(step, prefix, siblings, root, rest, why, timestep)


def _codes(function: Callable[..., Any] | None) -> list[object]:
    """The code of a function, and of all that it wraps."""
    found: list[object] = []
    while function is not None:
        found.append(getattr(function, "__code__", None))
        function = getattr(function, "__wrapped__", None)
    return found


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
