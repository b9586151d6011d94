"""The inputs of a Dynamo graph by name: parameters, the timestep, everything else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..errors import TimestepError, listing
from .regions import dotted

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma")
_LOCAL = re.compile(r"^[LG]\['([^']+)'\]")


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
        raise TimestepError(f"the model has no tensor input {wanted!r}", where='options["timestep_input"]',
                            hint=f"inputs: {listing(names.values())}")  # fmt: skip
    return None


@dataclass(frozen=True)
class GraphInputs:
    """The inputs of a Dynamo graph.

    Attributes:
        names: Of all inputs, in order.
        held: Indices of those that the module holds: parameters and buffers.
        identity: Indices of those whose identity tells which instance of the module is called: its parameters
            (buffers, where it has none: modules may replace those from call to call).
    """

    names: tuple[str, ...]
    held: tuple[int, ...]
    identity: tuple[int, ...]


def read_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> GraphInputs:
    """Names and roles of a Dynamo graph's inputs."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    parameters, buffers = [], []
    for i, node in enumerate(placeholders):
        source = _torch.placeholder_source(node) or ""
        if isinstance(inputs[i], torch.nn.Parameter) or "_parameters[" in source:
            parameters.append(i)
        elif isinstance(inputs[i], torch.Tensor) and "_buffers[" in source:
            buffers.append(i)
    held = tuple(sorted((*parameters, *buffers)))
    return GraphInputs(tuple(map(input_name, placeholders)), held, tuple(parameters or buffers))
