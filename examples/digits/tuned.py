"""Tuned caches against all others, on seeds and digits that nothing was tuned with.

    python examples/digits/tuned.py            # docs/data/tuned.json, docs/images/tuned.svg
    python examples/digits/tuned.py --draw     # print and draw again, sample nothing
    cachepass tune examples/digits/tuned.py:loop --steps 10    # one number of steps, as a user tunes

Calibration runs are 20 pictures of the digits 0 to 4. On these ``cachepass.tune`` finds a config for each number of
computed steps, and the grid of everything else - the methods that decide in the run at several thresholds, fixed
schedules with all forecasts and warm-ups - has its best found, at no more FLOPs. What is told is measured with other
noise, on the digits 5 to 9.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import adaptive
import click
import torch
from curves import COLOURS, DOCS, STYLE, accuracy
from demo import psnr, sample
from models import HERE, load_dit
from rich.console import Console
from rich.progress import Progress

import cachepass
from cachepass.cut import Blocks
from cachepass.forecast import Hermite, Reuse, Taylor
from cachepass.schedule import Mask
from cachepass.tuning.candidates import fixed_methods
from cachepass.tuning.schedules import spread_evenly

BUDGETS = (8, 10, 13, 16, 20, 25)
STEPS, GUIDANCE = 50, 2.0
_DEAR = 60.0  # percent of FLOPs, above all budgets: such points are left out
_CLASSES = (0, 1, 2, 3, 4)
_OTHERS = (5, 6, 7, 8, 9)
_DOCUMENTED = "TaylorSeer, documented"
#: Methods as their documents set them, but for the knob that says how much is skipped.
DOCUMENTED = (_DOCUMENTED, "FirstBlockCache", "DBCache", "TeaCache", "MagCache", "SeaCache")


@dataclass(frozen=True)
class Pictures:
    """Noise, labels, and what the model makes of them without a cache."""

    noise: torch.Tensor
    labels: torch.Tensor
    guidance: float = GUIDANCE
    steps: int = STEPS

    @classmethod
    def of(cls, seed: int, classes: tuple[int, ...], count: int, **how: Any) -> Pictures:
        noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        return cls(noise, torch.tensor([classes[i % len(classes)] for i in range(count)]), **how)

    def draw(self, model: Any) -> torch.Tensor:
        with cachepass.cache_context("digits"):  # whose steps these are is known from the first one on
            return sample(model, self.noise, self.labels, self.steps, self.guidance)


@dataclass(frozen=True)
class Point:
    """What a config gave: decibels of all pictures as one, mean of theirs, percent that are read right, FLOPs."""

    name: str
    psnr_db: float
    mean_db: float
    accuracy_percent: float
    flops_percent: float
    computed: int


def mean_psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over pictures; the range is 2, equal pictures count 100 dB."""
    errors = (images - reference).square().mean((1, 2, 3)).clamp_min(4e-10)
    return float((10 * torch.log10(4 / errors)).mean())


def measured(name: str, cache: Any, pictures: Pictures, reference: torch.Tensor) -> Point:
    """One run with a fresh compiled model, in eager lowering."""
    torch._dynamo.reset()
    options: Any = {"cache": cache, "lowering": "eager", "invariants": False, "num_inference_steps": pictures.steps}
    compiled = torch.compile(load_dit(), backend="cached_inductor", fullgraph=True, options=options)
    images = pictures.draw(compiled)
    done = cachepass.summary(compiled)
    (computed,) = done.computed.values()
    assert done.saved is not None
    return Point(
        name,
        psnr(images, reference),
        mean_psnr(images, reference),
        accuracy(images, pictures.labels),
        100 * (1 - done.saved),
        computed,
    )


def grid(known: adaptive.Calibration) -> Iterator[tuple[str, Any]]:
    """Everything else, by name."""
    seen = json.loads((DOCS / "data" / "adaptive.json").read_text())["points"]
    dear = {(p["curve"], p["value"]) for p in seen if p["flops_percent"] > _DEAR}
    for curve, (knob, values, make) in adaptive.CURVES.items():
        for value in () if curve == "tuned" else values:
            if (curve, value) in dear:
                continue
            yield f"{curve}, {knob} {value}", make(value, known)
    for interval in (2, 3, 4, 5, 6, 7, 8, 10):
        config = cachepass.TaylorSeerCacheConfig(cache_interval=interval, cache_identifiers=["block"])
        yield f"{_DOCUMENTED}, cache_interval {interval}", config


