"""Instances: the modules that one graph is called for, and where its inputs and the graph itself stand."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..graph.half import HalfCall
from ..graph.plan import Phase
from ..methods import Route, Target
from .calls import Model
from .siblings import Siblings


@dataclass(frozen=True)
class InputLayout:
    """Where things stand among the inputs of a Dynamo graph.

    Attributes:
        identity: Indices of the tensors whose identity tells which instance of the model is called.
        latents: Indices of the latents.
        timestep: Index of the timestep input, if there is one.
        static: Shape, dtype and device of the latents, where they are the same in all calls.
        conditioning: Indices of what tells one conditioning from another, and their names.
    """

    identity: tuple[int, ...]
    latents: tuple[int, ...] = ()
    timestep: int | None = None
    static: Hashable = None
    conditioning: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


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
    """

    model: Model
    module: weakref.ref[torch.nn.Module] | None
    prefix: str = ""
    groups: frozenset[str] | None = None
    phases: dict[Phase, int] = field(default_factory=dict)
    once: dict[Route, int] = field(default_factory=dict)

    def count(self, phase: Phase, once: int) -> None:
        self.phases[phase] = self.phases.get(phase, 0) + 1
        if once:
            self.once[phase.route] = self.once.get(phase.route, 0) + once
