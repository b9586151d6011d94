"""Registry: the models that are known, and which one a graph belongs to."""

from __future__ import annotations

import threading
import weakref

import torch

from ..capture.place import Place
from ..capture.siblings import Siblings
from ..method import Method
from ..options import CompileOptions
from .model import Model

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


def model_of_part(place: Place, siblings: Siblings, options: CompileOptions) -> Model:
    """The record of the model that a graph is a part of, which learns of the graph's regions. The graph outlives the
    call in which it was captured, so nothing of the call goes into the record.

    Raises:
        ConfigError: The method's settings cut a group in part of a module and wholly in another of its class.
    """
    for prefix in siblings.prefixes:
        siblings.groups(prefix)
    model = model_of(place.call.module, siblings.method, options)
    model.watch(place.call)
    model.found(region for prefix in siblings.prefixes for region in siblings.under(prefix))
    if place.prefix and (place.rest or place.root is None):
        model.broken.update(siblings.prefixes)
    return model
