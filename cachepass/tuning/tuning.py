"""Tuning: what was found, as a value, a table and a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MethodConfig, TunedConfig
from ..errors import ConfigError, OptionError
from ..inspect.tables import human_bytes, table
from ..recipe.value import SCHEMA, check_schema


@dataclass(frozen=True)
class Tuned:
    """The best that was found for a number of computed steps.

    Attributes:
        computed: Steps that are computed, of a run.
        share: FLOPs of a run, as a share of an uncached one's, 0 to 1; None: unknown, because sizes depend on data.
        psnr: Decibels against the uncached results, mean over runs that it was not tuned with; None: there was none.
        calibrated: The same over the calibration runs.
        fixed: The best fixed method on the calibration runs, its decibels there, and in the other runs.
        kept_bytes: What is kept from step to step in each trajectory.
        errors: Relative error of the forecast of each step along an uncached run, 0 for computed ones: where errors
            arise.
        found: Which search found it.
        config: For ``options["cache"]``.
    """

    computed: int
    share: float | None
    psnr: float | None
    calibrated: float
    fixed: tuple[str, float, float | None] | None
    kept_bytes: int
    errors: tuple[float, ...]
    found: str
    config: TunedConfig


@dataclass(frozen=True)
class Tuning:
    """What :func:`cachepass.tune` found.

    Attributes:
        model: The class of the model.
        steps: Of its runs.
        frontier: One entry for each budget, by computed steps.
        notes: What was noticed: cuts that this model has not, an interruption.
    """

    model: str
    steps: int
    frontier: tuple[Tuned, ...]
    notes: tuple[str, ...] = ()

    def config(self, steps: int | None = None, *, quality: float | None = None) -> TunedConfig:
        """The config with the best quality among those of at most ``steps`` computed steps; or the one with the fewest
        that reaches ``quality`` (decibels; of runs that it was not tuned with, where such were made).

        Raises:
            OptionError: There is none.
        """
        points = [
            point
            for point in self.frontier
            if (steps is None or point.computed <= steps) and (quality is None or _quality(point) >= quality)
        ]
        if not points:
            raise OptionError(
                "nothing was found that is " + (f"as good as {quality:g} dB" if quality is not None else "so cheap"),
                where="Tuning.config",
                hint="there are " + "; ".join(f"{p.computed} steps: {_quality(p):.1f} dB" for p in self.frontier)
                if self.frontier
                else "tune with more steps",
            )
        best = min(points, key=lambda p: p.computed) if quality is not None else max(points, key=_quality)
        return best.config

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        points = [
            {f.name: getattr(point, f.name) for f in dataclasses.fields(point)} | {"config": point.config.to_dict()}
            for point in self.frontier
        ]
        tuning = {"model": self.model, "steps": self.steps, "notes": list(self.notes), "frontier": points}
        return {"schema": SCHEMA, "tuning": tuning}

    def save(self, path: str | Path) -> None:
        """Write all of it as JSON. ``options={"cache": path}`` takes the file where it holds one config."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Tuning:
        """What was saved, equal to it.

        Raises:
            OptionError: The file cannot be read, or was cut off.
            ConfigError: It was written by another version, or is no tuning.
        """
        where = f"Tuning.load({str(path)!r})"
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            hint = "it is whole when Tuning.save returns: copy it again, or tune again"
            raise OptionError(f"cannot be read: {error}", where=where, hint=hint) from None
        if not isinstance(saved, Mapping) or not isinstance(saved.get("tuning"), Mapping):
            raise ConfigError("it is no tuning", where=where, hint="give a file that Tuning.save wrote")
        check_schema(saved, "tuning")
        tuning = saved["tuning"]
        try:
            frontier = tuple(_tuned(point) for point in tuning["frontier"])
            return Tuning(tuning["model"], tuning["steps"], frontier, tuple(tuning["notes"]))
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"it is not whole: {error!r}", where=where, hint="tune again, and save it") from None

    def to_html(self, path: str | Path | None = None) -> str:
        """One HTML page that needs no network: the frontier, schedules, weights, and where errors arise; written to
        ``path`` if that is given."""
        from ..inspect.report.tuning import render  # only here: who wants no page need not load the template engine

        page = render(self, [cells(point, self.steps) for point in self.frontier])
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def __str__(self) -> str:
        columns = ("computed", "FLOPs", "PSNR dB", "calibrated", "kept", "found by", "best fixed method", "")
        rows = [cells(point, self.steps) for point in self.frontier]
        cuts = ", ".join(dict.fromkeys(str(point.config.cut) for point in self.frontier))
        notes = "".join(f"\n{note}" for note in self.notes)
        return f"{self.model}, runs of {self.steps} steps, cut: {cuts}\n\n{table(columns, rows)}{notes}"


def cells(point: Tuned, steps: int) -> tuple[str, ...]:
    """One line of the table."""
    return (
        f"{point.computed} of {steps}",
        "unknown" if point.share is None else f"{100 * point.share:.0f} %",
        "" if point.psnr is None else f"{point.psnr:.1f}",
        f"{point.calibrated:.1f}",
        human_bytes(point.kept_bytes),
        point.found,
        "" if point.fixed is None else f"{point.fixed[1] if point.fixed[2] is None else point.fixed[2]:.1f}",
        "" if point.fixed is None else point.fixed[0],
    )


def _quality(point: Tuned) -> float:
    return point.calibrated if point.psnr is None else point.psnr


def _tuned(saved: Mapping[str, Any]) -> Tuned:
    config = MethodConfig.from_dict(saved["config"])
    if not isinstance(config, TunedConfig):
        raise TypeError(f"config is a {type(config).__name__}")
    fixed: Sequence[Any] | None = saved["fixed"]
    given = {f.name: saved[f.name] for f in dataclasses.fields(Tuned)}
    return Tuned(
        **given
        | {
            "config": config,
            "errors": tuple(saved["errors"]),
            "fixed": None if fixed is None else (fixed[0], fixed[1], fixed[2]),
        }
    )