def fixed_config(point: cachepass.Tuned) -> Any:
    """The best fixed method that the search saw, as a config."""
    assert point.fixed is not None
    candidate = next(c for c in fixed_methods(point.computed, STEPS) if c.name == point.fixed[0])
    rules = {rule.form.name: rule for rule in (Reuse(), Taylor(1), Taylor(2), Hermite(2))}
    mask = Mask([int(step in candidate.computed) for step in range(STEPS)])
    name = candidate.name.rpartition(", ")[2]
    return cachepass.CacheConfig(cut=Blocks(), schedule=mask, forecast=rules[name])


def loop() -> tuple[Any, Callable[[Any, int], torch.Tensor]]:
    """The model, and its sampling loop: ten pictures in each run."""
    return load_dit(), lambda model, run: Pictures.of(1000 + run, _CLASSES, 10).draw(model)


def find(advance: Callable[[str], None]) -> dict[str, Any]:
    """Tune, and look through the grid, on the calibration runs; measure the best on the others."""
    runs = [Pictures.of(1000 + run, _CLASSES, 10) for run in range(2)]
    start = time.perf_counter()
    tuning = cachepass.tune(*loop(), steps=list(BUDGETS), runs=2, validate=0, progress=False)
    seconds = time.perf_counter() - start
    advance("grid")
    calibration = Pictures(torch.cat([r.noise for r in runs]), torch.cat([r.labels for r in runs]))
    reference = calibration.draw(load_dit())
    known = adaptive.calibrate(10, STEPS, GUIDANCE, 1000)
    every = dict(grid(known))
    looked = []
    for name, cache in every.items():
        looked.append(measured(name, cache, calibration, reference))
        advance(f"grid: {name}")
    test = Pictures.of(0, _OTHERS, 40)
    expected = test.draw(load_dit())
    rows = []
    for point in tuning.frontier:
        best = _best(looked, point)
        fixed = measured(f"fixed: {point.fixed[0]}" if point.fixed else "", fixed_config(point), calibration, reference)
        cache = every[best.name] if best.mean_db >= fixed.mean_db else fixed_config(point)
        row = {
            "budget": point.computed,
            "tuned": asdict(measured("tuned", point.config, test, expected)),
            "grid": asdict(measured(max(best, fixed, key=lambda p: p.mean_db).name, cache, test, expected)),
        }
        for method in DOCUMENTED:
            own = [p for p in looked if p.name.startswith(f"{method}, ") and p.flops_percent <= _allowed(point)]
            if own:
                chosen = max(own, key=lambda p: p.mean_db)
                row[method] = asdict(measured(chosen.name, every[chosen.name], test, expected))
        rows.append(row)
        advance(f"{point.computed} computed steps")
    return {
        "seconds": seconds,
        "accuracy": accuracy(expected, test.labels),
        "rows": rows,
        "transfer": transfer(tuning, advance),
        "tuning": tuning.to_dict(),
    }


def _allowed(point: cachepass.Tuned) -> float:
    """FLOPs of a tuned run, in percent, and what rounding is worth."""
    assert point.share is not None
    return 100 * point.share + 0.5


def _best(looked: list[Point], point: cachepass.Tuned) -> Point:
    return max((p for p in looked if p.flops_percent <= _allowed(point)), key=lambda p: p.mean_db)


