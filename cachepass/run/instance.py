"""Instances: the modules that one graph is called for, and where its inputs and the graph itself stand."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _torch
from ..capture.half import HalfCall
from ..capture.siblings import Siblings
from ..program.plan import Phase
from ..recipe.vocabulary import Route, Target
from .model import Model


@dataclass(frozen=True)
class HalfRun:
    """The half-batch graph as a callable, and how to call it."""

    run: Callable[..., Any]
    call: HalfCall


@dataclass(frozen=True)
class Part:
    """A graph that is a part of its model: captured behind or in front of a graph break, or of one block.

    Attributes:
        model: Of the call in which it was captured.
        siblings: The modules that it may be called for.
        targets: What is cut in it.
    """

    model: Model
    siblings: Siblings
    targets: tuple[Target, ...]


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
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

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

    def forget(self, instance: Instance) -> None:
        """It is called no more."""
        with self._lock:
            for key in [key for key, known in self.items() if known is instance]:
                del self[key]


def _forget_key(instances: weakref.ref[Instances], key: tuple[int, ...]) -> None:
    holder = instances()
    if holder is not None:
        holder.pop(key, None)
