"""Instances: the modules that one graph is called for, and where its inputs and the graph itself stand."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _torch
from ..capture.half import HalfCall
from ..capture.place import step_call
from ..capture.siblings import Siblings
from ..method import Method
from ..options import CompileOptions
from ..program.phases import Phase
from ..recipe.vocabulary import Route
from .model import Model
from .registry import model_of


@dataclass(frozen=True)
class HalfRun:
    """The half-batch graph as a callable, and how to call it."""

    run: Callable[..., Any]
    call: HalfCall


@dataclass(eq=False)
class Instance:
    """A module that the graph was captured of or is called for, and its place in a model.

    Attributes:
        groups: Those that may be predicted in it; None: all.
        phases: How often it was called in each phase.
        once: How often what is kept for a run was computed, by route.
        memory: Of its first parameter, where it is known by its parameters.
    """

    model: Model
    module: weakref.ref[torch.nn.Module] | None
    prefix: str = ""
    groups: frozenset[str] | None = None
    phases: dict[Phase, int] = field(default_factory=dict)
    once: dict[Route, int] = field(default_factory=dict)
    memory: _torch.HeldStorage | None = None

    def is_at(self, first: torch.Tensor | None) -> bool:
        """Its first parameter lies where it lay. Another one may have got the id, which is the instance's name."""
        return first is None or self.memory is None or _torch.addresses([first]) == [self.memory.address]

    def count(self, phase: Phase, once: int) -> None:
        self.phases[phase] = self.phases.get(phase, 0) + 1
        if once:
            self.once[phase.route] = self.once.get(phase.route, 0) + once


class Instances(dict[tuple[int, ...], Instance]):
    """The instances that one graph is called for, by the ids of their modules or of all their parameters.

    Ids are given anew when what has them is gone: so must the states be. A module says when it is. A parameter must
    not be weakly referenced (torch could not swap it then), so it is known by its memory.

    Attributes:
        root: The module that was captured; None: a function was.
        siblings: Modules that a graph may be called for which is a part of its model; None: it is the whole model.
        captured_in: The model of the call in which such a part was captured.
    """

    def __init__(
        self,
        method: Method,
        options: CompileOptions,
        identity: Sequence[int],
        root: torch.nn.Module | None,
        siblings: Siblings | None = None,
        captured_in: Model | None = None,
    ) -> None:
        super().__init__()
        self.method, self.options = method, options
        self.root = None if root is None else weakref.ref(root)
        self.siblings, self.captured_in = siblings, captured_in
        self._root_type = None if root is None else type(root)  # the graph may outlive the module it was captured of
        self._identity = identity  # inputs that are parameters
        self._lock = threading.Lock()

    def called(self, inputs: Sequence[Any]) -> Instance:
        """The module that is called: the one whose call this is, or the one with these parameters."""
        if self.siblings is not None:
            return self._called_part(self.siblings)
        called = _torch.calling_module()
        own = (id(called),)
        instance = self.get(own)
        if instance is not None:
            return instance
        # The module is not on the stack: a function was captured. Then all parameters tell.
        key = tuple(id(inputs[i]) for i in self._identity)
        held = inputs[self._identity[0]] if self._identity else None
        instance = self.get(key)
        if instance is None or not instance.is_at(held):
            module = self._holder(held, called)
            model = model_of(module, self.method, self.options)
            # Parameters may have been replaced (offloading does): the module is the same instance as before.
            known = next((i for i in self.values() if module is not None and i.model is model), None)
            instance = known or Instance(model, None if module is None else weakref.ref(module))
            by_module = module is called and module is not None
            instance = self.add(own if by_module else key, instance, module if by_module else held)
        return instance

    def _called_part(self, siblings: Siblings) -> Instance:
        """The module that is called, by the call itself: a part may have no parameters, or share them."""
        module = _torch.calling_module()
        key = (id(module),)
        instance = self.get(key)
        if instance is not None:
            return instance
        calls, compiled = _torch.calling_modules()
        if module is None or compiled is None:
            assert self.captured_in is not None
            instance = Instance(self.captured_in, None, siblings.prefix)
        else:
            begun = step_call(calls[compiled:], self.options.timestep_input)
            model = model_of(begun.module, self.method, self.options)
            model.watch(begun)
            prefix = next((name for name, m in begun.module.named_modules() if m is module), siblings.prefix)
            model.found(siblings.under(prefix))
            instance = Instance(model, weakref.ref(module), prefix, siblings.groups(prefix))
        return self.add(key, instance, module)

    def _holder(self, held: torch.Tensor | None, called: torch.nn.Module | None) -> torch.nn.Module | None:
        """The module that is called: one like the captured one that holds this parameter; None where a function was
        captured and the module is not among its arguments."""
        root = None if self.root is None else self.root()
        if held is None:
            return root
        for module in (called if type(called) is self._root_type else None, root):
            if module is not None and any(held is own for own in (*module.parameters(), *module.buffers())):
                return module
        return None

    def add(self, key: tuple[int, ...], instance: Instance, held: object) -> Instance:
        """``held`` is the module, or the first of the parameters, that the key names."""
        with self._lock:
            for gone in [k for k, known in self.items() if known.memory is not None and known.memory.expired()]:
                del self[gone]
            if isinstance(held, torch.Tensor):
                instance.memory = _torch.HeldStorage(held) if held.layout is torch.strided else None
                self[key] = instance
            instance = self.setdefault(key, instance)
        if isinstance(held, torch.nn.Module):
            instance.memory = None
            weakref.finalize(held, _forget_key, weakref.ref(self), key)
        return instance

    def of(self, model: torch.nn.Module) -> list[Instance]:
        """The instances that are ``model`` or in it."""
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        modules = {id(module) for module in model.modules()}

        def belongs(key: tuple[int, ...], instance: Instance) -> bool:
            module = None if instance.module is None else instance.module()
            if module is not None:
                return id(module) in modules
            return bool(key) and self.siblings is None and set(key) <= own

        return list(dict.fromkeys(i for key, i in self.items() if belongs(key, i)))

    def forget(self, instance: Instance) -> None:
        """An instance is called no more."""
        with self._lock:
            for key in [key for key, known in self.items() if known is instance]:
                del self[key]


def _forget_key(instances: weakref.ref[Instances], key: tuple[int, ...]) -> None:
    holder = instances()
    if holder is not None:
        holder.pop(key, None)
