"""Recipe: a caching method as a value. Where, when, and what stands in.

    Recipe((Group("blocks", Every(3) & WarmUp(2), (Part(Blocks(), Taylor(1)),)),))

Everybody asks the recipe: the plan where it cuts, the dispatcher what it predicts, ``explain``, the warm-up and the
timeline what a run will be. It can be compared, and saved as JSON (``value.py``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .cut import BlockOutput, BlockResidual, Blocks, Cut, Latents, ModelOutput, ModuleOutput, Modules, Probe
from .forecast import ForecastRule
from .guidance import Guidance
from .schedule import Schedule, Threshold
from .value import SCHEMA, Value, check_schema, from_dict, to_dict
from .vocabulary import keeping

_PROBES = (BlockResidual, BlockOutput, ModuleOutput, Latents, ModelOutput)


@dataclass(frozen=True)
class Part(Value):
    """Some modules, and what stands in for them.

    Attributes:
        cut: Which: ``Blocks`` or ``Modules``.
        forecast: What stands in.
        dtype: In which their outputs are kept; None: in their own.

    Raises:
        ConfigError: A value is of the wrong type.
    """

    cut: Cut
    forecast: ForecastRule
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        _require(self, "cut", (Blocks, Modules), "a value of cachepass.cut")
        _require(self, "forecast", ForecastRule, "a value of cachepass.forecast")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ConfigError(f"expected a floating-point torch.dtype or None, got {self.dtype!r}", where="Part.dtype")

    def __str__(self) -> str:
        kept = "" if self.dtype is None else f" in {str(self.dtype).removeprefix('torch.')}"
        return f"{self.cut}: {self.forecast.form}{kept}"


@dataclass(frozen=True)
class Group(Value):
    """Modules with one schedule and one history.

    Attributes:
        name: Of the group, in tables.
        schedule: When they are predicted.
        parts: Which they are. The first part whose cut takes a module forecasts it.
        probe: What the schedule's threshold looks at; None: it has none.
        metric: What the probe measures: ``"relative_l1"``, or ``"magnitude"``, the growth of its tokens' norms.

    Raises:
        ConfigError: A value is of the wrong type; there is a threshold and no probe, or the reverse; blocks are not
            alone; or forecasts keep their outputs differently, which have one history.
    """

    name: str
    schedule: Schedule
    parts: tuple[Part, ...]
    probe: Probe | None = None
    metric: str = "relative_l1"

    def __post_init__(self) -> None:
        parts: Any = self.parts
        where = f"Group({self.name!r})"
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"expected a name such as 'blocks', got {self.name!r}", where="Group.name")
        _require(self, "schedule", Schedule, "a value of cachepass.schedule")
        if not parts or not isinstance(parts, (tuple, list)) or not all(isinstance(part, Part) for part in parts):
            raise ConfigError(
                f"expected a tuple of parts, got {parts!r}", where=f"{where}.parts", hint="(Part(cut, forecast),)"
            )
        object.__setattr__(self, "parts", tuple(parts))
        if self.probe is not None:
            _require(self, "probe", _PROBES, "a probe of cachepass.cut")
        if (self.probe is None) != (self.schedule.threshold is None):
            what = "nothing decides by it" if self.probe is not None else "the schedule's threshold has nothing to ask"
            raise ConfigError(what, where=f"{where}.probe", hint="a Threshold in the schedule and a probe go together")
        if len(self.parts) > 1 and any(isinstance(part.cut, Blocks) for part in self.parts):
            raise ConfigError(
                "a stack of blocks is cut as one value", where=f"{where}.parts", hint="give it a group of its own"
            )
        self._require_alike(where)

    def _require_alike(self, where: str) -> None:
        """A group has one history, which says when outputs were kept and how many of them count, and one list of
        weights: forecasts of two depths would read outputs that are others than the weights are for."""
        kept = [part for part in self.parts if part.forecast.form.history]
        for part in kept[1:]:
            if keeping(part.forecast.form) != keeping(kept[0].forecast.form):
                raise ConfigError(
                    f"the forecasts of one group keep their outputs alike: {kept[0]} ({keeping(kept[0].forecast.form)})"
                    f" and {part} ({keeping(part.forecast.form)})",
                    where=where,
                    hint="give each of them a group of its own",
                )

    def bind(self, num_inference_steps: int | None) -> Group:
        """This group for runs of so many steps; None: unknown."""
        parts = tuple(
            dataclasses.replace(part, forecast=part.forecast.bind(num_inference_steps)) for part in self.parts
        )
        return dataclasses.replace(self, schedule=self.schedule.bind(num_inference_steps), parts=parts)

    @property
    def measures(self) -> bool:
        """Every step is measured, and none predicted on purpose: no distance is below 0."""
        threshold = self.schedule.threshold
        return isinstance(threshold, Threshold) and threshold == Threshold(0.0)

    @property
    def forecast(self) -> ForecastRule:
        """The forecast that gives the weights of the group: of those that keep outputs, the first."""
        return next((part.forecast for part in self.parts if part.forecast.form.history), self.parts[0].forecast)

    def __str__(self) -> str:
        looked = "" if self.probe is None else f", by {type(self.probe).__name__}"
        return f"{self.name}: {'; '.join(map(str, self.parts))} | {self.schedule}{looked}"


@dataclass(frozen=True)
class Recipe(Value):
    """A caching method.

    Attributes:
        groups: What is forecast. A module belongs to the first group that takes it. None: only what stays the same
            within a run is computed once.
        guidance: What is done with classifier-free guidance; None: nothing.

    Raises:
        ConfigError: Groups have one name, or more than one has a probe.
    """

    groups: tuple[Group, ...] = ()
    guidance: Guidance | None = None

    def __post_init__(self) -> None:
        groups: Any = self.groups
        if not isinstance(groups, (tuple, list)) or not all(isinstance(group, Group) for group in groups):
            raise ConfigError(
                f"expected a tuple of groups, got {groups!r}", where="Recipe.groups", hint="Recipe((Group(...),))"
            )
        object.__setattr__(self, "groups", tuple(groups))
        names = [group.name for group in self.groups] + ([self.guidance.group] if self.guidance is not None else [])
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two groups are called {twice!r}", where="Recipe.groups", hint="rename one of them")
        if sum(group.probe is not None for group in self.groups) > 1:
            raise ConfigError(
                "more than one group has a probe",
                where="Recipe.groups",
                hint="a program asks the host once: let one group decide",
            )

    def bind(self, num_inference_steps: int | None) -> Recipe:
        """This recipe for runs of so many steps.

        Raises:
            ConfigError: The number is needed, and None.
        """
        groups = [group.bind(num_inference_steps) for group in self.groups]
        guidance = self.guidance
        if guidance is not None:
            guidance = dataclasses.replace(guidance, schedule=guidance.schedule.bind(num_inference_steps))
        return dataclasses.replace(self, groups=tuple(groups), guidance=guidance)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON takes it, with the version of the schema.

        Raises:
            ConfigError: Something in it is a function of Python's.
        """
        return {"schema": SCHEMA, "recipe": to_dict(self, "recipe")}

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON: ``options={"cache": "path.json"}`` reads it.

        Raises:
            ConfigError: Something in it is a function of Python's.
        """
        text = json.dumps(self.to_dict(), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> Recipe:
        """The recipe that was saved, equal to it.

        Raises:
            ConfigError: It is of another schema, no recipe, or holds a value that is not known here.
        """
        check_schema(saved, "recipe")
        value = from_dict(saved.get("recipe"), "recipe")
        if not isinstance(value, Recipe):
            raise ConfigError(f"expected a Recipe, got {type(value).__name__}", where="recipe")
        return value

    @property
    def decider(self) -> Group | None:
        """The group that has a probe."""
        return next((group for group in self.groups if group.probe is not None), None)

    @property
    def measures(self) -> bool:
        """Every step is measured, and none predicted on purpose."""
        return self.decider is not None and self.decider.measures

    @property
    def needs_timestep(self) -> bool:
        """Its schedules or forecasts read the timestep."""
        by_timestep = any(part.forecast.spacing == "timestep" for group in self.groups for part in group.parts)
        sigma = self.decider is not None and isinstance(self.decider.probe, Latents) and self.decider.probe.sigma
        return by_timestep or sigma or any(schedule.needs_timestep for schedule in self._schedules)

    @property
    def needs_model(self) -> bool:
        """Its weights are functions of the model's modules."""
        per_region = any(part.forecast.form.per_region for group in self.groups for part in group.parts)
        return per_region or (self.guidance is not None and self.guidance.needs_model)

    @property
    def streams(self) -> bool:
        """It cuts spans of blocks, or has a probe."""
        return self.decider is not None or any(isinstance(p.cut, Blocks) for g in self.groups for p in g.parts)

    @property
    def _schedules(self) -> Sequence[Schedule]:
        own = [group.schedule for group in self.groups]
        return own if self.guidance is None else [*own, self.guidance.schedule]

    def __str__(self) -> str:
        lines = [str(group) for group in self.groups]
        if self.guidance is not None:
            lines.append(f"{self.guidance.group}: the branches' last difference | {self.guidance.schedule}")
        return "\n".join(lines) or "nothing is forecast"


def _require(value: object, name: str, kind: type | tuple[type, ...], what: str) -> None:
    given = getattr(value, name)
    if not isinstance(given, kind):
        raise ConfigError(f"expected {what}, got {given!r}", where=f"{type(value).__name__}.{name}")
