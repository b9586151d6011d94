"""LoadedModel: an archive as a module that is called like the model that it was made of.

It has the model's weights under the model's names and nothing else of it: ``state_dict``, ``load_state_dict``, ``to``
and the assignment of a parameter work, and the next call runs with what is there. Everything that a call gives is
checked, since a program would read wrong memory for a tensor of a wrong size.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ..run.context import hear, surroundings
from ..run.dispatch import Dispatcher
from ..run.live import reset_around
from .binding import leaves_of
from .calls import Attributes, SizeRun, answer
from .loaded import no_rows, weights_of
from .manifest import Manifest, Size, Weight

_KINDS = inspect._ParameterKind


class LoadedModel(torch.nn.Module):
    """The programs of an archive, with weights. Made by ``cachepass.load``.

    Attributes:
        config: The configuration of the model, as far as it is numbers, names and lists of them.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._manifest = manifest
        self._signature = signature(manifest.sizes[0])
        self.config = Attributes(manifest.attributes)
        for weight in weights_of(manifest.sizes).values():
            _place(self, weight, tensors[weight.name])
        self._sizes: list[SizeRun] = []

    def serve(self, size: Size, dispatcher: Dispatcher) -> None:
        """Calls with inputs of this size go to the dispatcher."""
        self._sizes.append(SizeRun(self, size, dispatcher))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the exported model returns.

        Raises:
            ArchiveError: There is no program for this call: an input has another size, dtype or device than any that
                was exported, or an argument that is no tensor has another value; or a weight was replaced by one of
                another size.
            RowsError: It is called in a block of ``cachepass.rows``.
        """
        if surroundings().rows is not None:
            raise no_rows()
        leaves = leaves_of(self._signature, args, kwargs)
        return answer(self._sizes, leaves)

    @contextlib.contextmanager
    def cache_context(self, name: str, **told: Any) -> Iterator[None]:
        """As of diffusers' models: calls in it are of this context. Pipelines call it, and may tell more of the step
        (``step_index``, ``num_inference_steps``, ``timestep``)."""
        hear(self, SimpleNamespace(name=name, **told))
        try:
            yield
        finally:
            hear(self, None)

    def _reset_stateful_cache(self) -> None:
        """Pipelines of diffusers say so at their end: the run is over."""
        reset_around(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point weight."""
        return next((w.dtype for w in self.parameters() if w.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the first weight lies."""
        return next((w.device for w in self.parameters()), torch.device(self._manifest.built.device))

    def extra_repr(self) -> str:
        built = self._manifest.built
        return f"{built.model}, exported for {built.device} with torch {built.torch}"


def signature(size: Size) -> inspect.Signature:
    """Of the ``forward`` that programs stand for."""
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(one.name, _KINDS(one.kind), default=empty if one.required else one.default)
            for one in size.signature
        ]
    )


def _place(root: torch.nn.Module, weight: Weight, value: torch.Tensor) -> None:
    """Put a weight into the tree of modules, under its name in the model."""
    *path, name = weight.name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    if weight.kind == "parameter":
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(name, value, persistent=weight.kind == "buffer")
