"""Lower: a variant's graph becomes a callable, through Inductor or (``lowering="eager"``) as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ._torch import SavedContext
from .graph.rewrite import Role
from .graph.specialize import Variant


@dataclass(frozen=True)
class LoweredVariant:
    """A variant that can run: takes its inputs as one list, the model's own first, then ``inputs`` in order."""

    name: str
    run: Callable[[list[Any]], Any]
    inputs: tuple[Role, ...]
    compile_seconds: float
    nodes: int


def lower(variant: Variant, own_inputs: Sequence[Any], lowering: str, context: SavedContext) -> LoweredVariant:
    """Compile a variant. ``own_inputs`` are the example inputs that AOTAutograd gave for the model's placeholders."""
    start = time.perf_counter()
    nodes = sum(node.op not in ("placeholder", "output") for node in variant.gm.graph.nodes)
    if lowering == "eager":
        run = _eager(variant.gm)
    else:
        placeholders = variant.gm.graph.find_nodes(op="placeholder")
        inputs = [*own_inputs, *(node.meta["val"] for node in placeholders[len(own_inputs) :])]
        run = context.compile(variant.gm, inputs)
    return LoweredVariant(variant.name, run, variant.inputs, time.perf_counter() - start, nodes)


def _eager(gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
    gm.recompile()

    def run(inputs: list[Any]) -> Any:
        with torch.no_grad():
            return gm(*inputs)

    return run
