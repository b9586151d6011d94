"""Inputs by name: of a call of a module, of a frame that Dynamo traces, of its graph; the timestep among them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..errors import TimestepError, listing
from .regions import dotted

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma")
_LOCAL = re.compile(r"^[LG]\['([^']+)'\]")


Argument = tuple[str, Any]


@dataclass(frozen=True)
class Arguments:
    """The arguments of a frame by name.

    ``variadic``: names of what came as ``*args``, by where Dynamo sees it: ``("args.0", "hidden_states")``.
    """

    positional: list[Argument]
    keyword: list[Argument]
    variadic: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(frame: _torch.Frame) -> Arguments:
        code, scope = frame.code, frame.locals
        names, count = code.co_varnames, code.co_argcount
        positional = [(name, scope[name]) for name in names[:count]]
        count += code.co_kwonlyargcount
        keyword = [(name, scope[name]) for name in names[code.co_argcount : count]]
        variadic: tuple[tuple[str, str], ...] = ()
        if code.co_flags & inspect.CO_VARARGS:
            extra = scope[names[count]]
            known = _positional_names(positional, len(extra))
            variadic = tuple((f"{names[count]}.{i}", name) for i, name in enumerate(known))
            positional += zip(known, extra, strict=True)
            count += 1
        if code.co_flags & inspect.CO_VARKEYWORDS:
            keyword += scope[names[count]].items()
        return Arguments(positional, keyword, variadic)

    @property
    def all(self) -> list[Argument]:
        return [*self.positional, *self.keyword]


def _positional_names(explicit: Sequence[Argument], count: int) -> list[str]:
    """Names for ``*args`` of a wrapped ``forward``: those of the module's own signature."""
    owner = next((value for _, value in explicit if isinstance(value, torch.nn.Module)), None)
    names = list(inspect.signature(owner.forward).parameters) if owner is not None else []
    skip = len(explicit) - (owner is not None)
    return (names[skip : skip + count] + [f"args[{i}]" for i in range(count)])[:count]


def input_name(placeholder: fx.Node) -> str:
    """``L['timestep']`` -> ``timestep``, ``L['self']...['to_q']._parameters['weight']`` -> ``...to_q.weight``."""
    source = _torch.placeholder_source(placeholder)
    if source is None:
        return placeholder.name
    rest = dotted(source)
    match = _LOCAL.match(source)
    is_module = "_parameters[" in source or "_buffers[" in source or "_modules[" in source
    if match is None or is_module:
        return rest or placeholder.name
    return f"{match[1]}.{rest}" if rest else match[1]


def find_timestep(names: dict[int, str], wanted: str | None) -> int | None:
    """Index of the timestep among the inputs ``{index: name}``: the option's name, or one of the usual ones."""

    def base(name: str) -> str:
        return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)

    for candidate in (wanted,) if wanted is not None else TIMESTEP_NAMES:
        for index, name in names.items():
            if candidate in (name, base(name)):
                return index
    if wanted is not None:
        raise TimestepError(
            f"the model has no tensor input {wanted!r}",
            where='options["timestep_input"]',
            hint=f"inputs: {listing(names.values())}",
        )
    return None


@dataclass(frozen=True)
class InputLayout:
    """Where things stand among the inputs of a Dynamo graph.

    Attributes:
        identity: Indices of the tensors whose identity tells which instance of the model is called.
        latents: Indices of the latents.
        timestep: Index of the timestep input, if there is one.
        static: Shape, dtype and device of the latents, where they are the same in all calls.
        conditioning: Indices of what tells one conditioning from another, and their names.
        sizing: Indices of what the sizes of kept values come from, where these depend on data.
        samples: How many samples the latents have; None: it may differ from call to call.
        first_sizes: The first dimensions of the inputs that a call brings, by name; of those that may differ from call
            to call, nothing.
    """

    identity: tuple[int, ...]
    latents: tuple[int, ...] = ()
    timestep: int | None = None
    static: Hashable = None
    conditioning: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    sizing: tuple[int, ...] = ()
    samples: int | None = None
    first_sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class GraphInputs:
    """The inputs of a Dynamo graph.

    Attributes:
        names: Of all inputs, in order.
        own: Indices of those that a call brings: all but parameters and buffers.
        identity: Indices of those whose identity tells which instance of the module is called: its parameters
            (buffers, where it has none: modules may replace those from call to call).
    """

    names: tuple[str, ...]
    own: tuple[int, ...]
    identity: tuple[int, ...]


