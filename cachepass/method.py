"""Method: a config's recipe, and the one door through which everybody asks it.

    where   select, check                       regions of a traced graph -> targets, groups, the probe
    when    asks, skips, forgets, never_predicts
    what    weights, bound, probe_parameters

Host code only: no fx node comes here. The recipe is data; by which names the user knows it, the config says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .config import MethodConfig
from .errors import ConfigError, NoMatchError, PartialGraphError, listing, warn
from .recipe.cut import BlockOutput, BlockResidual, Blocks, Latents, ModelOutput, ModuleOutput, Modules
from .recipe.guidance import Guidance, model_of
from .recipe.recipe import Group, Part, Recipe
from .recipe.schedule import Bound, Step
from .recipe.schedule.steps import NEEDS_STEPS
from .recipe.vocabulary import NO_PAST, GroupHistory, ProbeTarget, Region, Selection, Skip, Target, span_of

# The lists of blocks that diffusers' hooks look for.
_LISTS = (
    r"(blocks|transformer_blocks|single_transformer_blocks|layers|visual_transformer_blocks"
    r"|temporal_transformer_blocks)\.\d+"
)
_ANY_LIST = r"[^.]+\.\d+"
_NORM = re.compile(r"norm", re.IGNORECASE)


class Method:
    """A recipe for runs of a known or unknown length, with the config that it comes from."""

    def __init__(self, config: MethodConfig, num_inference_steps: int | None = None) -> None:
        self.config = config
        self.recipe = _recipe_of(config, num_inference_steps)
        self.guidance: Guidance | None = self.recipe.guidance
        # Asked at every call, for each graph of a model, so found once.
        self._schedules = {group.name: group.schedule for group in self.recipe.groups}
        self._refreshing = {group.name for group in self.recipe.groups if group.schedule.can_refresh}
        self._looking_back = {group.name for group in self.recipe.groups if group.schedule.looks_back}
        self._forecasts = {group.name: group.forecast for group in self.recipe.groups}
        self._per_region = {name for name, forecast in self._forecasts.items() if forecast.form.per_region}
        self.needs_timestep, self.needs_model = self.recipe.needs_timestep, self.recipe.needs_model
        self.cuts = bool(self.recipe.groups) or self.guidance is not None
        self.streams, self.measures = self.recipe.streams, self.recipe.measures

    # ---- where ------------------------------------------------------------------------------------------------------

    def select(self, regions: Sequence[Region], model: Sequence[str] | None = None) -> Selection:
        """Choose regions, their groups and forecasts.

        Args:
            regions: Of the traced graph.
            model: They are those of one part of a model whose modules have these paths. What finds nothing in it may do
                so in another part: no error and no warning.

        Raises:
            NoMatchError: An identifier that must match finds nothing.
            ConfigError: Fewer blocks than are always computed.
            PartialGraphError: A stack of blocks lies in several graphs.
        """
        targets, notes, skips = list[Target](), list[str](), list[Skip]()
        if not self.measures:
            places = [(group, part) for group in self.recipe.groups for part in group.parts]
            for group, part in places:
                if isinstance(part.cut, Blocks):
                    targets += self._span(group, part, regions, model)
            modules = [(group, part) for group, part in places if isinstance(part.cut, Modules)]
            targets += _first_to_take(modules, regions)
            found, more = self._otherwise(modules, targets, regions, model)
            targets, notes = targets + found, notes + more
            order = {region.id: i for i, region in enumerate(regions)}
            targets.sort(key=lambda target: order.get(target.region.id, -1))
            if model is None:
                self.config.review(regions)
                self._require(modules, targets, regions)
            skips = self._left(modules, targets, regions)
        return Selection(tuple(targets), tuple(skips), tuple(notes), self._probe(regions, model))

    def check(self, regions: Sequence[Region], model: Sequence[str]) -> None:
        """``regions`` are those of all parts of a model whose modules have the paths ``model``.

        Raises:
            NoMatchError: As ``select`` for the whole model; or what a part forecasts alone lies outside of every graph.
        """
        self.config.review_parts(regions, model)
        self.select(regions)

    def _otherwise(
        self,
        modules: Sequence[tuple[Group, Part]],
        targets: Sequence[Target],
        regions: Sequence[Region],
        model: Sequence[str] | None,
    ) -> tuple[list[Target], list[str]]:
        """Targets for parts whose identifiers match nothing in the model, where they say what is taken then."""
        taken, found, notes = {target.region.id for target in targets}, list[Target](), list[str]()
        for group, part in modules:
            cut = part.cut
            assert isinstance(cut, Modules)
            if cut.otherwise is None or any(target.group == group.name for target in targets):
                continue
            if any(cut.compare(identifier, path) for path in model or () for identifier in cut.identifiers):
                continue
            more = [
                _target(group, part, r)
                for r in regions
                if cut.fits(r) and r.matches(cut.otherwise) and r.id not in taken
            ]
            if more:
                notes.append(f"the default identifiers match nothing; {len(more)} attention modules found instead")
            found += more
        return found, notes

    def _require(
        self, modules: Sequence[tuple[Group, Part]], targets: Sequence[Target], regions: Sequence[Region]
    ) -> None:
        reached = {target.group for target in targets}
        for group, part in modules:
            cut = part.cut
            assert isinstance(cut, Modules)
            unmatched = [
                i for i in cut.identifiers if not any(cut.fits(r) and r.matches(i, cut.compare) for r in regions)
            ]
            missed = group.name not in reached
            where = self.config.where(group.name, part)
            if (cut.must_match == "each" and unmatched) or (cut.must_match == "any" and missed):
                raise no_match(
                    where, unmatched or cut.identifiers, _candidates(cut, regions), f"{group.name} " if cut.kind else ""
                )
            if cut.must_match == "none" and missed and (reached or self.guidance is not None):
                warn(f"{self.config.where(group.name)} has no effect: {_why_unreached(group, cut, targets)}")
        if modules and not targets and self.guidance is None:
            identifiers = [i for _, part in modules if isinstance(part.cut, Modules) for i in part.cut.identifiers]
            group, part = modules[0]
            raise no_match(self.config.where(group.name, part), identifiers, _candidates(part.cut, regions))

    def _left(
        self, modules: Sequence[tuple[Group, Part]], targets: Sequence[Target], regions: Sequence[Region]
    ) -> list[Skip]:
        """Modules that no group takes, where groups take kinds of modules, and why."""
        kinds = {part.cut.kind for _, part in modules if isinstance(part.cut, Modules)} - {None}
        taken = {target.region.id for target in targets}
        skips = []
        for region in regions if kinds else ():
            why = None if region.id in taken else self.config.why_left(region)
            if why is not None:
                skips.append(Skip(region.id, f"{region.kind}: {why}"))
        return skips

    def _span(self, group: Group, part: Part, regions: Sequence[Region], model: Sequence[str] | None) -> list[Target]:
        cut = part.cut
        assert isinstance(cut, Blocks)
        blocks = self._stack(group, part, regions, cut.identifiers, model)
        if not blocks:
            return []
        middle = blocks[cut.first : len(blocks) - cut.last]
        if not middle:
            raise ConfigError(
                f"the first {cut.first} and last {cut.last} blocks are always computed, and the model has "
                f"{len(blocks)}",
                where=self.config.where(group.name, part),
                hint=f"{self.config.fewer}blocks: {listing([b.id for b in blocks])}",
            )
        return [_target(group, part, span_of(middle))]

    def _stack(
        self,
        group: Group,
        part: Part,
        regions: Sequence[Region],
        identifiers: Sequence[str] | None,
        model: Sequence[str] | None,
    ) -> list[Region]:
        """The blocks in the order of their calls; all of them, or none where they are in another graph of the model."""
        patterns = identifiers or [_LISTS]
        blocks = [r for r in regions if any(re.fullmatch(i, r.path) for i in patterns)]
        where = self.config.where(group.name, part)
        if identifiers is not None and model is None:
            unmatched = [i for i in identifiers if not any(region.matches(i) for region in regions)]
            if unmatched:
                raise no_match(where, unmatched, _candidates(None, regions))
        elif identifiers is None and not blocks and not any(re.fullmatch(_LISTS, path) for path in model or ()):
            blocks = [r for r in regions if r.is_block and re.fullmatch(_ANY_LIST, r.path)]
            patterns = [f"{re.escape(r.path.rpartition('.')[0])}\\.\\d+" for r in blocks]
            if not blocks and model is None:
                raise no_match(
                    where, ["a list of blocks"], [r.path for r in regions], "give Blocks(identifiers=[...]); "
                )
        here = {r.path for r in blocks}
        elsewhere = [path for path in model or () if path not in here and any(re.fullmatch(i, path) for i in patterns)]
        if blocks and elsewhere:
            raise PartialGraphError(
                f"what a stack of blocks adds to the model's streams is told in one graph, and {listing(elsewhere)} "
                "lie in others",
                where=type(self.config).__name__,
                hint="compile the whole model with fullgraph=True, or forecast modules inside of the blocks",
            )
        return blocks

    def _probe(self, regions: Sequence[Region], model: Sequence[str] | None) -> ProbeTarget | None:
        group = self.recipe.decider
        if group is None or group.probe is None:
            return None
        probe, name, metric = group.probe, group.name, group.metric
        if isinstance(probe, Latents):
            return ProbeTarget(
                name,
                every=probe.every,
                per_sample=True,
                transform=probe.transform,
                parameters=int(probe.sigma),
                metric=metric,
            )
        if isinstance(probe, ModelOutput):
            return ProbeTarget(name, of_model=True, every=probe.every, metric=metric)
        part = group.parts[0]
        identifiers = part.cut.identifiers if isinstance(part.cut, Blocks) else None
        blocks = self._stack(group, part, regions, identifiers, model)
        if not blocks:
            return None
        if isinstance(probe, ModuleOutput):
            region = self._module(probe.identifier, regions, blocks[0])
            return ProbeTarget(name, region, output=probe.output, every=probe.every, metric=metric)
        assert isinstance(probe, (BlockResidual, BlockOutput))
        first = len(blocks) if probe.blocks is None else probe.blocks
        if first > len(blocks):
            raise ConfigError(
                f"it looks at {first} blocks, and the model has {len(blocks)}",
                where=f"{type(self.config).__name__}.probe",
                hint=f"blocks: {listing([b.id for b in blocks])}",
            )
        return ProbeTarget(
            name, span_of(blocks[:first]), residual=isinstance(probe, BlockResidual), every=probe.every, metric=metric
        )

    def _module(self, identifier: str | None, regions: Sequence[Region], block: Region) -> Region:
        if identifier is None:
            inside = [r for r in regions if r.path.startswith(f"{block.path}.") and _NORM.search(r.class_name)]
        else:
            inside = [r for r in regions if re.fullmatch(identifier, r.path)]
        if not inside:
            candidates = [r.path for r in regions if r.path.startswith(f"{block.path}.")]
            raise no_match(
                f"{type(self.config).__name__}.probe", [identifier or "a norm in the first block"], candidates
            )
        return inside[0]

    # ---- when -------------------------------------------------------------------------------------------------------

    def asks(self, group: str, step: Step, history: GroupHistory, distance: float | None = None) -> bool | None:
        """Whether a group that has a history is predicted in a step: yes, no, or (None) ask the probe."""
        past = history.past if group in self._looking_back else NO_PAST
        return self._schedules[group].predicts(step, past, distance)

    def skips(self, step: Step) -> bool:
        """Whether the unconditional branch is skipped in a step, if the branches' difference is known."""
        assert self.guidance is not None
        return bool(self.guidance.schedule.predicts(step, NO_PAST))

    def forgets(self, group: str, step: Step) -> bool:
        """What is kept of the group does not count from this step on."""
        return group in self._refreshing and self._schedules[group].refreshes(step.index)

    def never_predicts(self, num_inference_steps: int | None) -> str | None:
        """The reason why no step of a run can be predicted, or None if one may be."""
        reason = self.config.why_never(num_inference_steps)
        if reason is not None or not self.recipe.groups:
            return reason
        schedules = [group.schedule for group in self.recipe.groups]
        if self.guidance is not None:
            schedules = [self.guidance.schedule]
        reasons = [schedule.never_predicts(num_inference_steps) for schedule in schedules]
        return reasons[0] if all(reasons) else None

    def why_idle(self, timesteps: tuple[float, float] | None) -> str | None:
        """Why a whole run predicted nothing, for the warning; None: on purpose. ``timesteps`` is the (lowest, highest)
        seen."""
        return self.config.why_idle(self.recipe, timesteps)

    # ---- what stands in ---------------------------------------------------------------------------------------------

    def weights(self, group: str, step: Step, history: GroupHistory, region: str = "") -> tuple[float, ...]:
        """Weights for a predicted step, newest output first; only asked for forecasts without constant weights.

        ``region`` is the path of the module whose output is forecast, where the forecast says ``per_region``.
        """
        if self.guidance is not None and group == self.guidance.group:
            return self.guidance.weights(step, history.weights)
        forecast = self._forecasts[group]
        if group in self._per_region and len(history.steps) > 1:
            model = model_of(step, f"{type(self.config).__name__}.attention_weight_callback")
            forecast = forecast.of_module(model.get_submodule(region))
        nodes: Sequence[float] = history.steps
        at: float = step.index
        if forecast.spacing == "timestep":
            nodes, at = [t for t in history.timesteps if t is not None], step.time(forecast)
        if not forecast.needs_gram:
            return forecast.weights(nodes, at)
        return tuple(w for gram in history.gram for w in forecast.weights(nodes, at, gram))

    def bound(self, group: str, history: GroupHistory) -> Bound:
        """What ``asks`` compares the distance with, where it has no answer without."""
        return self._schedules[group].bound(history.past)

    def probe_parameters(self, step: Step) -> tuple[float, ...]:
        """For the probe's ``transform``: the noise level."""
        decider = self.recipe.decider
        if decider is None or not (isinstance(decider.probe, Latents) and decider.probe.sigma):
            return ()
        return (step.time("the probe") / 1000.0,)


