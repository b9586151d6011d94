"""The model's output in a Dynamo graph: which of the returned values is the sample, at full and at half batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from .. import _torch
from ..errors import OutputError
from ..recipe.frequency import LatentFormat
from ..recipe.guidance import Guidance


def returned(gm: fx.GraphModule) -> list[fx.Node]:
    """The floating-point tensors that a Dynamo graph returns, in order, once each."""
    nodes = [n for n in gm.graph.output_node().all_input_nodes if isinstance(n.meta.get("example_value"), torch.Tensor)]
    return [n for n in dict.fromkeys(nodes) if n.meta["example_value"].is_floating_point()]


def _require_known_sizes(values: Sequence[fx.Node], where: str) -> None:
    if any(_torch.depends_on_data(value.meta["example_value"]) for value in values):
        raise OutputError(
            "the size of the model's output depends on the data that it is called with",
            where=where,
            hint="what is kept of it has a fixed size; is_guidance_distilled=True forecasts attentions alone",
        )


def sample_output(gm: fx.GraphModule, guidance: Guidance) -> list[fx.Node]:
    """The sample among the returned values: the first one.

    Raises:
        OutputError: It is no image or video in the given format.
    """
    values = returned(gm)
    if not values:
        raise OutputError("the model returns no floating-point tensor", where=guidance.settings)
    _require_known_sizes(values[:1], guidance.settings)
    guidance.latents.check(_shape(values[0]), f"{guidance.settings}.tensor_format")
    return values[:1]


def paired_outputs(
    full: fx.GraphModule, half: fx.GraphModule, guidance: Guidance
) -> tuple[list[fx.Node], list[fx.Node], LatentFormat]:
    """The sample among the values that a model returns at full and at half batch; a list of samples, if it is one.

    Raises:
        OutputError: The sample does not halve with the batch, or is no image or video in the given format.
    """
    of_full, of_half, where = returned(full), returned(half), f"{guidance.settings}.tensor_format"
    _require_known_sizes([*of_full, *of_half], guidance.settings)
    shapes = [_shape(n) for n in of_full], [_shape(n) for n in of_half]
    if shapes[0] and shapes[1] and len(shapes[0]) == 2 * len(shapes[1]) and len({*shapes[0], *shapes[1]}) == 1:
        latents = replace(guidance.latents, listed=True)
        latents.check((len(of_half), *shapes[1][0]), where)
        return of_full, of_half, latents
    if not shapes[0] or len(shapes[0]) != len(shapes[1]) or not _halves(shapes[0][0], shapes[1][0]):
        raise OutputError(
            f"the model's output does not follow its batch: it returns {_text(shapes[0])} for the whole batch and "
            f"{_text(shapes[1])} for half of it",
            where=where,
            hint="the output must hold [uncond, cond] samples; the inputs that carry such batches are named in "
            f"{guidance.settings}._unconditional_conditional_input_kwargs_identifiers",
        )
    guidance.latents.check(shapes[0][0], where)
    others = [i for i in range(1, len(of_full)) if shapes[0][i] != shapes[1][i]]
    if others:
        raise OutputError(
            f"output {others[0]} of the model ({_text(shapes[0][others[0] : others[0] + 1])}) carries the batch too; "
            "only the first one is estimated",
            where="the model's output",
        )
    return of_full[:1], of_half[:1], guidance.latents


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["example_value"].shape)


def _halves(full: Sequence[int], half: Sequence[int]) -> bool:
    return len(full) == len(half) and full[0] == 2 * half[0] and full[1:] == half[1:]


def _text(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, shape)) or "a scalar" for shape in shapes[:4]) or "nothing"
