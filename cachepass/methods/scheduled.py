"""Any cut with any schedule and any forecast: what the configs that are recipes become."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..config.adaptive import Recipe, RecipeConfig
from ..errors import ConfigError, PartialGraphError, listing
from ..recipe.cut import BlockOutput, BlockResidual, Blocks, Latents, ModelOutput, ModuleOutput, Modules
from ..recipe.schedule import Bound, Step
from .base import GroupHistory, Method, Probe, Region, Selection, Target, no_match, span_of

# The lists of blocks that diffusers' hooks look for.
_LISTS = (
    r"(blocks|transformer_blocks|single_transformer_blocks|layers|visual_transformer_blocks"
    r"|temporal_transformer_blocks)\.\d+"
)
_ANY_LIST = r"[^.]+\.\d+"
_NORM = re.compile(r"norm", re.IGNORECASE)


class Scheduled(Method):
    """One group, one schedule. A ``Threshold`` in it asks a probe of the graph."""

    config: RecipeConfig

    def __init__(self, config: RecipeConfig) -> None:
        self.config = config
        self.recipe: Recipe | None = None

    def bind(self, num_inference_steps: int | None) -> None:
        recipe = self.recipe = self.config.recipe(num_inference_steps)
        self.group = "blocks" if isinstance(recipe.cut, Blocks) else "modules"
        self._by_timestep = recipe.forecast.spacing == "timestep"
        self._sigma = isinstance(recipe.probe, Latents) and recipe.probe.sigma
        self.needs_timestep = recipe.schedule.needs_timestep or self._by_timestep or self._sigma
        self.streams = isinstance(recipe.cut, Blocks) or recipe.probe is not None
        self.measures = recipe.measures

    @property
    def _bound(self) -> Recipe:
        if self.recipe is None:
            self.bind(None)
        assert self.recipe is not None
        return self.recipe

    # ---- where ------------------------------------------------------------------------------------------------------

    def select(self, regions: Sequence[Region], model: Sequence[str] | None = None) -> Selection:
        recipe = self._bound
        if recipe.measures:
            return Selection((), probe=self._probe(regions, model))
        cut, form = recipe.cut, recipe.forecast.form
        if isinstance(cut, Modules):
            targets = [Target(region, self.group, form) for region in regions
                       if any(region.matches(identifier) for identifier in cut.identifiers)]  # fmt: skip
            if model is None:
                self._require(cut.identifiers, regions)
        else:
            blocks = self._stack(regions, cut.identifiers, model)
            if not blocks:
                return Selection(())
            middle = blocks[cut.first : len(blocks) - cut.last]
            if not middle:
                raise ConfigError(
                    f"the first {cut.first} and last {cut.last} blocks are always computed, and the model has "
                    f"{len(blocks)}", where=self._where("cut"), hint=f"blocks: {listing([b.id for b in blocks])}",
                )  # fmt: skip
            targets = [Target(span_of(middle), self.group, form, residual=cut.residual)]
        return Selection(tuple(targets), probe=self._probe(regions, model))

    def _require(self, identifiers: Sequence[str], regions: Sequence[Region]) -> None:
        unmatched = [i for i in identifiers if not any(region.matches(i) for region in regions)]
        if unmatched:
            candidates = [r.path for r in regions if r.is_attention] or [r.path for r in regions]
            raise no_match(self._where("cut"), unmatched, candidates)

    def _stack(self, regions: Sequence[Region], identifiers: Sequence[str] | None,
               model: Sequence[str] | None) -> list[Region]:  # fmt: skip
        """The blocks in the order of their calls; all of them, or none where they are in another graph of the model."""
        patterns = identifiers or [_LISTS]
        blocks = [r for r in regions if any(re.fullmatch(i, r.path) for i in patterns)]
        if identifiers is not None and model is None:
            self._require(identifiers, regions)
        elif identifiers is None and not blocks and not any(re.fullmatch(_LISTS, path) for path in model or ()):
            blocks = [r for r in regions if r.is_block and re.fullmatch(_ANY_LIST, r.path)]
            patterns = [f"{re.escape(r.path.rpartition('.')[0])}\\.\\d+" for r in blocks]
            if not blocks and model is None:
                raise no_match(self._where("cut"), ["a list of blocks"], [r.path for r in regions],
                               "give Blocks(identifiers=[...]); ")  # fmt: skip
        here = {r.path for r in blocks}
        elsewhere = [path for path in model or () if path not in here and any(re.fullmatch(i, path) for i in patterns)]
        if blocks and elsewhere:
            raise PartialGraphError(
                f"what a stack of blocks adds to the model's streams is told in one graph, and {listing(elsewhere)} "
                "lie in others", where=type(self.config).__name__,
                hint="compile the whole model with fullgraph=True, or forecast modules inside of the blocks",
            )  # fmt: skip
        return blocks

    def _probe(self, regions: Sequence[Region], model: Sequence[str] | None) -> Probe | None:
        recipe = self._bound
        probe = recipe.probe
        if probe is None:
            return None
        if isinstance(probe, Latents):
            return Probe(self.group, every=probe.every, per_sample=True, transform=probe.transform,
                         parameters=int(probe.sigma), metric=recipe.metric)  # fmt: skip
        if isinstance(probe, ModelOutput):
            return Probe(self.group, of_model=True, every=probe.every, metric=recipe.metric)
        blocks = self._stack(regions, recipe.cut.identifiers if isinstance(recipe.cut, Blocks) else None, model)
        if isinstance(probe, ModuleOutput):
            region = self._module(probe.identifier, regions, blocks[0])
            return Probe(self.group, region, output=probe.output, every=probe.every, metric=recipe.metric)
        assert isinstance(probe, (BlockResidual, BlockOutput))
        first = len(blocks) if probe.blocks is None else probe.blocks
        if first > len(blocks):
            raise ConfigError(
                f"it looks at {first} blocks, and the model has {len(blocks)}", where=self._where("probe"),
                hint=f"blocks: {listing([b.id for b in blocks])}",
            )  # fmt: skip
        return Probe(self.group, span_of(blocks[:first]), residual=isinstance(probe, BlockResidual), every=probe.every,
                     metric=recipe.metric)  # fmt: skip

    def _module(self, identifier: str | None, regions: Sequence[Region], block: Region) -> Region:
        if identifier is None:
            inside = [r for r in regions if r.path.startswith(f"{block.path}.") and _NORM.search(r.class_name)]
        else:
            inside = [r for r in regions if re.fullmatch(identifier, r.path)]
        if not inside:
            candidates = [r.path for r in regions if r.path.startswith(f"{block.path}.")]
            raise no_match(self._where("probe"), [identifier or "a norm in the first block"], candidates)
        return inside[0]

    def _where(self, name: str) -> str:
        return f"{type(self.config).__name__}.{name}"

    # ---- when -------------------------------------------------------------------------------------------------------

    def predicts(self, group: str, step: Step) -> bool:
        raise NotImplementedError("what was done in the run has a say: see decides")

    def decides(
        self,
        group: str,  # noqa: ARG002
        step: Step,
        history: GroupHistory,
        distance: float | None = None,
    ) -> bool | None:
        return self._bound.schedule.predicts(step, history.past, distance)

    def forgets(self, group: str, step: Step) -> bool:  # noqa: ARG002
        return self._bound.schedule.refreshes(step.index)

    def bound(self, group: str, history: GroupHistory) -> Bound:  # noqa: ARG002
        return self._bound.schedule.bound(history.past)

    def probe_parameters(self, step: Step) -> tuple[float, ...]:
        if not self._sigma:
            return ()
        assert step.timestep is not None
        return (step.timestep / 1000.0,)

    def never_predicts(self, num_inference_steps: int | None) -> str | None:
        return self._bound.schedule.never_predicts(num_inference_steps)

    def why_idle(self, timesteps: tuple[float, float] | None) -> str:
        return f"{super().why_idle(timesteps)} ({self._bound.schedule})"

    # ---- what stands in ---------------------------------------------------------------------------------------------

    def weights(self, group: str, step: Step, history: GroupHistory, region: str = "") -> tuple[float, ...]:  # noqa: ARG002
        forecast = self._bound.forecast
        nodes: Sequence[float] = history.steps
        at: float | None = step.index
        if self._by_timestep:
            nodes, at = [t for t in history.timesteps if t is not None], step.timestep
        assert at is not None
        if not forecast.needs_gram:
            return forecast.weights(nodes, at)
        return tuple(w for gram in history.gram for w in forecast.weights(nodes, at, gram))