def _recipe_of(config: MethodConfig, num_inference_steps: int | None) -> Recipe:
    """The recipe of a config.

    Raises:
        ConfigError: It needs the number of steps: said of the config, not of a part that its user never saw.
    """
    try:
        return config.recipe(num_inference_steps)
    except ConfigError as error:
        if num_inference_steps is not None or not error.what.endswith(NEEDS_STEPS):
            raise
        hint = f'give options={{"num_inference_steps": 28}}, as many as your sampler makes ({error.what})'
        raise ConfigError(f"{config.method or 'it'} {NEEDS_STEPS}", where=type(config).__name__, hint=hint) from None


def _target(group: Group, part: Part, region: Region) -> Target:
    residual = isinstance(part.cut, Blocks) and part.cut.residual
    return Target(region, group.name, part.forecast.form, part.dtype, residual)


def _first_to_take(modules: Sequence[tuple[Group, Part]], regions: Sequence[Region]) -> list[Target]:
    """Each region with the first part whose cut takes it."""
    targets = []
    for region in regions:
        for group, part in modules:
            cut = part.cut
            assert isinstance(cut, Modules)
            if cut.takes(region):
                targets.append(_target(group, part, region))
                break
    return targets


def _candidates(cut: object, regions: Sequence[Region]) -> list[str]:
    if isinstance(cut, Modules) and cut.kind is not None:
        return [r.path for r in regions if cut.fits(r)]
    return [r.path for r in regions if r.is_attention] or [r.path for r in regions]


def _why_unreached(group: Group, cut: Modules, targets: Sequence[Target]) -> str:
    for target in targets:
        if cut.takes(target.region):
            return (
                f"the {target.group} identifiers, which come first, match {target.region.path} and all others of "
                "its modules too"
            )
    return f"the identifiers match no {group.name} module of the model"


def no_match(where: str, patterns: Sequence[str], candidates: Sequence[str], more: str = "") -> NoMatchError:
    """The error for patterns that match no module of the traced graph."""
    parts = [p for p in patterns if any(re.search(p, path) for path in candidates)]
    if parts:
        more += f"an identifier matches the whole path: {_whole(parts[0], candidates)!r}; "
    return NoMatchError(
        f"{', '.join(map(repr, patterns))} matches no module that the model calls",
        where=where,
        hint=f"{more}candidates: {listing(candidates)}",
    )


def _whole(part: str, paths: Sequence[str]) -> str:
    """An identifier for whole paths that hold a part: ``attn1`` -> ``.*attn1``."""
    return next((p for p in (f".*{part}", f"{part}.*") if any(re.fullmatch(p, path) for path in paths)), f".*{part}.*")
