"""Quality against work: sample digits over each method's main knob, and draw the pictures of the documentation.

    python examples/digits/curves.py                 # all methods: docs/data/curves.json and docs/images/*.svg
    python examples/digits/curves.py --method pab    # one of them; the others are taken from the JSON
    python examples/digits/curves.py --draw          # draw again, sample nothing

Every point is one run with the same noise and labels, programs in eager lowering: what is measured is quality, and the
work is counted, not timed. Work is the FLOPs of the programs that ran (matrix products, convolutions, attentions;
``cachepass.program.flops``), as a share of the uncached run's.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from demo import psnr, sample
from models import guided_inputs, load_classifier, load_dit
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import cachepass
from cachepass.program.flops import count_flops

DOCS = Path(__file__).parents[2] / "docs"
_EARLY = (100, 950)  # the timesteps in which PAB may skip, as in the demo
_LATE = (-1, 900)  # those of FasterCache


@dataclass(frozen=True)
class Point:
    """One setting of one curve: the knob's value, and what a run with it gave."""

    method: str
    curve: str
    knob: int
    flops_percent: float
    psnr_db: float
    accuracy_percent: float
    computed: int
    predicted: int
    cache_bytes: int


def taylorseer(order: int) -> Callable[[int], dict[str, Any]]:
    return lambda interval: {
        "method": "taylorseer",
        "cache_interval": interval,
        "max_order": order,
        "disable_cache_before_step": 5,
        "cache_identifiers": ["block"],
        "taylor_factors_dtype": torch.float32,
    }


def pab(mlp: bool) -> Callable[[int], dict[str, Any]]:
    return lambda every: {
        "method": "pab",
        "spatial_attention_block_skip_range": every,
        "mlp_block_skip_range": every if mlp else None,
        "spatial_attention_timestep_skip_range": _EARLY,
        "mlp_timestep_skip_range": _EARLY,
    }


def fastercache(attention: int | None) -> Callable[[int], dict[str, Any]]:
    return lambda every: {
        "method": "fastercache",
        "tensor_format": "BCHW",
        "unconditional_batch_skip_range": every,
        "spatial_attention_block_skip_range": attention,
        "unconditional_batch_timestep_skip_range": _LATE,
        "spatial_attention_timestep_skip_range": _LATE,
    }


#: Method -> the knob, its values, and one curve for each name.
CURVES: dict[str, tuple[str, range, dict[str, Callable[[int], dict[str, Any]]]]] = {
    "taylorseer": ("cache_interval", range(2, 9), {f"order {order}": taylorseer(order) for order in range(3)}),
    "pab": ("skip range", range(2, 7), {"attention": pab(False), "attention and MLP": pab(True)}),
    "fastercache": (
        "unconditional_batch_skip_range",
        range(2, 9),
        {"branch": fastercache(None), "branch and attention": fastercache(2)},
    ),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")  # Okabe and Ito's,
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "d")  # which colour-blind people tell apart, and a grey
STYLE: Any = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "cachepass",
              "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e2e2e2"}  # fmt: skip


@functools.cache
def program_flops(method: str, curve: str, images: int) -> dict[str, int]:
    """FLOPs of one step in each phase. The knob only says when: all points of a curve have the same programs."""
    _, knobs, curves = CURVES[method]
    batch, classes = guided_inputs(torch.zeros(images, 1, 28, 28), torch.zeros(images, dtype=torch.int64))
    plan = cachepass.explain(
        load_dit(),
        hidden_states=batch,
        timestep=torch.full((len(batch),), 500.0),
        class_labels=classes,
        cache=curves[curve](knobs[0]),
        options={"invariants": False},
    )
    return {phase: count_flops(plan.variant(phase).graph) for phase in plan.phases}


def work(done: cachepass.Summary, flops: dict[str, int], steps: int) -> float:
    """FLOPs of the run that ``done`` tells of, in percent of a run that computes everything.

    Each program's FLOPs times the number of steps that ran it. A step that skips the unconditional branch runs half of
    the batch, with or without attentions; all other groups of a method's settings here share one schedule.
    """
    if "unconditional" not in done.predicted:
        group = next(iter(done.predicted))
        total = done.computed[group] * flops["compute"] + done.predicted[group] * flops["predict"]
        return 100 * total / (steps * flops["compute"])
    half = {name.removeprefix("half:"): count for name, count in flops.items() if name.startswith("half")}
    skipped, attention = done.predicted["unconditional"], done.predicted.get("spatial", 0)
    least, most = min(half.values()), max(half.values())
    total = done.computed["unconditional"] * flops["both"] + attention * least + (skipped - attention) * most
    return 100 * total / (steps * flops["both"])