def transfer(tuning: cachepass.Tuning, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """What is lost elsewhere: other seeds, other digits, other guidance, 30 steps."""
    places = {
        "the calibration runs": Pictures.of(1000, _CLASSES, 20),
        "other noise": Pictures.of(0, _CLASSES, 20),
        "other noise, other digits": Pictures.of(0, _OTHERS, 20),
        **{f"guidance {g:g}": Pictures.of(0, _OTHERS, 20, guidance=g) for g in (1.0, 3.0, 4.0)},
        "30 steps": Pictures.of(0, _OTHERS, 20, steps=30),
    }
    rows = []
    for place, pictures in places.items():
        expected = pictures.draw(load_dit())
        row: dict[str, Any] = {"place": place}
        for point in (p for p in tuning.frontier if p.computed in (10, 16)):
            found = measured("tuned", point.config, pictures, expected)
            other = measured("fixed", _same_number(found.computed, pictures.steps), pictures, expected)
            row[str(point.computed)] = {"tuned": asdict(found), "fixed": asdict(other)}
            advance(place)
        rows.append(row)
    return rows


def _same_number(computed: int, steps: int) -> Any:
    """As many computed steps, evenly behind a warm-up of 2, with Taylor(1): for comparison."""
    chosen = spread_evenly(computed, steps, 2, last=False)
    mask = Mask([int(step in chosen) for step in range(steps)])
    return cachepass.CacheConfig(cut=Blocks(), schedule=mask, forecast=Taylor(1))


def write_configs(tuning: dict[str, Any], out: Path) -> None:
    """Those of the demo, beside its models; elsewhere in a folder of their own."""
    folder = HERE if out == DOCS else out
    for point in tuning["tuning"]["frontier"]:
        if point["computed"] in (10, 16):
            text = json.dumps(point["config"], indent=1)
            (folder / f"tuned-{point['computed']}.json").write_text(text + "\n")


def show(found: dict[str, Any]) -> None:
    """The tables of docs/methods/tuning.md."""

    def cell(point: dict[str, Any] | None) -> str:
        return "" if point is None else f"{point['psnr_db']:.1f} / {point['mean_db']:.1f}"

    print(
        "| computed of 50 | tuned | accuracy % | best of the grid | accuracy % | which | "
        + " | ".join(DOCUMENTED)
        + " |"
    )
    print("|---" * (6 + len(DOCUMENTED)) + "|")
    for row in found["rows"]:
        tuned, best = row["tuned"], row["grid"]
        cells = [str(row["budget"]), f"**{cell(tuned)}**", f"{tuned['accuracy_percent']:.0f}", cell(best)]
        cells += [f"{best['accuracy_percent']:.0f}", best["name"], *(cell(row.get(method)) for method in DOCUMENTED)]
        print("| " + " | ".join(cells) + " |")
    gains = [row["tuned"]["mean_db"] - row["grid"]["mean_db"] for row in found["rows"]]
    print(f"\ngain over the grid, mean of the pictures: {sum(gains) / len(gains):.1f} dB, least {min(gains):.1f}")
    for method in DOCUMENTED:
        own = [row["tuned"]["mean_db"] - row[method]["mean_db"] for row in found["rows"] if method in row]
        print(f"over {method}: {sum(own) / len(own):.1f} dB" if own else f"{method}: no point")
    print(f"uncached accuracy {found['accuracy']:.0f} %; tuned in {found['seconds']:.0f} s\n")
    print("| where | 10 of 50: tuned | even, Taylor(1) | 16 of 50: tuned | even, Taylor(1) |\n|---|---|---|---|---|")
    for row in found["transfer"]:
        cells = [cell(row[count][kind]) for count in ("10", "16") for kind in ("tuned", "fixed")]
        print("| " + " | ".join([row["place"], *cells]) + " |")


def draw(found: dict[str, Any], path: Path) -> None:
    """Decibels over computed steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(7.2, 4.6))
        figure.set_facecolor("white")
        for index, name in enumerate(("tuned", "grid", *DOCUMENTED)):
            points = [(row["budget"], row[name]["mean_db"]) for row in found["rows"] if name in row]
            label = "best of the grid, found on the same runs" if name == "grid" else name
            axis.plot(*zip(*points, strict=True), color=COLOURS[index], label=label, marker="o", markersize=5)
        axis.set(
            xlabel="computed steps of 50, or as many FLOPs", ylabel="PSNR against uncached, mean of 40 pictures, dB"
        )
        axis.legend(fontsize=8.5, frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


@click.command(help=__doc__)
@click.option("--draw", "draw_only", is_flag=True, help="Print and draw what was measured.")
@click.option("--out", default=DOCS, type=click.Path(path_type=Path), help="Folder of data and pictures.")
def main(draw_only: bool, out: Path) -> None:
    path = out / "data" / "tuned.json"
    if not draw_only:
        with torch.no_grad(), warnings.catch_warnings(), Progress(console=Console(stderr=True)) as bar:
            warnings.simplefilter("ignore")
            task = bar.add_task("tuning", total=None)
            found = find(lambda what: bar.update(task, description=what, advance=1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(path.read_text())
    (out / "images").mkdir(exist_ok=True)
    write_configs(found["tuning"], out)
    show(found)
    draw(found, out / "images" / "tuned.svg")


if __name__ == "__main__":
    main()
