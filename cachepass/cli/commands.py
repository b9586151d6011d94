"""The commands for models: ``cachepass demo``, ``explain``, ``compare``, ``tune``, ``bench`` and ``doctor``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from .arguments import (
    CACHE_HELP,
    Cache,
    caches_option,
    json_option,
    load_file,
    lowering_option,
    made,
    made_for_a_call,
    source_argument,
    timestep_scale_option,
    told,
)

_DIGITS = Path(__file__).parents[2] / "examples" / "digits"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cachepass")
def main() -> None:
    """Caching for diffusion transformers as a torch.compile backend."""


@main.command()
@click.option("--images", default=40, show_default=True, type=click.IntRange(1), help="Digits to sample per method.")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(8), help="Denoising steps.")
@click.option("--guidance", default=2.0, show_default=True, help="Scale of classifier-free guidance.")
@lowering_option
@click.option(
    "--out", default="demo-output", show_default=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--all", "variants", is_flag=True, help="Also the variants of each method: seven rows instead of four.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option("--models", default=_DIGITS, type=click.Path(path_type=Path), help="The folder examples/digits.")
def demo(
    images: int,
    steps: int,
    guidance: float,
    lowering: str,
    out: Path,
    variants: bool,
    seed: int,
    as_json: bool,
    models: Path,
) -> None:
    """Sample digits from a trained model, uncached and with each method; compare speed and quality."""
    module = _load_demo(models)
    names = tuple(module.METHODS) if variants else module.ONE_EACH
    rows = module.main(images, steps, guidance, lowering, out, seed, names, quiet=as_json)
    if as_json:
        click.echo(json.dumps(rows, indent=1))


@main.command()
@source_argument
@click.option("--cache", type=Cache(), default="taylorseer", show_default=True, help=CACHE_HELP)
@click.option("--diff", "phase", help='Print the graph diff of a phase instead ("predict", "canonical", ...).')
@json_option
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML page instead.")
@click.option("--steps", type=click.IntRange(1), help="Steps of a run (num_inference_steps).  [default: 28]")
@timestep_scale_option
@click.option("--context", "contexts", multiple=True, help='Of a call in a step: "cond". Several times for all.')
@click.option("--target", help="A GPU, which need not be there (h100, a100, ...): estimate its launches, memory, time.")
def explain(
    source: Callable[[], Any],
    cache: Any,
    phase: str | None,
    as_json: bool,
    page: Path | None,
    steps: int | None,
    timestep_scale: float | None,
    contexts: tuple[str, ...],
    target: str | None,
) -> None:
    """Show what a cache would do to a model, without running it, and how long it would take on a GPU.

    FUNCTION, in the file MODEL.py, returns the model and a dict of the keyword arguments of one call.
    """
    from ..inspect.explain import explain as explain_model
    from ..run.context import cache_context

    options = {"num_inference_steps": steps, "timestep_scale": timestep_scale}
    with told():
        model, inputs = made_for_a_call(source)
        with cache_context(contexts[0]) if contexts else contextlib.nullcontext():
            plan = explain_model(model, cache=cache, options=options, target=target, **inputs)
        if page is not None:
            plan.to_html(page, contexts=contexts or None)
            text = f"wrote {page}"
        else:
            text = plan.diff(phase) if phase else json.dumps(plan.as_dict(), indent=1) if as_json else str(plan)
    click.echo(text.rstrip("\n"))


@main.command()
@source_argument
@caches_option
@click.option("--steps", type=click.IntRange(1), help="Steps of a run (num_inference_steps), if they are known.")
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1), help="Samples of each that count.")
@click.option("--seed", default=0, show_default=True, help="Of the random numbers.")
@lowering_option
@timestep_scale_option
@json_option
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Also write an HTML page.")
def compare(
    source: Callable[[], Any],
    caches: tuple[Any, ...],
    steps: int | None,
    rounds: int,
    seed: int,
    lowering: str,
    timestep_scale: float | None,
    as_json: bool,
    page: Path | None,
) -> None:
    """Run a sampling loop with each of some caches and without: time, work, memory, and how far results are off.

    FUNCTION, in the file MODEL.py, returns the model (or a pipeline) and its sampling loop: a function that is called
    with the model, and returns a tensor or images.
    """
    from ..inspect.compare import compare as run

    example = "return model, sample, where sample(model) runs all steps and returns a tensor or images"
    options = {"lowering": lowering, "num_inference_steps": steps, "timestep_scale": timestep_scale}
    with told():
        model, sample = made(source, Callable, "its sampling loop", example)  # pyright: ignore[reportArgumentType]
        found = run(model, sample, caches, options=options, rounds=rounds, seed=seed)
    if page is not None:
        found.to_html(page)
    click.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found).rstrip("\n"))


@main.command()
@source_argument
@click.option("--steps", "budgets", type=click.IntRange(1), multiple=True, help="Steps to compute. May be repeated.")
@click.option("--quality", type=float, help="Decibels to reach, with as few computed steps as can, instead of --steps.")
@click.option("--out", default="tuned.json", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--runs", default=2, show_default=True, type=click.IntRange(1), help="Generations to calibrate with.")
@click.option("--validate", default=2, show_default=True, type=click.IntRange(0), help="Others, to measure with.")
@click.option("--tries", default=40, show_default=True, type=click.IntRange(0), help="Runs to refine each budget with.")
@click.option("--max-bytes", type=click.IntRange(1), help="The most that may be kept in each trajectory.")
@lowering_option
@timestep_scale_option
@json_option
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Also write an HTML page.")
def tune(
    source: Callable[[], Any],
    budgets: tuple[int, ...],
    quality: float | None,
    out: Path,
    runs: int,
    validate: int,
    tries: int,
    max_bytes: int | None,
    lowering: str,
    timestep_scale: float | None,
    as_json: bool,
    page: Path | None,
) -> None:
    """Find the best cache for a model, its sampling loop and a number of computed steps, and write it to a file.

    FUNCTION, in the file MODEL.py, returns the model (or a pipeline) and a function sample(model, run) that makes the
    generation number RUN with the model that it is given, and returns a tensor or images. Ctrl-C ends the search, and
    what was found until then is written.
    """
    from ..tuning.tune import tune as find

    example = "return model, sample, where sample(model, run) makes one generation and returns a tensor or images"
    with told():
        model, sample = made(source, Callable, "its sampling loop", example)  # pyright: ignore[reportArgumentType]
        found = find(
            model,
            sample,
            steps=list(budgets) or None,
            quality=quality,
            runs=runs,
            validate=validate,
            tries=tries,
            max_bytes=max_bytes,
            options={"lowering": lowering, "timestep_scale": timestep_scale},
        )
        found.save(out)
    if page is not None:
        found.to_html(page)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else f"{found}\nwrote {out}")


@main.command()
@source_argument
@caches_option
@click.option("--steps", default=28, show_default=True, type=click.IntRange(2), help="Denoising steps of a run.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Runs of each that count.")
@lowering_option
@timestep_scale_option
@json_option
def bench(
    source: Callable[[], Any],
    caches: tuple[Any, ...],
    steps: int,
    rounds: int,
    lowering: str,
    timestep_scale: float | None,
    as_json: bool,
) -> None:
    """Measure a model with caches against plain Inductor: steps, runs, compilation, memory. Quality is not looked at.

    FUNCTION, in the file MODEL.py, returns the model and a dict of the keyword arguments of the first step.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..inspect.bench import as_table
    from ..inspect.bench import bench as measure

    with Progress(console=Console(stderr=True), transient=True) as bar, told():
        task = bar.add_task("compiling", total=(1 + rounds) * (1 + len(caches)))
        model, inputs = made_for_a_call(source)
        found = measure(
            model,
            inputs,
            caches,
            steps=steps,
            rounds=rounds,
            options={"lowering": lowering, "timestep_scale": timestep_scale},
            advance=lambda name: bar.update(task, description=name, advance=1),
        )
    rows = [dataclasses.asdict(row) for row in found]
    click.echo(json.dumps(rows, indent=1) if as_json else as_table(found).rstrip("\n"))


_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}


@main.command()
@click.option("--compile/--no-compile", "compiling", default=True, help="Also compile and run a small cached model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(compiling: bool, as_json: bool) -> None:
    """Look at this installation: what is missing, and what to do about it. Exits with 1 if something cannot work."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..inspect.doctor import examine

    with Console(stderr=True).status("looking") as status:
        checks = []
        for check in examine(compiling=compiling):
            checks.append(check)
            status.update(f"looked at {check.name}")
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        grid = Table("", "what", "found", "what to do")
        for check in checks:
            grid.add_row(_MARKS[check.status], escape(check.name), escape(check.found), escape(check.fix))
        Console().print(grid)
    if any(check.status == "error" for check in checks):
        sys.exit(1)


def _load_demo(folder: Path) -> ModuleType:
    path = folder / "demo.py"
    if not path.exists():
        raise click.ClickException(
            f"{path} is not there: the demo's models live in the repository, not in the wheel. Run the command from "
            "an editable install (pip install -e .) of a clone, or give --models path/to/examples/digits"
        )
    return load_file(path, "cachepass_digits_demo")
