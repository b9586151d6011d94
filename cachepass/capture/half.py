"""Half batch: the frame that Dynamo is tracing, captured once more on the conditional half of its inputs.

    capture_half : frame of model(hidden_states[2B], ...), input names -> Dynamo graph of model(hidden_states[B], ...)

A step that skips the unconditional branch runs this graph. It is traced from the same code with the same model, so
whatever the model does with its batch - loops over it, takes it as a list - is right in it, its shapes are static, and
a batch of one is a batch of one. Nothing runs: the capture ends where the graph would be called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..errors import BatchError, CachepassError, listing
from ..recipe.guidance import Guidance
from ..recipe.vocabulary import Skip, Target
from .inputs import Arguments, input_name
from .markers import cut_nodes
from .regions import RegionTable

_NAMES = "_unconditional_conditional_input_kwargs_identifiers"
_HINT = (
    "batches of [uncond, cond] samples are halved. Where the model is called once for each, call it in "
    'cachepass.cache_context("cond") and ("uncond"); a guidance-distilled model takes is_guidance_distilled=True. '
    "What is compiled takes the batch as its input: the transformer, not a function that makes the batch for it"
)


def conditional_half(batch: Any, unconditional_first: bool) -> Any:
    """The conditional half of a guidance batch, a tensor or a list of samples; of a tensor a view."""
    half = len(batch) // 2
    return batch[half:] if unconditional_first else batch[:half]


@dataclass(frozen=True)
class HalfCall:
    """How the inputs of the half-batch graph are made of those of the full one.

    Attributes:
        picks: For each input: the index of the full graph's input, and whether its conditional half is taken.
        unconditional_first: The conditional half is the second one.
        names: Of the inputs that are halved.
        pairs: Outputs that come as pairs (uncond, cond) of one sample each; the full graph returns them one by one.
    """

    picks: tuple[tuple[int, bool], ...]
    unconditional_first: bool
    names: tuple[str, ...] = ()
    pairs: tuple[int, ...] = ()

    def inputs(self, full: Sequence[Any]) -> list[Any]:
        first = self.unconditional_first
        return [conditional_half(full[index], first) if halved else full[index] for index, halved in self.picks]

    def outputs(self, values: Sequence[Any]) -> Sequence[Any]:
        """The outputs as the full graph returns them."""
        if not self.pairs:
            return values
        firsts, seconds = ([values[i][k] for i in self.pairs] for k in (0, 1))
        rest = [v for i, v in enumerate(values) if i not in self.pairs]
        return (*firsts, *seconds, *rest)


@dataclass
class _Halving:
    """The arguments of a frame at half batch, and where each halved one came from."""

    batch: int
    main: str
    unconditional_first: bool
    sample_lists: bool
    origin: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # id of half -> (half, full)
    halved: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def take(self, value: Any, name: str, *, strict: bool) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, name, strict)
        if isinstance(value, dict):
            return {k: self.take(v, f"{name}[{k!r}]", strict=False) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            kind = type(value)
            if self.sample_lists and len(value) == self.batch:
                self.halved.append(name)
                return kind(conditional_half(value, self.unconditional_first))
            return kind(self.take(v, f"{name}[{i}]", strict=False) for i, v in enumerate(value))
        return value

    def _tensor(self, value: torch.Tensor, name: str, strict: bool) -> torch.Tensor:
        if value.ndim and value.shape[0] == self.batch:
            half = conditional_half(value, self.unconditional_first)
            self.origin[id(half)] = (half, value)
            self.halved.append(name)
            return half
        if strict and value.ndim and value.shape[0] != 1:
            raise BatchError(
                f"its batch is {_shape(value)}, that of {self.main} is {self.batch}", where=f"input {name}", hint=_HINT
            )
        return value

    def leave(self, value: Any, name: str) -> Any:
        """Not an input that carries the batch: left whole, and remembered if it looks like one."""
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == self.batch:
            self.whole.append(f"{name} ({_shape(value)})")
        return value


def _shape(value: torch.Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"


def halve(frame: _torch.Frame, guidance: Guidance) -> tuple[Arguments, _Halving]:
    """The frame's arguments at half batch.

    Raises:
        BatchError: No argument has one of the names, the batch is odd, or batches differ.
    """
    arguments, inputs = Arguments.of(frame), guidance.inputs
    given = {name: value for name, value in arguments.all if name in inputs and _sized(value)}
    if not given:
        names = [name for name, value in arguments.all if not isinstance(value, torch.nn.Module)]
        raise BatchError(
            "no tensor input of the model carries a guidance batch",
            where=f"{guidance.settings}.{_NAMES}",
            hint=f"known names: {listing(inputs)}; the model's inputs: {listing(names)}",
        )
    main = next((name for name in ("hidden_states", "x", "sample") if name in given), next(iter(given)))
    value = given[main]
    batch = len(value)
    if batch % 2:
        shape = _shape(value) if isinstance(value, torch.Tensor) else f"a list of {batch}"
        raise BatchError(
            f"its batch is odd ({shape}): it cannot hold as many unconditional as conditional samples",
            where=f"input {main}",
            hint=_HINT,
        )
    halving = _Halving(batch, main, guidance.latents.unconditional_first, isinstance(value, (list, tuple)))

    def take(name: str, argument: Any) -> Any:
        if name in inputs:
            return halving.take(argument, name, strict=name in guidance.strict_inputs)
        return halving.leave(argument, name)

    half = Arguments(
        [(n, take(n, v)) for n, v in arguments.positional], [(n, take(n, v)) for n, v in arguments.keyword]
    )
    return half, halving


def _sized(value: Any) -> bool:
    return (isinstance(value, torch.Tensor) and value.ndim > 0) or (isinstance(value, (list, tuple)) and bool(value))


def capture_half(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    guidance: Guidance,
    backend: Callable[[fx.GraphModule, Sequence[Any], HalfCall], None],
) -> None:
    """Hand the half-batch graph of the frame being traced, whose own graph is ``gm``, to ``backend``.

    Raises:
        BatchError: The inputs carry no guidance batch, or the model cannot be traced at half of it.
    """
    frame = _torch.current_frame()
    assert frame is not None, "a backend runs inside Dynamo"
    arguments, halving = halve(frame, guidance)
    first = guidance.latents.unconditional_first

    numbers = _number_inputs(gm, arguments)

    def captured(half: fx.GraphModule, half_inputs: Sequence[Any]) -> None:
        missing = numbers.keys() - _number_inputs(half, arguments).keys()
        for name in missing:  # as a constant of this call it would be wrong in all others
            _torch.restart_dynamic(name, numbers[name])
            raise BatchError(
                "a number that changes from call to call is a constant at half batch",
                where=f"input {name}",
                hint="give it as a tensor",
            )
        picks = _picks(gm, inputs, half, half_inputs, halving)
        backend(half, half_inputs, HalfCall(picks, first, tuple(halving.halved)))

    try:
        _torch.capture(
            frame, [v for _, v in arguments.positional], dict(arguments.keyword), captured, numbers=bool(numbers)
        )
    except CachepassError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        whole = f"; left whole, with the batch's size in front: {listing(halving.whole)}" if halving.whole else ""
        raise BatchError(
            f"the model cannot be traced at half batch: {reason}",
            where="torch.compile",
            hint=f"halved: {listing(halving.halved)}{whole}. The inputs that carry guidance batches are named in "
            f"{guidance.settings}.{_NAMES}",
        ) from error


def _number_inputs(gm: fx.GraphModule, arguments: Arguments) -> dict[str, float]:
    """The Python numbers among the arguments that are inputs of a graph, by name."""
    given = {name: value for name, value in arguments.all if isinstance(value, (int, float))}
    names = {input_name(node) for node in gm.graph.find_nodes(op="placeholder")}
    return {name: value for name, value in given.items() if name in names}


def _picks(
    gm: fx.GraphModule, inputs: Sequence[Any], half: fx.GraphModule, half_inputs: Sequence[Any], halving: _Halving
) -> tuple[tuple[int, bool], ...]:
    """Which input of the full graph each input of the half one is: by the tensor itself, or where it comes from."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    by_tensor = {id(value): i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
    by_source = {_torch.placeholder_source(node): i for i, node in enumerate(placeholders)}
    picks = []
    for node, value in zip(half.graph.find_nodes(op="placeholder"), half_inputs, strict=True):
        _, origin = halving.origin.get(id(value), (None, None))
        index = by_tensor.get(id(value if origin is None else origin))
        if index is None and not halving.sample_lists:  # in lists the same place holds another sample
            index = by_source.get(_torch.placeholder_source(node))
        if index is None or not _fits(value, inputs[index], origin is not None):
            raise BatchError(
                "the half-batch graph has it, the full one has not",
                where=f"input {input_name(node)}",
                hint="compile the transformer itself, called with its inputs as arguments",
            )
        picks.append((index, origin is not None))
    return tuple(picks)