def read_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> GraphInputs:
    """Names and roles of a Dynamo graph's inputs."""
    frame = _torch.current_frame()
    given = dict(Arguments.of(frame).variadic) if frame is not None else {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    parameters, buffers = [], []
    for i, node in enumerate(placeholders):
        source = _torch.placeholder_source(node) or ""
        if isinstance(inputs[i], torch.nn.Parameter) or "_parameters[" in source:
            parameters.append(i)
        elif isinstance(inputs[i], torch.Tensor) and "_buffers[" in source:
            buffers.append(i)
    held = {*parameters, *buffers}
    own = tuple(i for i in range(len(placeholders)) if i not in held)
    names = [input_name(node) for node in placeholders]
    names = [given.get(name, name) for name in names]
    return GraphInputs(tuple(names), own, tuple(parameters or buffers))


# ---- calls of modules ----------------------------------------------------------------------------------------------


def named_inputs(call: _torch.ModuleCall) -> dict[str, Any]:
    """The arguments of a module's call by name. A hook in front of ``forward`` that takes anything names nothing: then
    the names are those of the class's."""
    parameters = list(inspect.signature(call.module.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        parameters = list(inspect.signature(type(call.module).forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def find_timestep_input(inputs: Mapping[str, Any], wanted: str | None, *, per_token: bool = True) -> str | None:
    """The name of the input that holds the timestep: a number, one for all samples or one for each; ``per_token``:
    or one for each token. The last part of a name is enough: ``timestep`` for ``kwargs.timestep``."""
    short = {name.rpartition(".")[2]: name for name in reversed(list(inputs))}
    for known in (wanted,) if wanted is not None else TIMESTEP_NAMES:
        name = known if known in inputs else short.get(known, known)
        value = inputs.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return name
        if isinstance(value, torch.Tensor) and value.ndim <= (2 if per_token else 1) and not value.is_complex():
            return name
    return None


def conditioning_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of a module's call hold that may tell one conditioning from another, by path: tensors, and
    flags. Numbers are left out: many change from step to step."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            if tells(value):
                found[name] = value
        elif isinstance(value, (list, tuple)):
            found.update(conditioning_of({f"{name}.{i}": item for i, item in enumerate(value)}))
        elif isinstance(value, dict):
            found.update(conditioning_of({f"{name}.{key}": item for key, item in value.items()}))
        elif isinstance(value, (bool, str)):
            found[name] = value
    return found


def tells(value: object) -> bool:
    """A tensor that is no number of the caller's."""
    return isinstance(value, torch.Tensor) and (value.ndim > 0 or value.device.type != "cpu")


LATENT_NAMES = ("hidden_states", "x", "sample", "latents", "latent", "latent_model_input", "noisy_latents")


def find_latents(names: Sequence[str], values: Sequence[Any]) -> list[int]:
    """Which of the inputs hold the latents, whose shape tells runs at different sizes apart: those of a usual name
    (a list of samples is many inputs of a graph), or the first floating-point tensor of two dimensions or more."""
    for name in LATENT_NAMES:
        found = [i for i, own in enumerate(names) if name in own.split(".")]
        if found:
            return found
    tensors = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 1]
    return tensors[:1]


def kind_of(value: Any) -> Hashable:
    """Shapes, dtypes and devices of the tensors in (lists of) inputs."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(kind_of, value))
    return None
