"""Prepare: what is cut in a Dynamo graph, found before anything is compiled.

    prepare : Dynamo GraphModule, inputs, options -> Prepared

All that can be wrong with the user's settings for a model is found here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..errors import (
    NoMatchError,
    OptionError,
    PartialGraphError,
    TimestepError,
    TrainingError,
    listing,
    warn,
)
from ..method import Method
from ..options import CompileOptions, is_declared
from ..recipe.vocabulary import ProbeTarget, Selection, Skip, Target
from .annotate import outermost
from .data_sizes import sizing_inputs, why_unfit
from .inputs import (
    Arguments,
    GraphInputs,
    InputLayout,
    find_latents,
    find_timestep,
    find_timestep_input,
    kind_of,
    read_inputs,
    tells,
)
from .numbers import keep_numbers
from .place import Place
from .regions import RegionTable, find_regions
from .siblings import Siblings
from .spans import add_span

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What is to be cut in a Dynamo graph, and what was learned on the way."""

    method: Method
    table: RegionTable
    targets: tuple[Target, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    names: tuple[str, ...]
    layout: InputLayout
    own: tuple[int, ...] = ()
    probe: ProbeTarget | None = None
    siblings: Siblings | None = None

    @property
    def varying(self) -> set[str]:
        """Names of the inputs that change from step to step."""
        return {self.names[i] for i in (*self.layout.latents, self.layout.timestep) if i is not None}


def prepare(gm: fx.GraphModule, inputs: Sequence[Any], options: CompileOptions, place: Place | None = None) -> Prepared:
    """Choose what is cut. Where the graph is only a part of its model (it has a ``place``), what matches nothing in it
    may match in another."""
    assert options.cache is not None
    keep_numbers(gm)
    _refuse_training(gm, inputs)
    method = Method(options.cache, options.num_inference_steps)
    named = read_inputs(gm, inputs)
    _check_declared(named, options, whole=place is None)
    siblings = timestep = None
    if place is None:
        table, selection, timestep = _choose(gm, inputs, named, method, options)
    else:
        _refuse_part(place, method, options)
        paths = place.paths()
        table = find_regions(gm, paths, place.root, rest=place.rest)
        _require_timestep(place.timestep is not None, place.inputs, method, options)
        siblings = Siblings(method, tuple(table.regions), place.prefix, place.siblings, tuple(paths.values()))
        selection = siblings.selection()
    _add_spans(gm, table, selection)
    targets, nested = outermost(selection.targets, table)
    for note in selection.notes:
        logger.info(note)
    found = find_latents([named.names[i] for i in named.own], [inputs[i] for i in named.own])
    latents = tuple(i for i in (named.own[k] for k in found) if isinstance(inputs[i], torch.Tensor))
    targets, resized, sizing = _sized_by_data(gm, table, targets, {*latents, timestep}, method, options)
    _refuse_probe_sized_by_data(table, selection.probe)
    skips = (*table.skips, *selection.skips, *nested, *resized)
    static = None if _torch.is_symbolic(gm) else kind_of([inputs[i] for i in latents])
    telling = _telling(named, inputs, {*latents, timestep}, options)
    names = tuple(named.names[i] for i in telling)
    sizes = _first_sizes(gm, named)
    samples = _samples([named.names[i] for i in latents], dict(sizes))
    layout = InputLayout(named.identity, latents, timestep, static, telling, names, sizing, samples, sizes)
    notes, probe = selection.notes, selection.probe
    if probe is not None and probe.region is None and not probe.of_model:
        notes = (*notes, f"the probe looks at the input {listing([named.names[i] for i in latents[:1]])}")
    if siblings is not None:
        siblings = dataclasses.replace(siblings, targets=tuple(targets))
    return Prepared(method, table, tuple(targets), skips, notes, named.names, layout, tuple(named.own), probe, siblings)


def _choose(
    gm: fx.GraphModule, inputs: Sequence[Any], named: GraphInputs, method: Method, options: CompileOptions
) -> tuple[RegionTable, Selection, int | None]:
    """The regions of a whole model, what the method takes of them, and which input is the timestep."""
    table = find_regions(gm)
    if not table.regions and method.cuts:
        raise NoMatchError(
            "the traced graph contains no module call that can be cached",
            where="torch.compile",
            hint="compile the transformer itself (an nn.Module), not a function of tensors",
        )
    timestep = _find_timestep(named, inputs, options)
    _require_timestep(timestep is not None, [named.names[i] for i in named.own], method, options)
    return table, method.select(table.regions), timestep


def _refuse_part(place: Place, method: Method, options: CompileOptions) -> None:
    """Raise for methods that need the graph of a whole model."""
    where = type(place.call.module).__name__
    if not method.cuts:
        raise PartialGraphError(
            "what stays the same within a run can be told in the graph of a whole model only, and this graph is a "
            f"part of one ({place.why})",
            where=where,
            hint="compile the whole model with fullgraph=True",
        )
    if method.guidance is not None:
        raise PartialGraphError(
            f"{type(options.cache).__name__} estimates the unconditional branch from the model's output, and this "
            f"graph is only a part of the model ({place.why})",
            where=where,
            hint="compile the whole model with fullgraph=True, or give is_guidance_distilled=True to forecast "
            "attentions alone",
        )


def _sized_by_data(
    gm: fx.GraphModule,
    table: RegionTable,
    targets: Sequence[Target],
    varying: set[int | None],
    method: Method,
    options: CompileOptions,
) -> tuple[list[Target], list[Skip], tuple[int, ...]]:
    """The targets that can be kept though their sizes may depend on data, why others cannot, and the indices of the
    inputs that the sizes come from.

    Raises:
        NoMatchError: Nothing is left.
    """
    kept, skips, sizing = list[Target](), list[Skip](), set[int]()
    for target in targets:
        outputs = [o for o in table.outputs[target.region.id] if _torch.depends_on_data(o.meta["example_value"])]
        reason = why_unfit(gm, outputs, varying) if outputs else None
        if outputs and (options.lowering == "cond" or method.guidance is not None):
            only = 'lowering="cond"' if options.lowering == "cond" else "guidance"
            reason = f"the size of an output depends on data, which {only} does not allow"
        if reason is None:
            kept.append(target)
            sizing.update(sizing_inputs(gm, outputs) or ())
        else:
            skips.append(Skip(target.region.id, reason))
    if targets and not kept:
        raise NoMatchError(
            f"nothing can be cached: {skips[0].reason}",
            where=skips[0].region,
            hint="cut modules whose outputs have a size of their own",
        )
    return kept, skips, tuple(sorted(sizing))


def _refuse_probe_sized_by_data(table: RegionTable, probe: ProbeTarget | None) -> None:
    if probe is None or probe.region is None:
        return
    outputs = table.outputs[probe.region.id]
    looked = outputs if probe.region.blocks else outputs[probe.output :][:1]
    if any(_torch.depends_on_data(output.meta["example_value"]) for output in looked):
        raise NoMatchError(
            "what a decision looks at has a size that depends on data",
            where=probe.region.id,
            hint="look at the latents, or at an output whose size is its own",
        )


def _add_spans(gm: fx.GraphModule, table: RegionTable, selection: Selection) -> None:
    """Regions that a method made of several blocks, and that a probe looks at."""
    regions = [target.region for target in selection.targets]
    if selection.probe is not None and selection.probe.region is not None:
        regions.append(selection.probe.region)
    for region in regions:
        if region.blocks:
            add_span(gm, table, region)


def _telling(
    named: GraphInputs, inputs: Sequence[Any], varying: set[int | None], options: CompileOptions
) -> tuple[int, ...]:
    """Indices of the inputs that tell one conditioning from another: tensors that are neither latents nor timestep, nor
    declared to change within a trajectory, or to come as another tensor every time."""
    declared = (*options.varying_inputs, *options.invariant_inputs)
    return tuple(
        i
        for i in named.own
        if i not in varying and tells(inputs[i]) and not any(is_declared(named.names[i], given) for given in declared)
    )


def _samples(latents: Sequence[str], first_sizes: dict[str, int]) -> int | None:
    """How many samples the latents of these names are: one tensor, or a list of them."""
    listed = latents and all(name.rpartition(".")[2].isdigit() for name in latents)
    return len(latents) if listed or len(latents) > 1 else first_sizes.get(latents[0]) if latents else None


def _first_sizes(gm: fx.GraphModule, named: GraphInputs) -> tuple[tuple[str, int], ...]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = [(named.names[i], placeholders[i].meta.get("example_value")) for i in named.own]
    sizes = [(name, v.shape[0]) for name, v in values if isinstance(v, torch.Tensor) and v.ndim]
    return tuple((name, size) for name, size in sizes if isinstance(size, int))


def _check_declared(named: GraphInputs, options: CompileOptions, *, whole: bool) -> None:
    """Inputs declared by the user are inputs of the model."""
    names = [named.names[i] for i in named.own]
    for option in ("invariant_inputs", "varying_inputs") if whole else ():
        for given in getattr(options, option):
            if not any(is_declared(name, given) for name in names):
                raise OptionError(
                    f"the model has no tensor input {given!r}",
                    where=f'options["{option}"]',
                    hint=f"inputs: {listing(names)}",
                )


def _find_timestep(named: GraphInputs, inputs: Sequence[Any], options: CompileOptions) -> int | None:
    """Index of the timestep among the graph's inputs. A Python number is made one of them first."""
    numeric = {i: named.names[i] for i in named.own if isinstance(inputs[i], (torch.Tensor, torch.SymInt))}
    frame = _torch.current_frame()
    if frame is not None:
        arguments = dict(Arguments.of(frame).all)
        name = find_timestep_input(arguments, options.timestep_input)
        number = None if name is None else arguments[name]
        if isinstance(number, (int, float)) and not any(name == known for known in numeric.values()):
            assert name is not None
            _torch.restart_dynamic(name, number)
    return find_timestep(numeric, options.timestep_input)


def _require_timestep(found: bool, names: Sequence[str], method: Method, options: CompileOptions) -> None:
    has_callback = getattr(options.cache, "current_timestep_callback", None) is not None
    if found or has_callback:
        return
    if method.needs_timestep:
        raise TimestepError(
            "the schedule needs the timestep, and no input of the model is called timestep, timesteps, t or sigma",
            where=type(options.cache).__name__,
            hint='give options["timestep_input"] = one of its inputs, or current_timestep_callback. '
            f"inputs: {listing(names)}",
        )
    if options.num_inference_steps is None:
        warn(
            "no timestep input found, so the end of a run cannot be seen: call cachepass.reset(model) between "
            'runs, or give options["num_inference_steps"] or options["timestep_input"]',
        )


def _refuse_training(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    for root in _torch.root_modules()[:1]:
        if root.training:
            raise TrainingError(
                "the model is in training mode",
                where=type(root).__name__,
                hint="caching is for inference: call model.eval() first",
            )
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise TrainingError(
            "gradients are required",
            where=type(gm).__name__,
            hint="caching is for inference: call the model under torch.no_grad() or torch.inference_mode()",
        )
