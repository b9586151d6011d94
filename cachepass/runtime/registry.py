"""Registry: the models that are known, and which one a graph belongs to."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .. import _torch
from ..graph.inputs import find_timestep_input, named_inputs
from ..methods import Method
from ..options import CompileOptions
from .calls import Model

_models: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakSet[Model]] = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()


def model_of(module: torch.nn.Module | None, method: Method, options: CompileOptions) -> Model:
    """The record of a module under these options: one for all graphs that are captured of it. None: a new one."""
    if module is None:
        return Model(None, method, options)
    with _registry_lock:
        records = _models.setdefault(module, weakref.WeakSet())
        for record in records:
            if record.options == options:
                return record
        record = Model(module, method, options)
        records.add(record)
        return record


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
