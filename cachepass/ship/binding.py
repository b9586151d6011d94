"""Binding: where the inputs of a captured model come from, and what becomes of its results.

    record   a call of the model, its captured graph as a callable -> Binding, Template

Nothing runs: what stands in for the graph's program writes down what it is given, and returns tensors that nobody has
written to. By identity is found which of a call's tensors, parameters or constants each of them is, and where the
tensors that it returned end up in what the model returns.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..capture.nodes import returned_by
from ..errors import ExportError
from ..run.step import CurrentCall
from .manifest import (
    Argument,
    Binding,
    Constant,
    Fields,
    Form,
    Given,
    Items,
    Parameter,
    Path,
    Result,
    Template,
    Weight,
    dotted,
)

_PLAIN = (bool, int, float, str, type(None))


class Recorder:
    """Stands in for a call of a program (``run.step.StepCall``)."""

    def __init__(self, graph: fx.Graph) -> None:
        self._values = [node.meta["val"] for node in returned_by(graph) if isinstance(node, fx.Node)]
        self.given: list[Any] = []
        self.returned: list[torch.Tensor] = []

    def run(self, inputs: list[Any]) -> list[torch.Tensor]:
        self.given = list(inputs)
        self.returned = [
            torch.empty_strided(tuple(v.shape), v.stride(), dtype=v.dtype, device=v.device) for v in self._values
        ]
        return list(self.returned)


def record(
    run: Callable[..., Any], current: CurrentCall, graph: fx.Graph, inputs: Sequence[Any]
) -> tuple[Binding, Sequence[Any]]:
    """How a graph's callable calls its program, and what it returns in a call with ``inputs``.

    Raises:
        ExportError: The program is given something else than the graph's inputs, or its results are changed.
    """
    recorder: Any = Recorder(graph)
    current.call = recorder
    try:
        results = run(*inputs)
    finally:
        current.call = None
    known = {id(value): i for i, value in enumerate(inputs)}
    taken = [known.get(id(value)) for value in recorder.given]
    if None in taken:
        value = recorder.given[taken.index(None)]
        raise ExportError(
            f"an input of the compiled program is made of another one ({type(value).__name__})",
            where="export",
            hint="weights of a class of their own, such as quantized ones, cannot be exported",
        )
    made = {id(value): i for i, value in enumerate(recorder.returned)}
    places = [made.get(id(value)) for value in results]
    if None in places:
        raise ExportError(
            f"result {places.index(None)} of the model shares its memory with an input or another result",
            where="export",
            hint="clone it in the model",
        )
    return Binding(tuple(taken), tuple(places)), results  # pyright: ignore[reportArgumentType]


# ---- arguments -----------------------------------------------------------------------------------------------------


def signature_of(model: torch.nn.Module) -> inspect.Signature:
    return inspect.signature(model.forward)


def parameters_of(model: torch.nn.Module) -> tuple[Parameter, ...]:
    """The signature of a model, as an archive has it."""
    found = []
    for one in signature_of(model).parameters.values():
        plain = isinstance(one.default, _PLAIN)
        found.append(Parameter(one.name, int(one.kind), one.default if plain else None, required=not plain))
    return tuple(found)


def leaves_of(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Path, Any]:
    """Everything that a call gives, defaults too, by where it lies in the arguments."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    found: dict[Path, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            for key, item in value.items():
                found.update(_leaves((key,), item))
        else:
            found.update(_leaves((name,), value))
    return found


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves((*path, key), item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves((*path, i), item)
    else:
        yield path, value


def arguments_of(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The keyword arguments of a call in which these values lie where they lay."""
    tree: dict[Any, Any] = {}
    for path, value in leaves.items():
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value

    def made(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        parts = {key: made(part) for key, part in value.items()}
        return list(parts.values()) if all(isinstance(key, int) for key in parts) else parts

    return {name: made(value) for name, value in tree.items()}


def fixed_in(leaves: Mapping[Path, Any], numbers: set[Path]) -> tuple[tuple[Path, Any], ...]:
    """The arguments of a call that are no tensors, but for the ``numbers`` that change.

    Raises:
        ExportError: One is an object.
    """
    found = []
    for path, value in leaves.items():
        if isinstance(value, torch.Tensor) or path in numbers:
            continue
        if not isinstance(value, _PLAIN):
            raise ExportError(
                f"a {type(value).__name__} cannot be taken along",
                where=f"argument {dotted(path)}",
                hint="give tensors, numbers, strings, and lists and dicts of them",
            )
        found.append((path, value))
    return tuple(found)


def sources_of(
    model: torch.nn.Module, names: Sequence[str], inputs: Sequence[Any], leaves: Mapping[Path, Any]
) -> tuple[tuple[Weight | Argument, ...], dict[str, torch.Tensor]]:
    """Where each input of a captured graph comes from; and the tensors among them that no state dict has, by name.

    ``names`` are the inputs' own, ``leaves`` the arguments of the call.

    Raises:
        ExportError: Two arguments are one tensor; or an input is none, nor a number that changes.
    """
    held = _named(model)
    given: dict[int, list[Path]] = {}
    for path, value in leaves.items():
        if isinstance(value, torch.Tensor):
            given.setdefault(id(value), []).append(path)
    sources: list[Weight | Argument] = []
    constants: dict[str, torch.Tensor] = {}
    for name, value in zip(names, inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            raise ExportError(f"{value!r} is no tensor", where=f"input {name}", hint="give it as a tensor")
        form = Form.of(value)
        paths = given.get(id(value), [])
        if len(paths) > 1:
            twice = " and ".join(map(dotted, paths))
            raise ExportError("they are one tensor", where=f"arguments {twice}", hint="give one of them a copy")
        number = tuple(name.split("."))
        if id(value) in held:
            sources.append(Weight(held[id(value)][0], form, held[id(value)][1]))
        elif paths:
            sources.append(Argument(paths[0], form))
        elif isinstance(leaves.get(number), (int, float)):
            sources.append(Argument(number, form, number=True))
        else:
            sources.append(Weight(name.removeprefix("self."), form, "constant"))
        source = sources[-1]
        if isinstance(source, Weight) and source.kind == "constant":
            constants[source.name] = value
    return tuple(sources), constants


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers and parameters of a model, under all of their names."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}


def _named(model: torch.nn.Module) -> dict[int, tuple[str, str]]:
    """Name and kind of each parameter and buffer, by id."""
    saved = model.state_dict(keep_vars=True).keys()
    found: dict[int, tuple[str, str]] = {}
    for name, value in tensors_of(model).items():
        own = "parameter" if isinstance(value, torch.nn.Parameter) else "buffer" if name in saved else "constant"
        found.setdefault(id(value), (name, own))
    return found


# ---- results -------------------------------------------------------------------------------------------------------


def template_of(value: Any, results: Sequence[Any], leaves: Mapping[Path, Any]) -> Template:
    """How what a model returns is made of its graph's results.

    Raises:
        ExportError: Something in it is neither a result nor an argument, and no constant.
    """
    made = {id(result): i for i, result in enumerate(results)}
    given = {id(argument): path for path, argument in leaves.items() if isinstance(argument, torch.Tensor)}

    def of(part: Any) -> Template:
        if isinstance(part, torch.Tensor):
            if id(part) in made:
                return Result(made[id(part)])
            if id(part) in given:
                return Given(given[id(part)])
        elif isinstance(part, _PLAIN):
            return Constant(part)
        elif isinstance(part, Mapping):
            kind = "" if type(part) is dict else type(part).__name__
            return Fields(tuple(map(str, part)), tuple(map(of, part.values())), kind)
        elif dataclasses.is_dataclass(part):
            own = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
            return Fields(tuple(own), tuple(map(of, own.values())), type(part).__name__)
        elif type(part) in (tuple, list):
            return Items(tuple(map(of, part)), isinstance(part, list))
        raise ExportError(
            f"the model returns a {type(part).__name__} that is not made in its graph",
            where="export",
            hint="return tensors, and tuples, lists, dicts and dataclasses of them",
        )

    return of(value)
