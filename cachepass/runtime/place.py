"""Place: where a captured graph stands in the model that its user calls.

    locate : Dynamo graph, options -> Place, or None: the graph is the whole model

A graph is a part of a model if it ends at a graph break or begins behind one, or if its code is a module inside a call
of the model: a block that is compiled by itself, alone or because the code around it breaks. Its modules are then named
by their paths in the model, and one graph may be called for many of them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .. import _torch
from ..errors import ConfigError
from ..graph.inputs import find_timestep_input, named_inputs
from ..graph.regions import RegionTable
from ..methods import Method, Region, Selection, Target
from ..options import CompileOptions
from .calls import model_of, step_call
from .instance import Part


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
        options: As the user gave them.
    """

    call: _torch.ModuleCall
    prefix: str
    siblings: tuple[str, ...]
    root: tuple[str, str] | None
    rest: bool
    why: str
    options: CompileOptions

    @property
    def paths(self) -> dict[int, str]:
        """The model's modules, by id."""
        return {id(module): name for name, module in self.call.module.named_modules()}

    @property
    def inputs(self) -> list[str]:
        """Names of the model's inputs in this call."""
        return list(named_inputs(self.call))

    @property
    def timestep(self) -> str | None:
        """Which of them is the timestep."""
        return find_timestep_input(named_inputs(self.call), self.options.timestep_input)

    def select(self, method: Method, regions: Sequence[Region]) -> Selection:
        """What the method chooses for any of the modules that the graph may be called for."""
        chosen: dict[str, Target] = {}
        first = self._select(method, regions, self.prefix)
        for prefix in self.siblings:
            for target in self._select(method, regions, prefix).targets:
                known = chosen.setdefault(target.region.id, target)
                if known != target:
                    raise ConfigError(
                        f"{known.region.path} and the same module of {prefix} differ in group or forecast",
                        where=type(method.config).__name__,
                        hint="blocks that share one compiled graph are cut alike; compile the whole model instead",
                    )
        return dataclasses.replace(first, targets=tuple(chosen.values()))

    def _select(self, method: Method, regions: Sequence[Region], prefix: str) -> Selection:
        """The method's choice among the regions as they are called under another prefix, told by their own names."""
        paths = list(self.paths.values())
        own = {self._moved(region.id, prefix): region for region in regions}
        selection = method.select(self.regions(regions, prefix), paths)
        targets = [dataclasses.replace(target, region=own[target.region.id]) for target in selection.targets]
        return dataclasses.replace(selection, targets=tuple(targets))

    def regions(self, regions: Sequence[Region], prefix: str) -> list[Region]:
        """The regions as they are called under another prefix."""
        return [dataclasses.replace(region, id=self._moved(region.id, prefix), path=self._moved(region.path, prefix))
                for region in regions]  # fmt: skip

    def _moved(self, name: str, prefix: str) -> str:
        inside = name == self.prefix or name.startswith((f"{self.prefix}.", f"{self.prefix}@"))
        return prefix + name[len(self.prefix) :] if self.prefix and inside else name

    def part(self, method: Method, table: RegionTable, targets: Sequence[Target]) -> Part:
        """What the dispatcher needs to know of it.

        Raises:
            ConfigError: The method's settings cut a group in part of a module and wholly in another of its class.
        """
        wanted: dict[str, set[str]] = {}
        for target in targets:
            wanted.setdefault(target.group, set()).add(target.region.id)

        def groups(prefix: str) -> frozenset[str]:
            chosen = {target.region.id for target in self._select(method, table.regions, prefix).targets}
            for regions in wanted.values():
                if chosen & regions and not regions <= chosen:
                    missing = ", ".join(sorted(self._moved(region, prefix) for region in regions - chosen))
                    raise ConfigError(
                        f"{prefix} is cut in some of the modules that are cut in others of its class (not in "
                        f"{missing}), and they share one compiled graph", where=type(method.config).__name__,
                        hint="write identifiers that take the same modules of every block, or whole blocks out; or "
                             "compile the whole model",
                    )  # fmt: skip
            return frozenset(group for group, regions in wanted.items() if regions <= chosen)

        for prefix in self.siblings:
            groups(prefix)
        model = model_of(self.call.module, method, self.options)
        model.watch(self.call)
        if self.prefix and (self.rest or self.root is None):
            model.broken.update(self.siblings)
        return Part(model, self.prefix, groups, lambda prefix: self.regions(table.regions, prefix))


def locate(gm: fx.GraphModule, options: CompileOptions) -> Place | None:
    """Where the graph that Dynamo just captured stands. None: it is the whole model, or nothing is called around it."""
    frame = _torch.current_frame()
    calls, compiled = _torch.calling_modules()
    if frame is None or compiled is None:
        return None  # a function was compiled, and no module is called in it: they were all inlined
    inner = calls[0].module
    whole = not _torch.stops_at_break(gm) and not _torch.is_resumed(frame)
    forward = _torch.traced_from() == "module" or getattr(inspect.unwrap(inner.forward), "__code__", None) is frame.code
    step = step_call(calls[compiled:], options.timestep_input)
    if whole and forward and step.module is inner:
        return None
    prefix, siblings = _path(step.module, inner)
    rest = not _torch.stops_at_break(gm) and _is_rest_of(frame, inner)
    root = (prefix, type(inner).__name__) if prefix and ((forward and whole) or rest) else None
    why = "the graph breaks" if root is None or rest else f"{type(inner).__name__} is compiled by itself"
    return Place(step, prefix, siblings, root, rest, why, options)


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
