"""HTML: what was tuned, as one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .page import environment, own

_HEIGHT = 46  # pixels of the largest error's bar


def render(tuning: Any, cells: Sequence[Sequence[str]]) -> str:
    """The page. ``tuning`` is a :class:`~cachepass.Tuning`, ``cells`` are its points' figures as text."""
    return (
        environment()
        .get_template("tuning.html")
        .render(
            style=own("page.css"),
            tuning=tuning,
            rows=list(zip(tuning.frontier, cells, strict=True)),
            curves=_curves(tuning),
            timelines=[_timeline(point) for point in tuning.frontier],
            weights=[_weights(point) for point in tuning.frontier],
        )
    )


def _curves(tuning: Any) -> list[dict[str, Any]]:
    """Decibels over computed steps: places in percent of the picture's width and height."""
    named: dict[str, list[tuple[int, Any]]] = {
        "tuned, other runs": [(p.computed, p.psnr) for p in tuning.frontier if p.psnr is not None],
        "tuned, calibration runs": [(p.computed, p.calibrated) for p in tuning.frontier],
        "best fixed method, other runs": [(p.computed, p.fixed[2]) for p in tuning.frontier if p.fixed is not None],
    }
    named = {name: [(n, value) for n, value in points if value is not None] for name, points in named.items()}
    values = [value for points in named.values() for _, value in points]
    if not values:
        return []
    low, high = min(values), max(values)
    least, most = min(p.computed for p in tuning.frontier), max(p.computed for p in tuning.frontier)
    curves = []
    for number, (name, points) in enumerate(named.items()):
        places = [
            {
                "x": 6 + 86 * (computed - least) / max(most - least, 1),
                "y": 90 - 78 * (value - low) / max(high - low, 1e-9),
                "computed": computed,
                "value": value,
            }
            for computed, value in points
        ]
        curves.append({"name": name, "number": number, "points": places})
    return [curve for curve in curves if curve["points"]]


def _timeline(point: Any) -> list[dict[str, Any]]:
    """One cell for each step: whether it is computed, and the height of its error."""
    computed, worst = set(point.config.schedule.computed), max(point.errors) or 1.0
    return [
        {"step": step, "computed": step in computed, "error": error, "height": max(1, round(_HEIGHT * error / worst))}
        for step, error in enumerate(point.errors)
    ]


def _weights(point: Any) -> list[tuple[int, str, str]]:
    """Step, kept steps and weights, where they were fitted."""
    table = getattr(point.config.forecast, "table", ())
    return [(e.step, ", ".join(map(str, e.kept)), ", ".join(f"{w:+.3f}" for w in e.weights)) for e in table]