def _fits(half: Any, full: Any, halved: bool) -> bool:
    if not isinstance(half, torch.Tensor):
        return not isinstance(full, torch.Tensor)
    shape = tuple(full.shape)
    return tuple(half.shape) == ((shape[0] // 2, *shape[1:]) if halved else shape)


def common_targets(targets: Sequence[Target], full: RegionTable, half: RegionTable) -> tuple[list[Target], list[Skip]]:
    """The targets whose modules are called equally often, with equally many outputs, at full and at half batch."""

    def calls(table: RegionTable, path: str) -> dict[str, int]:
        return {r.id: len(table.outputs[r.id]) for r in table.regions if r.path == path}

    kept, skips = [], []
    for target in targets:
        path = target.region.path
        if calls(full, path) == calls(half, path):
            kept.append(target)
        else:
            skips.append(Skip(target.region.id, "it is called differently at half batch"))
    return kept, skips


def check_halves(full: fx.Graph, half: fx.Graph) -> None:
    """Every cut has, at half batch, the same shape or half of it in one dimension.

    Raises:
        BatchError: One does not, so what is kept of it at full batch would not fit a half one.
    """
    for whole, part in zip(cut_nodes(full), cut_nodes(half), strict=True):
        assert whole.args[1:] == part.args[1:], "both graphs are cut alike"
        shapes = tuple(whole.meta["val"].shape), tuple(part.meta["val"].shape)
        if shapes[0] != shapes[1] and halved_dimension(*shapes) is None:
            raise BatchError(
                f"its output is {_shape(whole.meta['val'])} at full and {_shape(part.meta['val'])} at half batch",
                where=str(whole.args[1]),
                hint="leave the module out of the config's identifiers",
            )


def halved_dimension(full: Sequence[int | torch.SymInt], half: Sequence[int | torch.SymInt]) -> int | None:
    """The one dimension in which ``full`` is twice ``half``; None if they do not differ so."""
    if len(full) != len(half):
        return None
    differing = [d for d, (a, b) in enumerate(zip(full, half, strict=True)) if a != b]
    return differing[0] if len(differing) == 1 and full[differing[0]] == 2 * half[differing[0]] else None
