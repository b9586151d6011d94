"""``torch.compile(model, backend="cached_inductor", options={"cache": ...})``: the whole way, from top to bottom.

    cached_inductor   Dynamo graph -> callable
      locate            is it the whole model, or a part of one (graph breaks, blocks compiled one by one)?
      prepare           regions -> the method's targets                        (before anything is compiled)
        keep_numbers      a Python float that changes from call to call stays an input
      build             annotate -> AOTAutograd, decompositions, joint passes: one ATen graph for all phases -> plan;
                        for guidance batches also the graph of half a batch; what stays the same within a run is
                        hoisted out of both
      Program           rewrite (the canonical form) -> specialize -> lower: one variant per phase, when first needed
      Dispatcher        clock -> schedule -> phase and weights -> variant -> commit, on each call

torch finds this backend by its entry point, so ``import cachepass`` is not needed to use it. From then on is heard what
diffusers says of calls (``run/listening.py``).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import _torch
from .capture.annotate import (
    annotate,
    annotate_entry,
    annotate_output,
    annotate_probe,
    annotate_probe_of_input,
    annotate_probe_of_output,
)
from .capture.half import HalfCall, capture_half, check_halves, common_targets
from .capture.inputs import kind_of, read_inputs
from .capture.numbers import keep_numbers
from .capture.outputs import paired_outputs, returned, sample_output
from .capture.place import locate
from .capture.prepare import Prepared, prepare
from .capture.regions import find_regions
from .config import method_names
from .errors import BatchError, CachepassError, hearing, warn
from .method import Method
from .options import CompileOptions, parse_options
from .program.dump import dump
from .program.plan import make_plan
from .program.progress import compiling
from .program.sizes import SymbolBinder
from .program.streams import resolve
from .program.trace import Traced, hoist_alike, trace
from .program.variants import Program
from .recipe.frequency import LatentFormat
from .recipe.vocabulary import Skip, Target
from .run.context import context_of, guidance_partner, hear, surroundings, unparted
from .run.dispatch import Dispatcher
from .run.guidance import comes_alone
from .run.instance import HalfRun
from .run.listening import listen
from .run.live import reset_around
from .run.registry import model_of, model_of_part
from .run.step import CurrentCall, step_runner

logger = logging.getLogger(__name__)
listen(on_context=hear, on_end=reset_around)
_STATIC_CAPTURES = 128  # of one function under guidance: sizes of prompts and images that a process goes through


def cached_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a Dynamo graph with caching: the backend itself.

    Args:
        gm: The captured graph, as Dynamo gives it to every backend.
        inputs: Its example inputs.
        options: ``"cache"`` (a config of ours or of diffusers, a dict with ``"method"``, or a method's name),
            ``"lowering"``, ``"timestep_input"``, ``"timestep_scale"``, ``"num_inference_steps"`` (see
            ``cachepass.CompileOptions``), ``"mode"``; every other key is an Inductor config.
        mode: As for Inductor: ``"reduce-overhead"``, ``"max-autotune"``, ... (torch.compile takes either ``mode=`` or
            ``options=``, so beside a cache it is given as an option).

    Raises:
        CachepassError: Any of its subclasses, before anything is compiled.
    """
    try:
        parsed = parse_options(options, mode)
        if parsed.cache is None:
            warn(
                "backend='cached_inductor' without options={'cache': ...}: nothing is cached, this is plain Inductor. "
                f"Methods: {', '.join(method_names())}",
            )
            return _torch.plain_inductor(gm, inputs, parsed.inductor)
        if surroundings().rows is not None:
            raise unparted()
        heard: list[str] = []
        start = time.time()
        shown = parsed.progress and parsed.lowering != "eager"
        with hearing(heard), compiling("capturing the model", shown=shown):
            dispatcher = compile_cached(gm, inputs, parsed)
        dispatcher.warnings.extend(heard)
        dispatcher.capture_seconds = _torch.capture_seconds(start)
        return dispatcher
    except CachepassError as error:
        _torch.raise_unwrapped(error)


