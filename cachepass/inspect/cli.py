"""The command line: ``cachepass demo``."""

from __future__ import annotations

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


def _load_demo(folder: Path) -> ModuleType:
    path = folder / "demo.py"
    if not path.exists():
        raise click.ClickException(
            f"{path} is not there: the demo's models live in the repository, not in the wheel. Run the command from "
            "an editable install (pip install -e .) of a clone, or give --models path/to/examples/digits"
        )
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("cachepass_digits_demo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
