"""What the user says to torch.compile: ``options={"cache": ..., "lowering": ..., <Inductor's own>}``, parsed."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import CacheConfig, parse_cache
from .errors import OptionError, closest

LOWERINGS = ("specialize", "cond", "eager")


@dataclass(frozen=True)
class CompileOptions:
    """``torch.compile(..., options=...)``, parsed.

    Attributes:
        cache: The method's config; None: plain Inductor.
        lowering: ``"specialize"`` (one straight-line program per phase), ``"cond"`` (one program with conditional
            branches) or ``"eager"`` (the rewritten variants, uncompiled).
        timestep_input: Name of the graph input that holds the timestep; None: found by name.
        timestep_scale: Factor from the input's unit to the unit of the config's ranges (1000 for FLUX-like models,
            whose input runs from 1 to 0).
        num_inference_steps: Calls per run. When given, runs are told apart by counting alone.
        inductor: Everything else, as Inductor config patches.
    """

    cache: CacheConfig | None = None
    lowering: str = "specialize"
    timestep_input: str | None = None
    timestep_scale: float = 1.0
    num_inference_steps: int | None = None
    inductor: dict[str, Any] = field(default_factory=dict)


def parse_options(
    options: Mapping[str, Any] | None,
    mode: str | None,
    inductor_keys: set[str],
    modes: Mapping[str, dict[str, Any]],
) -> CompileOptions:
    """Split ``options`` into ours and Inductor's.

    ``"mode"`` may stand among the options too, since torch.compile takes either ``mode=`` or ``options=``. A mode's
    patches come first; single options override them.
    """
    given = dict(options or {})
    name: Any = given.pop("mode", mode) or "default"
    if name not in modes:
        raise OptionError(f"there is no mode {name!r}", where="torch.compile mode", hint=closest(str(name), modes))
    ours: dict[str, Any] = {}
    patches: dict[str, Any] = dict(modes[name])
    names = [f.name for f in dataclasses.fields(CompileOptions) if f.name != "inductor"]
    for key, value in given.items():
        if key in names:
            ours[key] = value
        elif key.replace("-", "_") in inductor_keys:
            patches[key.replace("-", "_")] = value
        else:
            raise OptionError(
                f"unknown option {key!r}", where="torch.compile options",
                hint=_option_hint(key, ["mode", *names], inductor_keys),
            )  # fmt: skip
    if ours.get("cache") is not None:
        ours["cache"] = parse_cache(ours["cache"])
    parsed = CompileOptions(**ours, inductor=patches)
    _check_options(parsed)
    return parsed


def _option_hint(key: str, names: list[str], inductor_keys: set[str]) -> str:
    near = difflib.get_close_matches(key, [*names, *inductor_keys], n=1, cutoff=0.6)
    prefix = f"did you mean {near[0]!r}? " if near else ""
    return prefix + "cachepass's own: " + ", ".join(names) + "; every Inductor config key is accepted too"


def _check_options(options: CompileOptions) -> None:
    def fail(name: str, what: str, hint: str | None = None) -> OptionError:
        return OptionError(what, where=f'options["{name}"]', hint=hint)

    if options.lowering not in LOWERINGS:
        raise fail("lowering", f"there is no lowering {options.lowering!r}", closest(str(options.lowering), LOWERINGS))
    steps = options.num_inference_steps
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise fail("num_inference_steps", f"expected an int >= 1 or None, got {steps!r}")
    name = options.timestep_input
    if name is not None and not isinstance(name, str):
        raise fail("timestep_input", f"expected the name of a model input, got {name!r}")
    scale = options.timestep_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise fail("timestep_scale", f"expected a positive number, got {scale!r}")
