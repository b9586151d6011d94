"""Tree: the modules of an explained model as a tree, and what becomes of each.

module_tree : Findings -> roots of a tree of Module, in the order of their first operations
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from ...capture.regions import dotted
from ...program.plan import PlannedCut
from ...recipe.vocabulary import Region
from ..findings import Findings
from ..tables import human_bytes

#: ``inside``: part of what is cut; ``left``: no method's choice; ``holder``: groups others, and is called by nobody.
Fate = Literal["cut", "dead", "once", "skipped", "inside", "left", "holder"]


@dataclass
class Module:
    """One module call (or a list of modules) in the tree.

    Attributes:
        name: Last part of its path.
        path: Its region's id.
        class_name, kind: Of the region; empty where it has none.
        fate, why: What becomes of it, and the reason in words.
        plain, least: Operations in it without caching, and in the phase that runs fewest.
        children: What is in it.
    """

    name: str
    path: str
    class_name: str = ""
    kind: str = ""
    fate: Fate = "holder"
    why: str = ""
    plain: int = 0
    least: int = 0
    children: list[Module] = field(default_factory=list)

    def walk(self) -> Iterator[Module]:
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def open(self) -> bool:
        """Something in it has a fate worth seeing at once."""
        return any(
            module.fate in ("cut", "dead", "once", "skipped") for child in self.children for module in child.walk()
        )


def module_tree(explanation: Findings, plain: fx.Graph, least: fx.Graph) -> list[Module]:
    """The modules of a model; ``plain`` and ``least``: graphs of which operations are counted."""
    regions = {region.id: region for region in explanation.regions}
    fates = _fates(explanation)
    for span in [region for region in regions.values() if len(region.blocks) > 1]:  # no module: its blocks are
        fates |= dict.fromkeys(span.blocks, fates.pop(span.id, ("left", "")))
        del regions[span.id]
    ids = list(dict.fromkeys([*regions, *(skip.region for skip in explanation.skips)]))
    counts = _operations(plain), _operations(least)
    roots: list[Module] = []
    known: dict[str, Module] = {}
    for path in sorted(ids, key=lambda path: path.count(".")):
        module = _place(path, roots, known)
        _describe(module, regions.get(path), fates)
        module.plain, module.least = (count.get(path, 0) for count in counts)
    order = {path: i for i, path in enumerate(ids)}
    _finish(roots, order, None)
    return roots


def _fates(explanation: Findings) -> dict[str, tuple[Fate, str]]:
    """What becomes of the regions that the plan speaks of."""
    fates: dict[str, tuple[Fate, str]] = {}
    once = () if explanation.hoisted is None else explanation.hoisted.regions
    for skip in explanation.skips:
        fates[skip.region] = ("once" if skip.region in once else "skipped", skip.reason)
    cuts: dict[str, list[PlannedCut]] = {}
    for cut in explanation.plan.cuts:
        cuts.setdefault(cut.region, []).append(cut)
    for region, own in cuts.items():
        live = [cut for cut in own if cut.live]
        if not live:
            fates[region] = "dead", f"{own[0].group}: no phase reads its forecast, so it has no slots"
            continue
        slots = sum(cut.history for cut in live)
        kept = f"{slots} slot{'s' * (slots > 1)}, {human_bytes(sum(cut.history * cut.slot_bytes for cut in live))}"
        span = f" of {region}" if ".." in region else ""
        fates[region] = "cut", f"{live[0].group}: {live[0].forecast}{span}, {kept if slots else 'nothing is kept'}"
    return fates


def _operations(graph: fx.Graph) -> dict[str, int]:
    """Operations of each module path, those of modules in it included."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for path in {dotted(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()}:
                counts[path] = counts.get(path, 0) + 1
    return counts


def _place(path: str, roots: list[Module], known: dict[str, Module]) -> Module:
    """The module of a path, made with all that it is in."""
    if path not in known:
        above, _, name = path.rpartition(".")
        siblings = _place(above, roots, known).children if above else roots
        known[path] = Module(name, path)
        siblings.append(known[path])
    return known[path]


def _describe(module: Module, region: Region | None, fates: Mapping[str, tuple[Fate, str]]) -> None:
    module.fate, module.why = fates.get(module.path, ("left", ""))
    if region is not None:
        module.class_name, module.kind = region.class_name, region.kind


def _finish(modules: list[Module], order: Mapping[str, int], cut: str | None) -> None:
    """Children in the order of the model's operations; what is in a cut region is so by it."""

    def first(module: Module) -> int:
        return min(order[inner.path] for inner in module.walk() if inner.path in order)

    modules.sort(key=first)
    for module in modules:
        if cut is not None and module.fate in ("left", "holder"):
            module.fate, module.why = "inside", f"runs and is skipped with {cut}"
        own = module.path if module.fate in ("cut", "dead", "once") else cut
        _finish(module.children, order, own)
