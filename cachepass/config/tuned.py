"""What ``cachepass.tune`` found for a model, as a config."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, warn
from ..recipe.cut import Blocks, Cut, Modules
from ..recipe.forecast import Fitted, ForecastRule
from ..recipe.recipe import Group, Part, Recipe
from ..recipe.schedule import KeySteps
from ..recipe.value import Value
from ..recipe.vocabulary import Region
from .base import MethodConfig, cache_config


@dataclass(frozen=True)
class Origin(Value):
    """What a config was tuned for.

    Attributes:
        model: The class of the model.
        parts: What it consists of, for people: ``"10 blocks, 10 attentions, 10 MLPs"``.
        digest: Of the paths of these modules; another model has another one.
        psnr: Decibels against the uncached results of runs that it was not tuned with; None: no such run was made.
    """

    model: str
    parts: str
    digest: str
    psnr: float | None = None


def parts_of(regions: Sequence[Region]) -> tuple[str, str]:
    """The modules that make a model, for people and as a digest: its blocks, attentions and MLPs. Adapters and
    quantisation change neither."""
    kinds = {"block": "blocks", "attention": "attentions", "mlp": "MLPs"}
    found = [(region.path, kind) for region in regions for kind in kinds if region.is_of(kind)]
    counts = Counter(kind for _, kind in dict.fromkeys(found))
    told = ", ".join(f"{counts[kind]} {name}" for kind, name in kinds.items() if counts[kind]) or "no blocks"
    text = "\n".join(sorted({f"{path} {kind}" for path, kind in found}))
    return told, hashlib.sha256(text.encode()).hexdigest()[:16]


@cache_config("tuned")
class TunedConfig(MethodConfig):
    """A cache that was tuned for a model: ``cachepass.tune(...).config(steps=10)``, or a file that it wrote.

    Attributes:
        cut: Where.
        schedule: Which steps are computed, of a run of how many.
        forecast: What stands in for the others.
        origin: What it was tuned for. It is an error to use it for a model of other modules; a run of another number
            of steps is computed at the same timesteps.
    """

    cut: Cut = Blocks()
    schedule: KeySteps = KeySteps((0,), (1000.0,))
    forecast: ForecastRule = Fitted(1, (1000.0,), ())
    origin: Origin = Origin("", "", "")

    def check(self) -> None:
        for name, kind, hint in (
            ("cut", (Blocks, Modules), "a value of cachepass.cut"),
            ("schedule", KeySteps, "cachepass.schedule.KeySteps"),
            ("forecast", ForecastRule, "a value of cachepass.forecast"),
            ("origin", Origin, "what cachepass.tune writes"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise self.fail(name, f"expected {hint}, got {value!r}")
        if self.steps < 2:
            hint = 'tuning = cachepass.tune(model, sample, steps=10); options={"cache": tuning.config()}'
            raise self.fail("schedule", "nothing was tuned", hint)

    @property
    def steps(self) -> int:
        """Steps of the runs that it was tuned with."""
        return len(self.schedule.timesteps)

    @property
    def label(self) -> str:
        return f"tuned({len(self.schedule.computed)} of {self.steps})"

    def __str__(self) -> str:
        quality = "" if self.origin.psnr is None else f", {self.origin.psnr:.1f} dB"
        return (
            f"{self.label}, for {self.origin.model} ({self.origin.parts}){quality}\n"
            f"cut: {self.cut}; {self.schedule}; {self.forecast}"
        )

    def recipe(self, num_inference_steps: int | None) -> Recipe:
        group = Group("tuned", self.schedule, (Part(self.cut, self.forecast),))
        other = None if num_inference_steps is None else self.why_other(num_inference_steps)
        if other is not None:
            warn(other)
        return Recipe((group,)).bind(num_inference_steps)

    def why_other(self, steps: int) -> str | None:
        if steps == self.steps:
            return None
        return (
            f"tuned for runs of {self.steps} steps, and used for one of {steps}: steps are computed at the timesteps "
            "of the tuned ones. Tune for this number of steps to get the best of it"
        )

    def review(self, regions: Sequence[Region]) -> None:
        """Raise a ConfigError for another model than the one that it was tuned for."""
        told, digest = parts_of(regions)
        if self.origin.digest and digest != self.origin.digest:
            raise ConfigError(
                f"it was tuned for {self.origin.model} ({self.origin.parts}), and this model has {told}",
                where=f"{type(self).__name__}.origin",
                hint="tune this model: cachepass.tune(model, sample, steps=...)",
            )

    def where(self, group: str, part: Part | None = None) -> str:  # noqa: ARG002 (it has one of each)
        return f"{type(self).__name__}.{'schedule' if part is None else 'cut'}"
