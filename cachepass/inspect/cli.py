"""The command line: ``cachepass demo``, ``cachepass explain`` and ``cachepass doctor``."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

try:
    import click
except ModuleNotFoundError:  # the command line is part of the "demo" extra
    sys.exit('the cachepass command needs click: pip install "cachepass[demo]"')

_DIGITS = Path(__file__).parents[2] / "examples" / "digits"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cachepass")
def main() -> None:
    """Caching for diffusion transformers as a torch.compile backend."""


@main.command()
@click.option("--images", default=200, show_default=True, type=click.IntRange(1), help="Digits to sample per method.")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(8), help="Denoising steps.")
@click.option("--guidance", default=2.0, show_default=True, help="Scale of classifier-free guidance.")
@click.option("--lowering", default="specialize", show_default=True, type=click.Choice(["specialize", "cond", "eager"]))
@click.option(
    "--out", default="demo-output", show_default=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Also write the table as OUT/digits.json.")
@click.option("--models", default=_DIGITS, type=click.Path(path_type=Path), help="The folder examples/digits.")
def demo(images: int, steps: int, guidance: float, lowering: str, out: Path, seed: int, as_json: bool,
         models: Path) -> None:  # fmt: skip
    """Sample digits from a trained model, uncached and with each method; compare speed and quality."""
    rows = _load_demo(models).main(images, steps, guidance, lowering, out, seed)
    if as_json:
        (out / "digits.json").write_text(json.dumps(rows, indent=1) + "\n")


@main.command()
@click.argument("source", metavar="MODEL.py:FUNCTION")
@click.option(
    "--cache",
    default="taylorseer",
    show_default=True,
    help='A method, or a JSON object: {"method": "pab", "spatial_attention_block_skip_range": 2}.',
)
@click.option(
    "--diff", "phase", default=None, help='Print the graph diff of a phase instead ("predict", "canonical", ...).'
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML page instead.")
@click.option("--steps", type=click.IntRange(1), help="Steps of the run on the page's timeline.  [default: 28]")
def explain(source: str, cache: str, phase: str | None, as_json: bool, page: Path | None, steps: int | None) -> None:
    """Show what a cache would do to a model, without compiling or running it.

    FUNCTION, in the file MODEL.py, returns the model and a dict of the keyword arguments of one call.
    """
    import torch

    from ..errors import CachepassError
    from .explain import explain as explain_model

    path, _, name = source.rpartition(":")
    if not Path(path).is_file():
        raise click.BadParameter(
            f"{source!r} is not FILE.py:FUNCTION of a file that exists", param_hint="MODEL.py:FUNCTION"
        )
    function = getattr(_load(Path(path), "cachepass_explained"), name, None)
    if function is None:
        raise click.BadParameter(f"{path} has no {name!r}", param_hint="MODEL.py:FUNCTION")
    try:
        config = json.loads(cache) if cache.lstrip().startswith("{") else cache
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--cache") from None
    try:
        with torch.no_grad():
            model, inputs = function()
            plan = explain_model(model, cache=config, **inputs)
            if page is not None:
                plan.to_html(page, num_inference_steps=steps)
                text = f"wrote {page}"
            else:
                text = plan.diff(phase) if phase else json.dumps(plan.as_dict(), indent=1) if as_json else str(plan)
    except CachepassError as error:
        raise click.ClickException(str(error)) from None
    click.echo(text.rstrip("\n"))


_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}


@main.command()
@click.option("--compile/--no-compile", "compiling", default=True, help="Also compile and run a small cached model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(compiling: bool, as_json: bool) -> None:
    """Look at this installation: what is missing, and what to do about it. Exits with 1 if something cannot work."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .doctor import examine

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
    return _load(path, "cachepass_digits_demo")


def _load(path: Path, name: str) -> ModuleType:
    """A Python file as a module, with its folder on the path."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
