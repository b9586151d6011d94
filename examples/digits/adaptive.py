"""Quality against computed steps: methods that decide in the run, fixed schedules, and forecasts.

    python examples/digits/adaptive.py                      # all: docs/data/adaptive.json, docs/images/adaptive-*.svg
    python examples/digits/adaptive.py --method MagCache    # one curve; the others are taken from the JSON
    python examples/digits/adaptive.py --draw               # draw again, sample nothing

Every point is one run with the same noise and labels in eager lowering, as in ``curves.py``. What TeaCache and MagCache
need for a checkpoint is measured first, in runs with other noise.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from curves import (
    COLOURS,
    DOCS,
    MARKERS,
    STYLE,
    accuracy,
    command,
    known_points,
    noise_and_labels,
    progress_bar,
    write_json,
)
from demo import psnr, sample
from models import load_dit
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import cachepass
from cachepass.config import MethodConfig
from cachepass.cut import Blocks, ModuleOutput
from cachepass.forecast import DMD, Chebyshev, ForecastRule, Hermite, Lagrange, Linear, Reuse, Taylor
from cachepass.schedule import Every, Final, MagnitudeBudget, Preset, Threshold, WarmUp

_WARM_UP = 5  # computed steps at the beginning, wherever that is not the method's own choice


@dataclass(frozen=True)
class Point:
    """One setting of one curve: the knob's value, and what a run with it gave."""

    curve: str
    knob: str
    value: float | str
    computed: int
    flops_percent: float
    psnr_db: float
    accuracy_percent: float
    cache_bytes: int


@dataclass(frozen=True)
class Calibration:
    """What two methods need for a checkpoint."""

    mag_ratios: tuple[float, ...]
    teacache: tuple[float, ...]


_Make = Callable[[Any, Calibration], Any]


def fixed(schedule: Callable[[Any], Any], forecast: ForecastRule) -> _Make:
    """The first block is computed, as a first-block cache does it, so that a step costs the same."""
    return lambda value, _: cachepass.CacheConfig(cut=Blocks(first=1), schedule=schedule(value), forecast=forecast)


def every(forecast: ForecastRule) -> tuple[str, tuple[Any, ...], _Make]:
    return "n", (2, 3, 4, 6, 8), fixed(lambda n: Every(n) & WarmUp(_WARM_UP), forecast)


def every_and_last(forecast: ForecastRule) -> tuple[str, tuple[Any, ...], _Make]:
    return "n", (2, 4, 8), fixed(lambda n: Every(n) & WarmUp(_WARM_UP) & Final(1), forecast)


def presets(forecast: ForecastRule) -> tuple[str, tuple[Any, ...], _Make]:
    return "preset", ("slow", "medium", "fast", "ultra"), fixed(Preset, forecast)


def dbcache(value: float, forecast: ForecastRule) -> cachepass.DBCacheConfig:
    return cachepass.DBCacheConfig(
        Fn_compute_blocks=1, residual_diff_threshold=value, max_warmup_steps=_WARM_UP, calibrator=forecast
    )


def seacache(value: float, order: int, retention: int) -> cachepass.SeaCacheConfig:
    return cachepass.SeaCacheConfig(
        threshold=value, residual_order=order, retention_steps=retention, max_consecutive_cached=0
    )


def magcache(value: float, known: Calibration) -> cachepass.MagCacheConfig:
    return cachepass.MagCacheConfig(
        threshold=value, mag_ratios=known.mag_ratios, max_skip_steps=10, retention_ratio=0.1
    )


def magcache_line(value: float, known: Calibration) -> cachepass.CacheConfig:
    schedule = MagnitudeBudget(known.mag_ratios, value, max_consecutive=10, retention_steps=_WARM_UP)
    return cachepass.CacheConfig(cut=Blocks(), schedule=schedule, forecast=Taylor(1))


def teacache(value: float, known: Calibration) -> cachepass.TeaCacheConfig:
    return cachepass.TeaCacheConfig(rel_l1_thresh=value, coefficients=known.teacache)


def teacache_line(value: float, known: Calibration) -> cachepass.CacheConfig:
    near = Threshold(value, accumulate=True, coefficients=known.teacache)
    return cachepass.CacheConfig(
        cut=Blocks(), schedule=near & WarmUp(_WARM_UP) & Final(1), forecast=Taylor(1), probe=ModuleOutput()
    )


def tuned(count: int, _: Calibration) -> cachepass.TunedConfig:
    """What ``tuned.py`` found, with pictures of other noise."""
    saved = json.loads((DOCS / "data" / "tuned.json").read_text())["tuning"]["tuning"]["frontier"]
    config = next(point["config"] for point in saved if point["computed"] == count)
    found = MethodConfig.from_dict(config)
    assert isinstance(found, cachepass.TunedConfig)
    return found