def measure(
    method: str,
    curve: str,
    knob: int,
    noise: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    guidance: float,
    reference: torch.Tensor,
    advance: Callable[[], object],
) -> Point:
    """One run with a fresh compiled model."""
    torch._dynamo.reset()
    cache = CURVES[method][2][curve](knob)
    compiled = torch.compile(
        load_dit(),
        backend="cached_inductor",
        fullgraph=True,
        options={"cache": cache, "lowering": "eager", "invariants": False},
    )
    images = sample(compiled, noise, labels, steps, guidance, advance)
    done = cachepass.summary(compiled)
    predicted = max(done.predicted.values())
    flops = program_flops(method, curve, len(noise))
    return Point(
        method,
        curve,
        knob,
        work(done, flops, steps),
        psnr(images, reference),
        accuracy(images, labels),
        steps - predicted,
        predicted,
        done.cache_bytes,
    )


def accuracy(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of the images that the classifier reads as their labels."""
    return 100 * (load_classifier()(images).argmax(1) == labels).float().mean().item()


def draw(points: list[Point], reference_accuracy: float, images: int, steps: int, folder: Path) -> None:
    """One figure per method: PSNR over the share of the FLOPs, a line per curve, the knob at its points; and beside it
    the accuracy, unless that is the uncached one everywhere."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for method in dict.fromkeys(point.method for point in points):
        chosen = [point for point in points if point.method == method]
        kept = all(point.accuracy_percent == reference_accuracy for point in chosen)
        with pyplot.rc_context(STYLE):
            figure, axes = pyplot.subplots(1, 1 if kept else 2, figsize=(7.2 if kept else 11, 4.5), squeeze=False)
            figure.set_facecolor("white")
            _lines(axes[0][0], chosen, "psnr_db", "PSNR against the uncached images, dB")
            note = f"numbers: {CURVES[method][0]}"
            if kept:
                note += f"\nclassifier accuracy: {reference_accuracy:.0f} % at every point, as uncached"
            else:
                _lines(axes[0][1], chosen, "accuracy_percent", "classifier accuracy, %")
                axes[0][1].axhline(reference_accuracy, color="#555555", linestyle=":", linewidth=1.2, label="uncached")
            axes[0][0].set_title(note, fontsize=9.5, loc="left", color="#444444")
            figure.text(0.99, 0.012, f"{images} digits, {steps} steps", ha="right", fontsize=8.5, color="#555555")
            figure.tight_layout(rect=(0, 0.02, 1, 1))
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{method}-quality.svg", metadata={"Date": None})
            pyplot.close(figure)


def _lines(axis: Any, points: list[Point], field: str, label: str) -> None:
    """A line per curve, named at its end; of points above each other, the highest one says the knob's value."""
    axis.set(xlabel="FLOPs per run, % of uncached", ylabel=label)
    for index, curve in enumerate(dict.fromkeys(point.curve for point in points)):
        own = sorted((p for p in points if p.curve == curve), key=lambda p: -p.knob)
        x, y, colour = [p.flops_percent for p in own], [getattr(p, field) for p in own], COLOURS[index]
        axis.plot(x, y, color=colour, marker=MARKERS[index], linewidth=1.8)
        crossed = max(p.flops_percent for p in points) > x[-1] + 1  # another line goes on to the right
        axis.annotate(
            curve,
            (x[-1], y[-1]),
            xytext=(-20 if crossed else 9, 0),
            textcoords="offset points",
            ha="right" if crossed else "left",
            va="center",
            color=colour,
        )
        for p in own:
            above = [q for q in points if q.knob == p.knob and abs(q.flops_percent - p.flops_percent) < 1]
            if p is max(above, key=lambda q: getattr(q, field)):
                axis.annotate(
                    str(p.knob),
                    (p.flops_percent, getattr(p, field)),
                    xytext=(-5, 4),
                    ha="right",
                    textcoords="offset points",
                    fontsize=9,
                    color=colour,
                )
    low, high = axis.get_xlim()
    axis.set_xlim(low - 0.05 * (high - low), high + 0.2 * (high - low))  # room for the names
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top + 0.04 * (top - bottom))