def compile_cached(gm: fx.GraphModule, inputs: Sequence[Any], options: CompileOptions) -> Dispatcher:
    """The pipeline for a graph with a cache."""
    place = locate(gm, options)
    prepared = prepare(gm, inputs, options, place)
    model = None
    if place is not None and prepared.siblings is not None:
        model = model_of_part(place, prepared.siblings, options)
    root = next(iter(_torch.root_modules()), None)
    dispatcher = Dispatcher(prepared.method, options, prepared.layout, root, prepared.siblings, model)
    if dispatcher.is_part and not prepared.targets:
        logger.info("nothing to cache in this part of the model: compiled as it is")
        dispatcher.compiled = _uncached(gm, inputs, options)
        return dispatcher
    idle = prepared.method.never_predicts(options.num_inference_steps)
    if idle is not None:
        # Nothing would ever read a slot: no marker, no slot, the very program that Inductor makes.
        warn(f"the cache never fires: {idle}")
        dispatcher.idle_groups = tuple(dict.fromkeys(target.group for target in prepared.targets))
        dispatcher.compiled = _uncached(gm, inputs, options)
        return dispatcher
    sizes = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    alone = prepared.method.guidance is not None and _comes_alone(inputs, prepared, options, root)
    built = build(gm, inputs, prepared, options, dispatcher.current, alone=alone)
    dispatcher.compiled, dispatcher.half, dispatcher.program = built.run, built.half, built.program
    dispatcher.binder = SymbolBinder.of(sizes, built.program.plan.sizes)
    return dispatcher


@dataclass(frozen=True)
class Built:
    """A model's program, its graph as a callable and, where steps may skip half of the batch, that of half a batch."""

    program: Program
    run: Callable[..., Any]
    half: HalfRun | None


def _comes_alone(
    inputs: Sequence[Any], prepared: Prepared, options: CompileOptions, root: torch.nn.Module | None
) -> bool:
    """The call that is captured is one in a run of guidance batches, and brings their conditional half alone."""
    layout = prepared.layout
    if root is None or guidance_partner(context_of(root)) is not None:
        return False
    kind = kind_of([inputs[i] for i in layout.latents])
    timestep = None if layout.timestep is None else inputs[layout.timestep]
    return comes_alone(model_of(root, prepared.method, options), kind, timestep)


def build(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    prepared: Prepared,
    options: CompileOptions,
    current: CurrentCall,
    *,
    alone: bool = False,
) -> Built:
    """From the Dynamo graph to the program whose variants are compiled on demand. ``alone``: its batch is the
    conditional half of guidance batches, so nothing is done with guidance."""
    method, targets, skips, notes = prepared.method, prepared.targets, prepared.skips, prepared.notes
    guidance = None if alone else method.guidance
    outputs: list[fx.Node] = []
    latents = half = None
    if method.guidance is not None:
        _require_static(gm, inputs)
    if guidance is not None:
        latents = guidance.latents
        if guidance_partner(context_of(next(iter(_torch.root_modules()), None))) is not None:
            outputs = sample_output(gm, guidance)
        else:
            half = _build_half(gm, inputs, prepared, options, current)
            outputs, latents, targets = half.outputs_of_full, half.latents, half.targets
            skips = (*skips, *half.skips)
            notes = (*notes, f"captured at half batch too; halved on steps that run it: {', '.join(half.call.names)}")
    _annotate(gm, prepared, targets, outputs)
    full, run = trace(gm, inputs, prepared.names, prepared.varying, options, step_runner(current))
    if method.streams:
        probe = prepared.probe
        notes = (*notes, *resolve(full.gm, full.varying, probe is not None and probe.residual, full.context.fake_mode))
        dump("streams", full.gm.graph, full.names)
    traced = [full] if half is None else [full, half.traced]
    _warn_of_ranks(full.gm.graph, method, prepared.probe is not None, options)
    if options.invariants and prepared.siblings is None:
        traced, once, left = hoist_alike(traced, options.invariant_bytes)
        skips, notes = (*skips, *once), (*notes, *left)
        if not method.cuts and traced[0].hoisted is None and not left:
            warn("nothing but parameters and light work on them stays the same within a run: this is plain Inductor")
    full, planned = traced[0], traced[-1]
    if half is not None:
        check_halves(full.gm.graph, planned.gm.graph)
    plan = make_plan(
        planned.gm,
        targets,
        returns=options.lowering == "cond",
        skips=skips,
        notes=notes,
        guidance=guidance,
        latents=latents,
        halved=half is not None,
        probe=prepared.probe,
        process_group=options.process_group,
    )
    for cut in plan.cuts:
        logger.debug("cut %s (%s, %s)%s", cut.name, cut.group, cut.forecast, "" if cut.live else ": dead, no slot")
    halved = None if half is None else planned
    program = Program(full, halved, plan, options.lowering, shares=options.shares, progress=options.progress)
    return Built(program, run, None if half is None else HalfRun(half.run, half.call))


