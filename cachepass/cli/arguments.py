"""Arguments: what the commands have in common, and how what the user wrote is read."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click


class Source(click.ParamType):
    """``MODEL.py:FUNCTION``: the function, which returns a model and something to call it with."""

    name = "MODEL.py:FUNCTION"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path, _, name = value.rpartition(":")
        if not Path(path).is_file():
            self.fail(f"{value!r} is not FILE.py:FUNCTION of a file that exists", param, ctx)
        function = getattr(load_file(Path(path), "cachepass_model"), name, None)
        if function is None:
            self.fail(f"{path} has no {name!r}", param, ctx)
        return function


class Cache(click.ParamType):
    """A config, of a method's name or a JSON object."""

    name = "METHOD|JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ..config import parse_cache
        from ..errors import CachepassError

        try:
            return parse_cache(json.loads(value) if value.lstrip().startswith("{") else value)
        except json.JSONDecodeError as error:
            self.fail(f"not JSON: {error}", param, ctx)
        except CachepassError as error:
            self.fail(str(error), param, ctx)


def made(source: Callable[[], Any], kind: type[Any], what: str, example: str) -> tuple[Any, Any]:
    """What the function returns, of which the second is of a kind."""
    made = source()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], kind):
        given = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise click.ClickException(f"FUNCTION returned ({given}); it must return the model and {what}: {example}")
    return made


def made_for_a_call(source: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    example = 'return model, {"hidden_states": x, "timestep": t}'
    return made(source, dict, "a dict of the keyword arguments of one call", example)


source_argument = click.argument("source", metavar="MODEL.py:FUNCTION", type=Source())
timestep_scale_option = click.option(
    "--timestep-scale",
    type=float,
    help="From the timestep input to the config's unit, 1000 to 0.  [default: 1000 for 1 to 0, else 1]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
CACHE_HELP = """A method, a JSON object ({"method": "pab", "spatial_attention_block_skip_range": 2}), a .json file."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Mistakes of the user's are told without a traceback; gradients are off."""
    import torch

    from ..errors import CachepassError

    try:
        with torch.no_grad():
            yield
    except CachepassError as error:
        raise click.ClickException(str(error)) from None


caches_option = click.option(
    "--cache",
    "caches",
    type=Cache(),
    multiple=True,
    default=["taylorseer"],
    show_default=True,
    help=CACHE_HELP + " Give it several times to compare.",
)


lowering_option = click.option(
    "--lowering", default="specialize", show_default=True, type=click.Choice(["specialize", "cond", "eager"])
)


def load_file(path: Path, name: str) -> ModuleType:
    """A Python file as a module, with its folder on the path."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
