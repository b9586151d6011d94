"""HTML: an explanation as one page that needs no network, no server and no other file.

    render : Findings, the calls of a simulated run -> the page

The page is ``page.html`` with ``page.css`` and ``page.js`` inside; everything but the graphs is in it as text, so
that it can be read and searched where scripts do not run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ...config.base import default_of
from ...program.flops import add_known
from ...program.plan import PlannedCut
from ...program.slots import NamedSlot
from ..findings import Findings
from ..summary import Summary
from ..tables import human_bytes, human_flops
from ..timeline import SimulatedCall, lanes
from .align import align
from .cost import StepCost, run_costs, saved, share_of
from .tree import Module, module_tree

_HERE = Path(__file__).parent


def environment() -> jinja2.Environment:
    """Templates of this folder."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(
    explanation: Findings,
    calls: Sequence[SimulatedCall],
    *,
    assumed: bool,
    ran: Summary | None = None,
    gpu: Mapping[str, Any] | None = None,
) -> str:
    """The page. ``assumed``: nobody gave the timesteps of the run; ``ran``: what the compiled model did; ``gpu``: what
    it would be on a GPU."""
    costs = run_costs(explanation, calls)
    least = _least(explanation)
    tree = module_tree(explanation, explanation.fx_graph(explanation.baseline(least)), explanation.fx_graph(least))
    return (
        environment()
        .get_template("page.html")
        .render(
            style=own("page.css"),
            script=own("page.js"),
            model=explanation.model,
            config=type(explanation.method.config).__name__,
            fields=list(_fields(explanation.method.config)),
            never=explanation.never,
            notes=explanation.notes,
            totals=list(_totals(explanation, costs, ran)),
            saved=_saved(costs),
            tree=tree,
            fates=_count_fates(tree),
            least=least,
            lanes=lanes(calls, explanation.plan),
            steps=list(_steps(calls, costs)),
            assumed=assumed,
            contexts=list(dict.fromkeys(call.context for call in calls)),
            memory=list(_memory(explanation)),
            memory_total=human_bytes(explanation.cache_bytes),
            per=_per(explanation),
            dead=_dead(explanation),
            phases=list(_phases(explanation)),
            gpu=gpu,
            data=_graphs(explanation, least),
        )
    )


def _least(explanation: Findings) -> str:
    """The phase that computes least, but for those that do not run the model at all."""
    flops = {phase: explanation.flops(phase) for phase in explanation.phases}
    known = {phase: count for phase, count in flops.items() if count}
    return min(known, key=known.__getitem__, default=explanation.phases[-1])


def own(name: str) -> str:
    """One of our own files, which stands in the page as it is."""
    return (_HERE / name).read_text(encoding="utf-8")


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def _fields(config: Any) -> Iterator[tuple[str, str, bool]]:
    """Name, value, and whether it is not the default, of each field of a config."""
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), default_of(field)
        text = getattr(value, "__qualname__", None) if callable(value) and not isinstance(value, type) else None
        yield field.name, text or repr(value), bool(value != default)


def _saved(costs: Sequence[StepCost]) -> str:
    """One share, or a range where the data decide."""
    shares = saved(costs)
    if shares is None:
        return _percent(None)
    least, most = shares
    return _percent(least) if most - least < 5e-4 else f"{100 * least:.1f} to {100 * most:.1f} %"


def _totals(explanation: Findings, costs: Sequence[StepCost], ran: Summary | None) -> Iterator[tuple[str, str, str]]:
    """What a reader wants to know first: label, value, remark."""
    # A step whose FLOPs are unknown runs what depends on data: more than one whose FLOPs are known.
    dearest = max(costs, key=lambda c: math.inf if c.flops is None else c.flops)
    cheapest = min(costs, key=lambda c: math.inf if c.least is None else c.least)
    uncached = add_known(*(cost.uncached for cost in costs))
    decides = any(cost.least != cost.flops for cost in costs)
    yield "saved over the run", _saved(costs), f"of {human_flops(uncached)}" + (", as the data decide" * decides)
    if ran is not None:
        yield "saved in the runs so far", _percent(ran.saved), f"of {human_flops(ran.plain_flops)}, {ran.steps} steps"
    yield "a computed step", human_flops(dearest.flops), f"without a cache {human_flops(dearest.uncached)}"
    share = share_of(cheapest.least, cheapest.uncached)
    yield "the cheapest step", human_flops(cheapest.least), f"{_percent(share)} of an uncached one"
    yield f"cache per {_per(explanation)}", human_bytes(explanation.cache_bytes), f"{explanation.cache_bytes:,} B"
    hoisted = explanation.hoisted
    if hoisted is not None:
        yield "kept for a run", human_bytes(hoisted.slot_bytes), f"{hoisted.operations} operations run once in it"


