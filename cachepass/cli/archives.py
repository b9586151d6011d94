"""The commands for archives: ``cachepass export``, ``run`` and ``inspect``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .arguments import CACHE_HELP, Cache, json_option, made_for_a_call, source_argument, timestep_scale_option, told
from .commands import main

_archive = click.argument("archive", type=click.Path(dir_okay=False, path_type=Path))


@main.command()
@source_argument
@click.option("--cache", type=Cache(), default="taylorseer", show_default=True, help=CACHE_HELP)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help='The file ("model.cpz").')
@click.option("--weights", default="none", show_default=True, type=click.Choice(["none", "inside"]))
@click.option("--steps", type=click.IntRange(1), help="Steps of a run (num_inference_steps), if they are known.")
@timestep_scale_option
def export(
    source: Callable[[], Any], cache: Any, out: Path, weights: Any, steps: int | None, timestep_scale: float | None
) -> None:
    """Compile every program of a cached model ahead of time, and write them to a file.

    FUNCTION, in the file MODEL.py, returns the model and a dict of the keyword arguments of one call.
    """
    from ..ship.export import export as export_model

    options = {"num_inference_steps": steps, "timestep_scale": timestep_scale}
    with told():
        model, inputs = made_for_a_call(source)
        made = export_model(model, cache=cache, path=out, weights=weights, options=options, **inputs)
    click.echo(str(made))


@main.command()
@_archive
@click.option("--weights", type=click.Path(exists=True, path_type=Path), help="A .safetensors file, or a folder.")
@click.option("--steps", type=click.IntRange(2), help="Steps of a run.  [default: those of the archive, or 28]")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Runs that count.")
@json_option
def run(archive: Path, weights: Path | None, steps: int | None, rounds: int, as_json: bool) -> None:
    """Run an archive with random inputs, and tell how long its phases take. Weights that nobody gives are random."""
    from ..inspect.tables import table
    from ..ship.trial import try_out

    with told():
        rows = try_out(archive, weights, steps=steps, rounds=rounds)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    lines = [(row.phase, row.calls, f"{row.milliseconds:.2f}") for row in rows]
    click.echo(table(("phase", "calls", "ms"), lines).rstrip("\n"))


@main.command()
@_archive
@click.option("--timetable", is_flag=True, help="Print which program runs in each step, with what.")
def inspect(archive: Path, timetable: bool) -> None:
    """Show what is in an archive, and verify it."""
    from ..ship.content import content, timetable_of

    with told():
        text = timetable_of(archive) if timetable else content(archive)
    click.echo(text.rstrip("\n"))
