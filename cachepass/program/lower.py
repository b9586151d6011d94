"""Lower: a variant's graph becomes a callable, through Inductor or (``lowering="eager"``) as it is."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from .._torch import SavedContext
from ..capture.nodes import copied
from .adopt import Adoption, adopt
from .adopting import adopting
from .emit import EMITTED
from .runnable import PARTS, LoweredVariant
from .share import Shared, share
from .sizes import SymbolBinder
from .specialize import Variant

_MANY_UNREAD = 64
_MOVING = (*PARTS[1], *PARTS[5])  # another tensor at every call


def lower(
    variant: Variant, own_inputs: Sequence[Any], lowering: str, context: SavedContext, *, shares: bool
) -> LoweredVariant:
    """Compile a variant. ``own_inputs`` are the example inputs that AOTAutograd gave for the model's placeholders;
    ``shares``: blocks that are the same are compiled once."""
    start = time.perf_counter()
    shared: tuple[Shared, ...] = ()
    nodes = sum(node.op not in ("placeholder", "output") for node in variant.gm.graph.nodes)
    if lowering == "eager":
        run = as_it_is(variant.gm)
    else:
        ready = make_ready(variant, own_inputs, shares=shares, adopts=not context.cudagraphs)
        shared = ready.shared
        run = ready.lower(context, cudagraphs=variant.repeated)
        run = adopting(run, ready.adopting) if ready.adopting else run
    return LoweredVariant.of(
        variant.name, run, variant.inputs, variant.kept, time.perf_counter() - start, nodes=nodes, shared=shared
    )


@dataclass(frozen=True)
class Ready:
    """A variant's graph as Inductor takes it.

    Attributes:
        gm: The graph, with calls of what is shared.
        inputs: Of the variant, as (fake) tensors and numbers; behind them ``numbers``.
        static: Indices of those that stay where they are.
        read: Indices of those that the graph has, None: all of them.
        numbers: Inputs that are no inputs of the variant: numbers that only running it tells.
        shared: What it calls several times.
        adopting: Indices of slots among the inputs that take over its last results.
    """

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    static: tuple[int, ...]
    read: tuple[int, ...] | None
    numbers: tuple[torch.SymInt, ...]
    shared: tuple[Shared, ...]
    adopting: tuple[int, ...]

    def compile(self, context: SavedContext, *, cudagraphs: bool) -> Callable[[list[Any]], Any]:
        """Through Inductor; the result takes those of the inputs that are read, and the numbers."""
        given = [*self.inputs, *self.numbers]
        return context.compile(self.gm, given, self.static, read=self.read, cudagraphs=cudagraphs)

    def lower(self, context: SavedContext, *, cudagraphs: bool) -> Callable[[list[Any]], Any]:
        """The same, which takes all inputs of the variant."""
        with no_advice_on_complex_numbers(self.gm):
            compiled = self.compile(context, cudagraphs=cudagraphs)
        compiled = compiled if self.read is None else _picking(compiled, self.read)
        return _giving_numbers(compiled, self.inputs, self.numbers) if self.numbers else compiled


def make_ready(variant: Variant, own_inputs: Sequence[Any], *, shares: bool, adopts: bool) -> Ready:
    """The graph of a variant as it is given to Inductor. ``adopts``: slots may take over the memory of values; the
    other arguments are those of ``lower``."""
    placeholders = variant.gm.graph.find_nodes(op="placeholder")
    inputs = (*own_inputs, *(node.meta["val"] for node in placeholders[len(own_inputs) :]))
    # Slots stay where they are: a CUDA graph reads and writes them in place, and may write to nothing else.
    static = [
        i
        for i, role in enumerate(variant.inputs, len(own_inputs))
        if not isinstance(role, _MOVING) and not _torch.depends_on_data(inputs[i])
    ]
    adoption = adopt(variant.gm, variant.inputs, len(own_inputs)) if adopts else Adoption(variant.gm, ())
    return ready_of(adoption, inputs, static, is_own=adoption.gm is not variant.gm, shares=shares)


def ready_of(adoption: Adoption, inputs: Sequence[Any], static: Sequence[int], *, is_own: bool, shares: bool) -> Ready:
    """A graph as it is given to Inductor, on inputs of which ``static`` stay where they are. ``is_own``: the graph may
    be changed."""
    given = adoption.gm
    gm, numbers = _given_numbers(given)
    gm, shared = share(gm) if shares else (gm, ())
    gm, read = _without_unread(gm, is_own=is_own or gm is not given, few=bool(adoption.slots))
    read = None if read is None else tuple(read)
    return Ready(gm, tuple(inputs), tuple(static), read, tuple(numbers), shared, adoption.slots)


def _given_numbers(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[torch.SymInt]]:
    """The graph with the numbers as inputs, behind all others, that sizes of its inputs are made of and that only
    running it tells: Inductor must know them where it begins. Also what they are."""
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    made = {symbol: size for size in sizes if isinstance(size, torch.SymInt) for symbol in _torch.data_symbols(size)}
    if not made:
        return gm, []
    graph = copied(gm.graph)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    numbers = [_torch.number_of(symbol, size) for symbol, size in made.items()]
    with graph.inserting_after(last):
        for number in reversed(numbers):
            graph.placeholder(f"number_{number}").meta["val"] = number
    return _torch.graph_module(gm, graph), numbers


def _without_unread(gm: fx.GraphModule, *, is_own: bool, few: bool) -> tuple[fx.GraphModule, list[int] | None]:
    """The graph without the inputs that nothing in it reads, and the indices of the others. Each costs compile time, so
    this is worth a list of them at every call where they are many; else None, and the graph as it is. ``is_own``: the
    graph may be changed; ``few``: also where they are few. Inputs that sizes are told by are read."""
    given = gm.graph.find_nodes(op="placeholder")
    read = [i for i, node in enumerate(given) if node.users or not _has_fixed_sizes(node.meta.get("val"))]
    if len(given) - len(read) < _MANY_UNREAD and not few:
        return gm, None
    graph = gm.graph if is_own else copied(gm.graph)
    kept = set(read)
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        if i not in kept:
            graph.erase_node(node)
    return _torch.graph_module(gm, graph), read


def _has_fixed_sizes(value: object) -> bool:
    return isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in (*value.shape, *value.stride()))


def _picking(run: Callable[[list[Any]], Any], read: Sequence[int]) -> Callable[[list[Any]], Any]:
    """Give some of the inputs, and let go of the others."""

    def run_with_some(given: list[Any]) -> Any:
        some = [given[i] for i in read]
        given.clear()
        return run(some)

    return run_with_some


def _giving_numbers(
    run: Callable[[list[Any]], Any], inputs: Sequence[Any], numbers: Sequence[torch.SymInt]
) -> Callable[[list[Any]], Any]:
    """Read the numbers from the sizes of the other inputs."""
    binder = SymbolBinder.of(inputs, numbers)

    def run_with_numbers(given: list[Any]) -> Any:
        resolve = binder.resolver(given)
        given.extend([resolve(number) for number in numbers])
        return run(given)

    return run_with_numbers


@contextlib.contextmanager
def no_advice_on_complex_numbers(gm: fx.GraphModule) -> Iterator[None]:
    """Inductor warns of complex numbers, which it leaves to eager kernels. Where the only ones are those of the Fourier
    transform that a full step takes of the model's small output, that says nothing of the model."""
    values = ((node.name, node.meta.get("val")) for node in gm.graph.nodes)
    complex_nodes = [name for name, value in values if isinstance(value, torch.Tensor) and value.is_complex()]
    with warnings.catch_warnings():
        if complex_nodes and all(name.startswith(EMITTED) for name in complex_nodes):
            warnings.filterwarnings("ignore", message=".*complex operators")
        yield


def as_it_is(gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """A graph that runs uncompiled."""

    def run(inputs: list[Any]) -> Any:
        with torch.no_grad():
            return gm(*inputs)

    return run
