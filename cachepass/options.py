"""What the user says to torch.compile: ``options={"cache": ..., "lowering": ..., <Inductor's own>}``, parsed."""

from __future__ import annotations

import dataclasses
import difflib
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _torch
from .config import MethodConfig, parse_cache
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
        timestep_scale: Factor from the input's unit to the unit of the config's ranges, 1000 to 0. None: 1000 where
            the first timestep is 1 or below (FLUX-like models, whose input runs from 1 to 0), else 1.
        num_inference_steps: Calls per run, in each context. A run ends when they were made, or when the timestep rises.
            Without it, and for methods that need the timestep, that is read in every call, for which an accelerator is
            waited for.
        invariants: Compute once per run what depends only on parameters and on inputs that stay the same in it. Checked
            at every call by the tensors' identity: an input that changed is seen, and results are exact.
        invariant_inputs: Names of inputs whose values stay the same within a run although each call brings another
            tensor, or tensors made under ``torch.inference_mode``, which cannot be checked.
        varying_inputs: Names of inputs that change within a trajectory (besides latents and timestep, which are known):
            another tensor there does not mean another trajectory.
        max_cache_bytes: The most that is kept from step to step, over all runs of the model; None: a quarter of the
            device's memory. Least recently used states make room, those of runs that are over first.
        invariant_bytes: Bytes that may be kept for a run, in each cache context; None: no bound. The default, 1 GiB,
            is twice the keys and values of 512 text tokens in a model of 40 layers of 5120 features (0.4 GB in 16
            bits), the most that the models known today have; two contexts of it fit beside a model on a card of 24
            GB. What saves most work for each byte comes first; ``explain`` says what is left out.
        process_group: Ranks that run one model together (tensor or context parallel): a method that decides by what it
            measures gets the distance over all of them, so all decide alike. A ``ProcessGroup``; ``"world"``: the
            default one.
        share_blocks: Compile blocks that are the same once, and call that for each: what compiling takes grows far less
            with the depth of the model. Not for ``lowering="cond"`` and Inductor's ``cpp_wrapper``, which has no calls.
        pool_requests: Requests that are called as rows (``cachepass.rows``) and keep something at the same time: memory
            for so many is taken when the first is called, for each size of latents. None: 16, or as many as three
            quarters of what may be kept (``max_cache_bytes``) have room for.
        pool_wait: Seconds that a request waits for its place there while all are taken, until another one is released;
            0: it is an error at once.
        row_sizes: How many rows a program takes. Rows that are in one phase are parted into calls of these sizes, the
            largest first: nothing is computed for nobody.
        progress: Show on a terminal what is being compiled.
        inductor: Everything else, as Inductor config patches.
    """

    cache: MethodConfig | None = None
    lowering: str = "specialize"
    timestep_input: str | None = None
    timestep_scale: float | None = None
    num_inference_steps: int | None = None
    invariants: bool = True
    invariant_inputs: tuple[str, ...] = ()
    varying_inputs: tuple[str, ...] = ()
    max_cache_bytes: int | None = None
    invariant_bytes: int | None = 2**30
    process_group: Any = None
    share_blocks: bool = True
    pool_requests: int | None = None
    pool_wait: float = 0.0
    row_sizes: tuple[int, ...] = (1, 2, 4, 8)
    progress: bool = True
    inductor: dict[str, Any] = field(default_factory=dict)

    @property
    def shares(self) -> bool:
        """Programs call blocks that are the same."""
        return self.share_blocks and self.lowering != "cond" and not self.inductor.get("cpp_wrapper")


def is_declared(name: str, given: str) -> bool:
    """Whether an input is the one, or inside of the one, that the user calls ``given``: the whole name, or its end
    (``encoder_hidden_states`` for ``kwargs.encoder_hidden_states``)."""
    return f".{given}." in f".{name}."


def parse_options(
    options: object,
    mode: str | None = None,
    inductor_keys: set[str] | None = None,
    modes: Mapping[str, dict[str, Any]] | None = None,
) -> CompileOptions:
    """Split ``options`` into ours and Inductor's.

    ``"mode"`` may stand among the options too, since torch.compile takes either ``mode=`` or ``options=``. A mode's
    patches come first; single options override them. ``inductor_keys`` and ``modes``: None, those of this torch.
    """
    inductor_keys = _torch.inductor_keys() if inductor_keys is None else inductor_keys
    modes = _torch.inductor_modes() if modes is None else modes
    if options is not None and not isinstance(options, Mapping):
        options = {"cache": options}  # options=TaylorSeerCacheConfig(...)
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
                f"unknown option {key!r}",
                where="torch.compile options",
                hint=_option_hint(key, ["mode", *names], inductor_keys),
            )
    if ours.get("cache") is not None:
        ours["cache"] = parse_cache(ours["cache"])
    for key in ("invariant_inputs", "varying_inputs", "row_sizes"):
        if isinstance(ours.get(key), list):
            ours[key] = tuple(ours[key])
    if ours.get("process_group") is not None:
        ours["process_group"] = _process_group(ours["process_group"])
    parsed = CompileOptions(**ours, inductor=patches)
    _check_options(parsed)
    return parsed


def _option_hint(key: str, names: list[str], inductor_keys: set[str]) -> str:
    near = difflib.get_close_matches(key, [*names, *inductor_keys], n=1, cutoff=0.6)
    prefix = f"did you mean {near[0]!r}? " if near else ""
    return prefix + "cachepass's own: " + ", ".join(names) + "; every Inductor config key is accepted too"


def _process_group(given: Any) -> Any:
    where = 'options["process_group"]'
    world = _torch.default_group()
    if world is None:
        raise OptionError(
            "torch.distributed is not initialised",
            where=where,
            hint="call torch.distributed.init_process_group first; one process needs none",
        )
    if isinstance(given, str) and given == "world":
        return world
    if not _torch.is_process_group(given):
        raise OptionError(
            f"expected a ProcessGroup of which this rank is a member, or 'world', got {given!r}",
            where=where,
            hint="torch.distributed.new_group(ranks) makes one, and mesh.get_group(name) has that of a DeviceMesh",
        )
    return given


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _are_sizes(value: object) -> bool:
    return isinstance(value, tuple) and 1 in value and all(_is_int(size, 1) for size in value)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= threading.TIMEOUT_MAX


def _is_scale(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (is_number and 0 < value < math.inf)


# What the options may be, and how that is said.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_inference_steps": (lambda v: v is None or _is_int(v, 1), "an int >= 1 or None"),
    "timestep_input": (lambda v: v is None or isinstance(v, str), "the name of a model input"),
    "timestep_scale": (_is_scale, "a positive number or None"),
    "invariants": (lambda v: isinstance(v, bool), "a bool"),
    "progress": (lambda v: isinstance(v, bool), "a bool"),
    "share_blocks": (lambda v: isinstance(v, bool), "a bool"),
    "invariant_inputs": (_are_names, "a list of names of model inputs"),
    "varying_inputs": (_are_names, "a list of names of model inputs"),
    "max_cache_bytes": (lambda v: v is None or _is_int(v, 1), "a number of bytes or None"),
    "pool_requests": (lambda v: v is None or _is_int(v, 1), "an int >= 1 or None"),
    "pool_wait": (_is_time, "a number of seconds"),
    "row_sizes": (_are_sizes, "a list of ints >= 1, with 1 among them"),
    "invariant_bytes": (lambda v: v is None or _is_int(v, 0), "a number of bytes or None"),
}


def _check_options(options: CompileOptions) -> None:
    if options.lowering not in LOWERINGS:
        hint = closest(str(options.lowering), LOWERINGS)
        raise _fail("lowering", f"there is no lowering {options.lowering!r}", hint)
    for name, (holds, expected) in _EXPECTED.items():
        value = getattr(options, name)
        if not holds(value):
            raise _fail(name, f"expected {expected}, got {value!r}")
    _check_together(options)


def _check_together(options: CompileOptions) -> None:
    """What options that are right by themselves say together."""
    if options.lowering == "cond" and options.inductor.get("triton.cudagraphs"):
        raise _fail(
            "lowering",
            "'cond' chooses branches on the host in the middle of a program, which a CUDA graph cannot",
            'use "specialize", whose programs are straight lines',
        )
    for name in options.varying_inputs:
        if name in options.invariant_inputs:
            raise _fail("varying_inputs", f"{name!r} is among the invariant_inputs too", "leave out one of the two")
    kept = options.invariant_inputs or (options.cache is not None and options.cache.method == "invariant")
    if not options.invariants and kept:
        raise _fail(
            "invariants", "False, and yet there are things to keep: invariant_inputs, or the method 'invariant'"
        )


def _fail(name: str, what: str, hint: str | None = None) -> OptionError:
    return OptionError(what, where=f'options["{name}"]', hint=hint)
