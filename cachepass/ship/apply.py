"""Apply: the blocks of a live model run the programs of an archive.

For hosts that have the model's code and weights and no time to compile. The model stays what it is: everything around
its blocks runs as before, and each block's ``forward`` becomes a call of the program for its phase.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ArchiveError
from ..method import Method
from ..run.instance import Instance
from ..run.live import original_of
from ..run.registry import model_of
from .binding import leaves_of
from .calls import SizeRun, answer
from .load import Archive, options_of, programs_in, require_here
from .loaded import LoadedProgram, dispatcher_of
from .manifest import BlockPart, Size
from .model import signature


def apply(model: torch.nn.Module, path: str | Path) -> torch.nn.Module:
    """Let the blocks of a model run the programs of an archive, which ``cachepass.export(..., blocks=True)`` made of
    one like it.

    Everything that holds for a compiled model holds for it: ``cache_context``, ``reset``, ``summary``. Weights are the
    model's own, and may be replaced. To undo it, delete the attribute ``forward`` of its blocks.

    Args:
        model: With its weights, on the device that the archive was made for.
        path: The archive.

    Returns:
        The model.

    Raises:
        ArchiveError: As ``cachepass.load``; or the model has other blocks than the exported one. Nothing is changed
            then.
    """
    archive = Archive(path)
    parts = [(size, size.part) for size in archive.manifest.sizes if size.part is not None]
    if not parts:
        raise ArchiveError("it holds programs of a whole model", where=str(path), hint="cachepass.load(path, weights)")
    module = original_of(model)
    if not isinstance(module, torch.nn.Module):
        raise ArchiveError(f"expected a module, got {type(model).__name__}", where="apply")
    require_here(archive.manifest.built, str(path))
    options = options_of(archive)
    method = Method(archive.config, options.num_inference_steps)
    record = model_of(module, method, options)
    programs = programs_in(archive)
    runs: dict[str, list[SizeRun]] = {}
    for size, part in parts:
        blocks = {place: _block(module, place, part) for place, _ in part.places}
        dispatcher = dispatcher_of(size, LoadedProgram(size, programs, method), method, options, record)
        for place, groups in part.places:
            block = blocks[place]
            run = SizeRun(block, size, dispatcher)
            run.require_weights()
            runs.setdefault(place, []).append(run)
            instance = Instance(record, weakref.ref(block), place, frozenset(groups))
            dispatcher.instances.add((id(block),), instance, block)
    record.attach()
    sizes = {place: size for size, part in parts for place, _ in part.places}
    for place, own in runs.items():
        module.get_submodule(place).forward = _forward(place, sizes[place], own)
    return model


def _block(module: torch.nn.Module, place: str, part: BlockPart) -> torch.nn.Module:
    try:
        block = module.get_submodule(place)
    except AttributeError:
        block = None
    if type(block).__name__ != part.class_name:
        found = "none" if block is None else f"a {type(block).__name__}"
        raise ArchiveError(
            f"expected a {part.class_name}, and there is {found}",
            where=f"apply, {place}",
            hint="the archive is of a model with other blocks",
        )
    assert block is not None
    return block


def _forward(place: str, size: Size, runs: Sequence[SizeRun]) -> Callable[..., Any]:
    own = signature(size)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer(runs, leaves_of(own, args, kwargs), f"{place}, ")

    return forward