_DISTANCES = (0.05, 0.07, 0.1, 0.2, 0.35)
_SIGNAL = (0.04, 0.06, 0.1, 0.2, 0.4)
_TEA = (0.016, 0.025, 0.04, 0.08, 0.16)
_MAG = (0.02, 0.05, 0.15, 0.4, 1.0)

#: Curve -> the knob, its values, and the config.
CURVES: dict[str, tuple[str, tuple[Any, ...], _Make]] = {
    "Every(n)": every(Reuse()),
    "presets": presets(Reuse()),
    "FirstBlockCache": ("threshold", _DISTANCES, lambda v, _: cachepass.FirstBlockCacheConfig(threshold=v)),
    "DBCache": ("residual_diff_threshold", _DISTANCES, lambda v, _: dbcache(v, Reuse())),
    "TeaCache": ("rel_l1_thresh", _TEA, teacache),
    "MagCache": ("threshold", _MAG, magcache),
    "SeaCache": ("threshold", _SIGNAL, lambda v, _: seacache(v, 0, 1)),
    "Every(n) + Taylor(1)": every(Taylor(1)),
    "Every(n) + Taylor(2)": every(Taylor(2)),
    "Every(n) + Hermite(2)": every(Hermite(2)),
    "Every(n) + Lagrange(2)": every(Lagrange(2)),
    "Every(n) + Chebyshev": every(Chebyshev()),
    "Every(n) + Chebyshev, anchored": every(Chebyshev(anchored=True)),
    "Every(n) + DMD": every(DMD()),
    "presets + Taylor(1)": presets(Taylor(1)),
    "DBCache + Taylor(1)": ("residual_diff_threshold", _DISTANCES[::2], lambda v, _: dbcache(v, Taylor(1))),
    "TeaCache + Taylor(1)": ("rel_l1_thresh", _TEA[::2], teacache_line),
    "MagCache + Taylor(1)": ("threshold", _MAG[::2], magcache_line),
    "SeaCache + Taylor(1)": ("threshold", _SIGNAL[::2], lambda v, _: seacache(v, 1, _WARM_UP)),
    "Every(n), last step": every_and_last(Reuse()),
    "Every(n), last step + Taylor(1)": every_and_last(Taylor(1)),
    "TeaCache, not fitted": ("rel_l1_thresh", (0.1, 0.2, 0.4),
                             lambda v, _: cachepass.TeaCacheConfig(rel_l1_thresh=v)),
    "Every(n) + Linear": ("n", (3,), every(Linear())[2]),
    "tuned": ("steps", (8, 10, 13, 16, 20, 25), tuned),
}  # fmt: skip

_RULES = ("Every(n)", "Every(n), last step", "presets", "FirstBlockCache", "DBCache", "TeaCache", "MagCache",
          "SeaCache")  # fmt: skip
#: Picture -> its panels: a title, and the curves by the name in the legend.
PICTURES: dict[str, dict[str, dict[str, str]]] = {
    "adaptive-methods": {
        "reuse: the residual of the last computed step": {name: name for name in _RULES},
        f"Taylor(1), and {_WARM_UP} steps of warm-up for all but the presets": {
            name: f"{name} + Taylor(1)" for name in _RULES if f"{name} + Taylor(1)" in CURVES
        },
    },
    "adaptive-forecasts": {
        f"Every(n) after {_WARM_UP} steps of warm-up, n = 2, 3, 4, 6, 8": {
            "Reuse": "Every(n)",
            **{
                name.removeprefix("Every(n) + "): name
                for name in (
                    f"Every(n) + {forecast}"
                    for forecast in (
                        "Taylor(1)",
                        "Taylor(2)",
                        "Hermite(2)",
                        "Lagrange(2)",
                        "Chebyshev",
                        "Chebyshev, anchored",
                        "DMD",
                    )
                )
            },
        },
    },
}


def calibrate(images: int, steps: int, guidance: float, seed: int) -> Calibration:
    """MagCache's ratios and TeaCache's polynomial."""
    noise, labels = noise_and_labels(images, seed)
    torch._dynamo.reset()
    measuring = _compiled(cachepass.MagCacheConfig(calibrate=True), steps)
    sample(measuring, noise, labels, steps, guidance)
    ratios = cachepass.mag_ratios(measuring)
    torch._dynamo.reset()
    fit = cachepass.fit_teacache(load_dit(), lambda model: sample(model, noise, labels, steps, guidance))
    return Calibration(ratios, fit.coefficients)


def _compiled(cache: Any, steps: int) -> Any:
    options: Any = {"cache": cache, "lowering": "eager", "invariants": False, "num_inference_steps": steps}
    return torch.compile(load_dit(), backend="cached_inductor", fullgraph=True, options=options)