def show(console: Console, points: list[Point]) -> None:
    table = Table(
        "method", "curve", "knob", "FLOPs %", "PSNR dB", "accuracy %", "computed", "predicted", "cache MiB", box=SIMPLE
    )
    for p in points:
        table.add_row(
            p.method,
            p.curve,
            str(p.knob),
            f"{p.flops_percent:.1f}",
            f"{p.psnr_db:.1f}",
            f"{p.accuracy_percent:.0f}",
            str(p.computed),
            str(p.predicted),
            f"{p.cache_bytes / 2**20:.1f}",
        )
    console.print(table)


def command(methods: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
    """A command with the options of a measurement; its methods are these."""
    options = (
        click.command(context_settings={"help_option_names": ["-h", "--help"]}),
        click.option("--images", default=40, show_default=True, type=click.IntRange(1), help="Digits per point."),
        click.option("--steps", default=50, show_default=True, type=click.IntRange(8), help="Denoising steps."),
        click.option("--guidance", default=2.0, show_default=True, help="Scale of classifier-free guidance."),
        click.option("--seed", default=0, show_default=True, help="Seed of the noise."),
        click.option("--method", "methods", multiple=True, type=click.Choice(list(methods)), help="Only these."),
        click.option("--draw", "draw_only", is_flag=True, help="Draw the pictures from the JSON, sample nothing."),
        click.option("--out", default=DOCS, type=click.Path(path_type=Path), help="The folder docs, or another."),
    )
    return lambda function: functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


def known_points(path: Path, settings: dict[str, Any], methods: Sequence[str], draw_only: bool) -> dict[str, Any]:
    """What the JSON has, for points to be kept from it: empty where all are to be measured."""
    if not (draw_only or methods):
        return {}
    if not path.is_file():
        raise click.ClickException(f"{path} is not there: run without --draw and --method first")
    known = json.loads(path.read_text())
    if not draw_only and known["settings"] != settings:
        raise click.ClickException(f"{path} was made with {known['settings']}: give the same, or all methods")
    return known


def write_json(
    path: Path, command: str, settings: dict[str, Any], reference_accuracy: float, points: Sequence[Any], **more: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "command": command,
                "settings": settings,
                "versions": {"torch": torch.__version__, "cachepass": cachepass.__version__},
                "uncached_accuracy_percent": reference_accuracy,
                **more,
                "points": [asdict(point) for point in points],
            },
            indent=1,
        )
        + "\n"
    )


def noise_and_labels(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for every point."""
    return torch.randn(images, 1, 28, 28, generator=torch.Generator().manual_seed(seed)), torch.arange(images) % 10


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:36s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


@command(list(CURVES))
def main(
    images: int, steps: int, guidance: float, seed: int, methods: tuple[str, ...], draw_only: bool, out: Path
) -> None:
    """Measure quality against FLOPs over each method's main knob; print the table, write JSON and pictures."""
    console, path = Console(width=max(110, Console().width)), out / "data" / "curves.json"
    settings = {"images": images, "steps": steps, "guidance": guidance, "seed": seed}
    chosen = () if draw_only else methods or tuple(CURVES)
    known = known_points(path, settings, methods, draw_only)
    settings = known.get("settings", settings)
    kept = [Point(**point) for point in known.get("points", ()) if point["method"] not in chosen]
    reference_accuracy = known.get("uncached_accuracy_percent", 0.0)
    fresh: list[Point] = []
    if chosen:
        noise, labels = noise_and_labels(images, seed)
        jobs = [(m, curve, knob) for m in chosen for curve in CURVES[m][2] for knob in CURVES[m][1]]
        with torch.no_grad(), progress_bar(console) as progress, warnings.catch_warnings():
            task = progress.add_task("uncached", total=steps * (1 + len(jobs)))

            def advance() -> None:
                progress.advance(task)

            reference = sample(load_dit(), noise, labels, steps, guidance, advance)
            reference_accuracy = accuracy(reference, labels)
            for method, curve, knob in jobs:
                progress.update(task, description=f"{method}, {curve}, {knob}")
                fresh.append(measure(method, curve, knob, noise, labels, steps, guidance, reference, advance))
    order = [(method, curve) for method, (_, _, curves) in CURVES.items() for curve in curves]
    points = sorted([*kept, *fresh], key=lambda point: order.index((point.method, point.curve)))
    show(console, points)
    console.print(f"uncached: accuracy {reference_accuracy:.0f} %")
    if chosen:
        write_json(path, "python examples/digits/curves.py", settings, reference_accuracy, points)
    draw(points, reference_accuracy, settings["images"], settings["steps"], out / "images")


if __name__ == "__main__":
    main()
