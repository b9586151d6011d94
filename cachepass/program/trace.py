"""Trace: AOTAutograd's graph of a model, before anything is planned, and what stays the same within a run out of it."""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..capture.inputs import read_inputs
from ..options import CompileOptions, is_declared
from ..recipe.vocabulary import Skip
from .dump import dump
from .fold import Folded, fold, unfold
from .hoist import Hoisted, hoist, invariant_regions
from .kept import LeftOut

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Traced:
    """An ATen graph with markers, AOTAutograd's example inputs, the context to compile it in, and input names.

    ``varying`` are the inputs (by index) that change from step to step, ``declared`` those that the user said do not;
    of the others it is checked. ``parameters`` are the model's own. ``hoisted`` is what was taken out of the graph, to
    be computed once per run.
    """

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    context: _torch.SavedContext
    names: dict[str, str]
    varying: frozenset[int] = frozenset()
    declared: frozenset[int] = frozenset()
    parameters: frozenset[int] = frozenset()
    hoisted: Hoisted | None = None


def trace(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    names: Sequence[str],
    varying: set[str],
    options: CompileOptions,
    runner: Callable[[list[Any]], Any],
) -> tuple[Traced, Callable[..., Any]]:
    """AOTAutograd over an annotated Dynamo graph: its ATen graph, and the callable that AOTAutograd makes around
    ``runner``, which stands in for a compiled graph."""
    traced: list[Traced] = []
    own = read_inputs(gm, inputs).own
    roles = [_Input.of(value, name, varying, options) for value, name in zip(inputs, names, strict=True)]

    def inner(aten: fx.GraphModule, own_inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        context = _torch.save_context(own_inputs, options.inductor, kwargs)
        if folded.bodies:
            unfolded = unfold(aten, folded.bodies)
            if unfolded is None:
                logger.info("calls of blocks are gone from the graph: it is traced again, block by block")
                return runner
            aten = unfolded
        known = [_torch.input_index(node) for node in aten.graph.find_nodes(op="placeholder")]
        found = {
            kind: frozenset(i for i, index in enumerate(known) if index is not None and roles[index] is kind)
            for kind in _Input
        }
        unknown = {i for i, index in enumerate(known) if index is None}
        parameters = frozenset(i for i, index in enumerate(known) if index is not None and index not in own)
        readable = _placeholder_names(aten, names)
        dump("aten", aten.graph, readable)
        traced.append(
            Traced(
                aten,
                tuple(own_inputs),
                context,
                readable,
                found[_Input.VARYING] | unknown,
                found[_Input.DECLARED],
                parameters,
            )
        )
        return runner

    folded = fold(gm) if options.shares else Folded(gm, ())
    run = _torch.compile_once(folded.gm, inputs, inner, options.inductor)
    if not traced:
        folded = Folded(gm, ())
        run = _torch.compile_once(gm, inputs, inner, options.inductor)
    return traced[-1], run


class _Input(enum.Enum):
    """What is known of an input's change within a run."""

    VARYING = enum.auto()
    DECLARED = enum.auto()  # by the user, not to change
    CHECKED = enum.auto()

    @staticmethod
    def of(value: Any, name: str, varying: set[str], options: CompileOptions) -> _Input:
        if any(is_declared(name, given) for given in options.invariant_inputs):
            return _Input.DECLARED
        traceless = isinstance(value, torch.Tensor) and value.is_inference()
        changes = name in varying or any(is_declared(name, given) for given in options.varying_inputs)
        return _Input.VARYING if changes or traceless else _Input.CHECKED


def hoist_alike(traced: Sequence[Traced], budget: int | None) -> tuple[list[Traced], list[Skip], list[str]]:
    """Take what stays the same within a run out of the graphs (of a full and half a batch), which are cut alike. Also
    why regions are not cut, and what is not kept."""
    regions = set.intersection(*(invariant_regions(t.gm.graph, t.varying) for t in traced))
    result, computed = [], set(regions)
    left: dict[str, None] = {}
    for one in traced:
        split = hoist(one.gm, one.varying, one.parameters, regions, budget, one.context.fake_mode)
        dump("hoisted", split.gm.graph, one.names)
        result.append(dataclasses.replace(one, gm=split.gm, hoisted=split.hoisted))
        left.update(dict.fromkeys(LeftOut.told(split.left)))
        if split.left:
            computed &= set(() if split.hoisted is None else split.hoisted.regions)
    for line in left:
        logger.info(line)
    reasons = {
        True: "it stays the same within a run: computed once",
        False: "it stays the same within a run, and is too large to be kept: computed every time",
    }
    return result, [Skip(region, reasons[region in computed]) for region in sorted(regions)], list(left)


def _placeholder_names(aten: fx.GraphModule, names: Sequence[str]) -> dict[str, str]:
    """Readable names for the model's own placeholders in the ATen graph."""
    readable = {}
    for position, node in enumerate(aten.graph.find_nodes(op="placeholder")):
        index = _torch.input_index(node)
        index = position if index is None else index
        readable[node.name] = names[index] if index < len(names) else node.name
    return readable