def measure(
    curve: str,
    value: Any,
    known: Calibration,
    noise: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    guidance: float,
    reference: torch.Tensor,
    advance: Callable[[], object],
) -> Point:
    """One run with a fresh compiled model."""
    torch._dynamo.reset()
    knob, _, make = CURVES[curve]
    compiled = _compiled(make(value, known), steps)
    images = sample(compiled, noise, labels, steps, guidance, advance)
    done = cachepass.summary(compiled)
    (computed,) = done.computed.values()
    assert done.saved is not None, "the model's sizes depend on no data"
    return Point(
        curve,
        knob,
        value,
        computed,
        100 * (1 - done.saved),
        psnr(images, reference),
        accuracy(images, labels),
        done.cache_bytes,
    )


def draw(points: Sequence[Point], settings: dict[str, Any], folder: Path) -> None:
    """PSNR over computed steps, a line per curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for picture, panels in PICTURES.items():
        with pyplot.rc_context(STYLE):
            figure, row = pyplot.subplots(
                1, len(panels), figsize=(7.2 if len(panels) == 1 else 11.5, 4.8), squeeze=False, sharey=True
            )
            figure.set_facecolor("white")
            first = next(iter(panels.values()))
            for axis, (title, curves) in zip(row[0], panels.items(), strict=True):
                axis.set_title(title, fontsize=9.5, loc="left", color="#444444")
                axis.set(xlabel=f"computed steps of {settings['steps']}")
                for name, curve in curves.items():
                    index = list(first).index(name)
                    own = sorted((p for p in points if p.curve == curve), key=lambda p: p.computed)
                    if not own:
                        continue  # not measured yet
                    axis.plot(
                        [p.computed for p in own],
                        [p.psnr_db for p in own],
                        color=COLOURS[index],
                        label=name,
                        marker=MARKERS[index],
                        markersize=5,
                        linewidth=1.6,
                        linestyle="--" if index < 3 and len(panels) > 1 else "-",
                    )
                axis.legend(fontsize=8.5, frameon=False, loc="lower right")
            row[0][0].set_ylabel("PSNR against the uncached images, dB")
            note = f"{settings['images']} digits, {settings['steps']} steps"
            figure.text(0.99, 0.012, note, ha="right", fontsize=8.5, color="#555555")
            figure.tight_layout(rect=(0, 0.02, 1, 1))
            figure.savefig(folder / f"{picture}.svg", metadata={"Date": None})
            pyplot.close(figure)


def show(console: Console, points: Sequence[Point]) -> None:
    table = Table("curve", "knob", "computed", "FLOPs %", "PSNR dB", "accuracy %", "cache MiB", box=SIMPLE)
    for p in points:
        table.add_row(
            p.curve,
            f"{p.knob} {p.value}",
            str(p.computed),
            f"{p.flops_percent:.1f}",
            f"{p.psnr_db:.1f}",
            f"{p.accuracy_percent:.0f}",
            f"{p.cache_bytes / 2**20:.1f}",
        )
    console.print(table)


@command(list(CURVES))
def main(
    images: int, steps: int, guidance: float, seed: int, methods: tuple[str, ...], draw_only: bool, out: Path
) -> None:
    """Measure quality against computed steps; print the table, write JSON and pictures."""
    console, path = Console(width=max(110, Console().width)), out / "data" / "adaptive.json"
    settings = {"images": images, "steps": steps, "guidance": guidance, "seed": seed}
    chosen = () if draw_only else methods or tuple(CURVES)
    stored = known_points(path, settings, methods, draw_only)
    settings = stored.get("settings", settings)
    points = [Point(**point) for point in stored.get("points", ()) if point["curve"] not in chosen]
    if chosen:
        noise, labels = noise_and_labels(images, seed)
        jobs = [(curve, value) for curve in chosen for value in CURVES[curve][1]]
        with torch.no_grad(), progress_bar(console) as progress, warnings.catch_warnings():
            task = progress.add_task("uncached and calibration", total=steps * (1 + len(jobs)))

            def advance() -> None:
                progress.advance(task)

            reference = sample(load_dit(), noise, labels, steps, guidance, advance)
            reference_accuracy = accuracy(reference, labels)
            known = (
                Calibration(**{name: tuple(v) for name, v in stored["calibration"].items()})
                if stored
                else calibrate(10, steps, guidance, seed + 1)
            )
            for curve, value in jobs:
                progress.update(task, description=f"{curve}, {value}")
                points.append(measure(curve, value, known, noise, labels, steps, guidance, reference, advance))
                points.sort(key=lambda point: list(CURVES).index(point.curve))
                run = " ".join(
                    ["python examples/digits/adaptive.py", *([f"--images {images}"] if images != 40 else [])]
                )
                write_json(path, run, settings, reference_accuracy, points, calibration=asdict(known))
    show(console, points)
    draw(points, settings, out / "images")


if __name__ == "__main__":
    main()