def _per(explanation: Findings) -> str:
    """What the plan's bytes are for: the two calls of guidance share theirs."""
    output = explanation.plan.output
    return "pair of contexts" if output is not None and not output.halved else "context"


def _count_fates(tree: Sequence[Module]) -> dict[str, int]:
    counts = dict.fromkeys(("cut", "dead", "once", "skipped", "inside", "left"), 0)
    for root in tree:
        for module in root.walk():
            if module.fate in counts:
                counts[module.fate] += 1
    return {fate: count for fate, count in counts.items() if count}


def _steps(calls: Sequence[SimulatedCall], costs: Sequence[StepCost]) -> Iterator[dict[str, Any]]:
    """Head of each column of the timeline: the step, its timestep and what it costs."""
    timesteps = {call.step: call.timestep for call in calls}
    for (step, timestep), cost in zip(timesteps.items(), costs, strict=True):
        height = 1.0 if cost.share is None else min(cost.share, 1.0)
        yield {
            "index": step,
            "timestep": f"{timestep:.4g}",
            "share": height,
            "percent": _percent(cost.share),
            "flops": human_flops(cost.total),
            "once": cost.once,
        }


def _memory(explanation: Findings) -> Iterator[dict[str, Any]]:
    """The slots: a row for each value that is kept."""
    plan, hoisted = explanation.plan, explanation.hoisted
    rows: list[tuple[str, str, str, PlannedCut | NamedSlot, int]] = [
        (cut.region, str(cut.output), cut.group, cut, cut.history) for cut in plan.live_cuts if cut.history
    ]
    if plan.output is not None:
        rows += [("(output)", slot.name, plan.output.guidance.group, slot, 1) for slot in plan.output.slots]
    rows += [("(run)", slot.name, "kept for a run", slot, 1) for slot in ([] if hoisted is None else hoisted.slots)]
    largest = max((slot.slot_bytes * count for *_, slot, count in rows), default=0)
    for region, output, group, slot, count in rows:
        size = slot.slot_bytes * count
        yield {
            "region": region,
            "output": output,
            "group": group,
            "shape": " × ".join(map(str, slot.shape)),
            "dtype": str(slot.slot_dtype).removeprefix("torch."),
            "slots": count,
            "bytes": human_bytes(size) if size else "symbolic",
            "share": size / largest if largest else 0.0,
        }


def _dead(explanation: Findings) -> int:
    return sum(not cut.live for cut in explanation.plan.cuts)


def _phases(explanation: Findings) -> Iterator[dict[str, Any]]:
    """The programs: what each costs, against the model as it is."""
    plain = explanation.flops("plain")
    graphs = [*dict.fromkeys(map(explanation.baseline, explanation.phases)), *explanation.phases]
    for name in graphs:
        flops = explanation.flops(name)
        share = share_of(flops, plain) if plain else None
        yield {
            "name": name,
            "operations": explanation.nodes(name),
            "flops": human_flops(flops),
            "share": share or 0.0,
            "percent": _percent(share) if plain != 0 else "-",
            "plain": name not in explanation.phases,
        }


def _graphs(explanation: Findings, first: str) -> dict[str, Any]:
    """The graphs and how they differ from the plain ones: each line of text once, graphs as lists of lines."""
    names = [*explanation.phases, *explanation.canonical_forms]
    bases = {name: explanation.baseline(name) for name in names}
    texts = {name: explanation.graph(name).splitlines() for name in dict.fromkeys([*bases.values(), *names])}
    numbers: dict[str, int] = {}
    graphs = {name: [numbers.setdefault(line, len(numbers)) for line in text] for name, text in texts.items()}
    kinds = ["equal", "changed", "removed", "added"]
    diffs = {
        name: {
            "base": base,
            "rows": [
                [kinds.index(run.kind), run.left, run.right, run.count] for run in align(texts[base], texts[name])
            ],
        }
        for name, base in bases.items()
    }
    return {"lines": list(numbers), "graphs": graphs, "diffs": diffs, "first": first}