def _annotate(gm: fx.GraphModule, prepared: Prepared, targets: Sequence[Target], outputs: Sequence[fx.Node]) -> None:
    """Mark everything that a later pass looks for in the ATen graph."""
    shown = dict(zip((node.name for node in gm.graph.find_nodes(op="placeholder")), prepared.names, strict=True))
    dump("dynamo", gm.graph, shown)
    _annotate_streams(gm, prepared)
    annotate(gm, list(targets), prepared.table)
    annotate_output(gm, list(outputs))
    dump("annotated", gm.graph, shown)


def _annotate_streams(gm: fx.GraphModule, prepared: Prepared) -> None:
    """Mark what flows into regions whose residual is asked for, and what a decision looks at."""
    probe, table = prepared.probe, prepared.table
    placeholders = gm.graph.find_nodes(op="placeholder")
    own = [placeholders[i] for i in prepared.own]
    spans = [target.region.id for target in prepared.targets if target.residual]
    if probe is not None and probe.region is not None and probe.region.blocks:
        spans.append(probe.region.id)
    for region in dict.fromkeys(spans):
        annotate_entry(gm, region, table, own)
    if probe is None:
        return
    if probe.of_model:
        for value in returned(gm)[:1]:
            annotate_probe_of_output(gm, value)
    elif probe.region is None:
        for i in prepared.layout.latents[:1]:
            annotate_probe_of_input(gm, placeholders[i])
    else:
        outputs = table.outputs[probe.region.id]
        looked = outputs if probe.region.blocks else outputs[probe.output :][:1]
        annotate_probe(gm, probe.region.id, looked, table)


@dataclass(frozen=True)
class _Half:
    """The half-batch graph, traced, and what it says about the full one."""

    traced: Traced
    run: Callable[..., Any]
    call: HalfCall
    latents: LatentFormat
    outputs_of_full: list[fx.Node]
    targets: tuple[Target, ...]
    skips: tuple[Skip, ...]


def _build_half(
    gm: fx.GraphModule, inputs: Sequence[Any], prepared: Prepared, options: CompileOptions, current: CurrentCall
) -> _Half:
    """Capture the frame at half batch, cut the regions that both graphs have, trace."""
    guidance = prepared.method.guidance
    assert guidance is not None
    built: list[_Half] = []

    def trace_half(half: fx.GraphModule, half_inputs: Sequence[Any], call: HalfCall) -> None:
        keep_numbers(half)
        full_outputs, half_outputs, latents = paired_outputs(gm, half, guidance)
        table = find_regions(half)
        targets, skips = common_targets(prepared.targets, prepared.table, table)
        pairs = tuple(_position(half, node) for node in half_outputs) if latents.listed else ()
        annotate(half, targets, table)
        annotate_output(half, half_outputs)
        names = read_inputs(half, half_inputs).names
        traced, run = trace(half, half_inputs, names, prepared.varying, options, step_runner(current))
        call = dataclasses.replace(call, pairs=pairs)
        built.append(_Half(traced, run, call, latents, full_outputs, tuple(targets), tuple(skips)))

    capture_half(gm, inputs, guidance, trace_half)
    logger.info("captured once more at half batch, for steps that skip the unconditional branch")
    return built[0]


def _warn_of_ranks(graph: fx.Graph, method: Method, probes: bool, options: CompileOptions) -> None:
    """Ranks that decide by what each of them measures may decide differently, and then wait for each other for ever."""
    decides = probes and not method.measures and options.process_group is None
    if decides and any(map(_torch.is_collective, graph.nodes)) and _torch.world_size() > 1:
        warn(
            "the model has collectives and the method decides by a distance that each rank measures by itself: ranks "
            'may decide differently and wait for each other for ever. Give options["process_group"] = "world", or the '
            "group of the ranks that run the model together",
        )


def _position(gm: fx.GraphModule, value: fx.Node) -> int:
    returned: Any = gm.graph.output_node().args[0]
    return list(returned).index(value)


def _require_static(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Programs under guidance have static shapes: where Dynamo gave symbolic ones, it is asked to trace again. Every
    size is a capture of its own, which Dynamo's limit for functions that it captures once more by mistake would end."""
    _torch.allow_captures(_STATIC_CAPTURES)
    if _torch.is_symbolic(gm) and not _torch.restart_static(inputs):
        raise BatchError(
            "symbolic sizes: cached guidance is compiled for static ones",
            where="torch.compile",
            hint="compile with dynamic=False, and give integers that change from call to call as tensors",
        )


def _uncached(gm: fx.GraphModule, inputs: Sequence[Any], options: CompileOptions) -> Callable[..., Any]:
    if options.lowering == "eager":
        return gm.forward
    return _torch.plain_inductor(gm, inputs, options.inductor)
