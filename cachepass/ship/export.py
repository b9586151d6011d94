"""Export: every program of a cached model, compiled ahead of time, as one file.

export : model, a call of it, config -> archive

    capture     as the backend does it, once for each size; nothing runs        (``backend.build``)
    bind        where inputs come from and results go                           (``binding.py``)
    cut up      each variant into programs; those that are the same are one     (``pieces.py``)
    compile     each program, by AOTInductor
    write       programs, manifest, and the weights, if they are asked for
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from .. import _torch
from .._torch.archive import capability, system
from ..config import MethodConfig
from ..config.base import RecipeConfig
from ..errors import CachepassError, ConfigError, ExportError, closest
from ..method import Method
from ..options import CompileOptions, parse_options
from ..program.lower import make_ready, no_advice_on_complex_numbers
from ..program.phases import phase_name
from ..program.progress import compiling
from ..program.specialize import Variant
from ..program.trace import Traced
from ..program.variants import Program
from ..recipe.value import to_dict
from ..run.live import original_of
from . import manifest as told
from .binding import signature_of, tensors_of
from .listing import Listing
from .pieces import Pieces, cut_up
from .records import CONFIG, MANIFEST, SEAL, TENSORS, TIMETABLES, config_of
from .size import capture_blocks, capture_call
from .timetable import timetable, why_none


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The archive.
        programs: Bytes of each program.
        sizes: The sizes of inputs that it has programs for.
        weight_bytes: Bytes of the weights in it.
        seconds: That exporting took.
    """

    path: Path
    programs: dict[str, int]
    sizes: tuple[str, ...]
    weight_bytes: int
    seconds: float

    @property
    def bytes(self) -> int:
        """Of the archive."""
        return self.path.stat().st_size

    def __str__(self) -> str:
        inside = f", weights inside ({self.weight_bytes / 2**20:.1f} MiB)" if self.weight_bytes else ""
        return (
            f"{self.path}: {self.bytes / 2**20:.1f} MiB, {len(self.programs)} programs for {len(self.sizes)} "
            f"size{'s' * (len(self.sizes) > 1)}{inside}, in {self.seconds:.0f} s"
        )


def export(
    model: torch.nn.Module,
    *args: Any,
    cache: object,
    path: str | Path,
    weights: Literal["none", "inside"] = "none",
    shapes: Sequence[Mapping[str, Any]] = (),
    blocks: bool = False,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Exported:
    """Compile every program of ``model(*args, **kwargs)`` with a cache, and write them to a file that
    ``cachepass.load`` runs without the model's code and without a compiler.

    Where the pipeline calls the model twice per step, call ``export`` in the context of one of the two
    (``with cachepass.cache_context("cond")``) for FasterCache; other methods need nothing.

    Args:
        model: The model, on the device that it will run on. It is captured as one graph.
        args: Those of one call of it.
        cache: As in ``options`` of ``torch.compile``.
        path: The file, such as ``"flux.cpz"``.
        weights: ``"none"``: whoever loads it gives a state dict; ``"inside"``: they are in the file.
        shapes: Arguments of further calls by name, which replace those given: the archive has programs for each of
            these sizes, too.
        blocks: Compile the model's blocks one by one, as ``compile_repeated_blocks`` does, for ``cachepass.apply``: the
            model stays what it is, and its blocks run the programs.
        options: Those of the backend: ``num_inference_steps``, ``timestep_input``, ...; Inductor's, too.
        kwargs: Keyword arguments of the call.

    Returns:
        What was written.

    Raises:
        ExportError: Something of the model cannot be taken along.
        CachepassError: As the backend would.
    """
    start = time.perf_counter()
    module = _checked(model, weights)
    parsed = parse_options({**(options or {}), "cache": cache})
    _check_options(parsed)
    if blocks and weights == "inside":
        raise ExportError("the model has its weights", where="export, weights", hint="leave it at 'none'")
    calls = _torch.map_tensors(_dense, [(args, kwargs), *(_resized(module, args, kwargs, given) for given in shapes)])
    archive = _Archive(module, Path(path), parsed)
    for one_args, one_kwargs in calls:
        (archive.add_blocks if blocks else archive.add_size)(one_args, one_kwargs)
    archive.write(inside=weights == "inside")
    return Exported(
        archive.path,
        archive.program_bytes,
        tuple(map(str, archive.sizes)),
        archive.weight_bytes,
        time.perf_counter() - start,
    )


def _checked(model: object, weights: str) -> torch.nn.Module:
    module = original_of(model)
    if not isinstance(module, torch.nn.Module):
        raise ExportError(f"expected a module, got {type(model).__name__}", where="export")
    if weights not in ("none", "inside"):
        raise ExportError(f"expected 'none' or 'inside', got {weights!r}", where="export, weights")
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        raise ExportError("the model has no memory", where="export", hint="give it its weights, or to_empty()")
    return module


def _resized(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with others in place of some.

    Raises:
        ExportError: The model has no argument of this name.
    """
    signature = signature_of(module)
    bound = signature.bind(*args, **kwargs)
    for name, value in given.items():
        if name not in signature.parameters:
            raise ExportError(
                f"the model has no argument {name!r}", where="export, shapes", hint=closest(name, signature.parameters)
            )
        bound.arguments[name] = value
    return bound.args, bound.kwargs


def _dense(value: torch.Tensor) -> torch.Tensor:
    """Elements that lie in one place, as those of ``expand``, each get their own: what a call brings can be copied to
    lie so, and not the other way round."""
    shared = any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.contiguous() if shared else value


def _check_options(options: CompileOptions) -> None:
    if options.cache is None:
        raise ExportError("expected a method, got None", where="export, cache")
    if options.lowering != "specialize":
        raise ExportError(
            f"{options.lowering!r} has no straight lines", where='options["lowering"]', hint='leave it at "specialize"'
        )
    if options.process_group is not None:
        raise ExportError("it belongs to a process", where='options["process_group"]', hint="compile on each rank")


@dataclass
class _Archive:
    """An archive that is being made."""

    module: torch.nn.Module
    path: Path
    options: CompileOptions
    sizes: list[told.Size] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    pieces: Pieces = field(default_factory=Pieces)
    contexts: dict[str, _torch.SavedContext] = field(default_factory=dict)
    program_bytes: dict[str, int] = field(default_factory=dict)
    weight_bytes: int = 0

    @property
    def method(self) -> Method:
        assert self.options.cache is not None
        return Method(self.options.cache, self.options.num_inference_steps)

    # ---- one size ---------------------------------------------------------------------------------------------------

    def add_size(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Capture a call, and cut its programs up."""
        called = capture_call(self.module, args, dict(kwargs), self.options)
        size, constants = called.described(self.module, self._programs(called.program))
        self.constants.update(constants)
        self.sizes.append(size)

    def add_blocks(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Capture a call block by block, and cut their programs up.

        Raises:
            ExportError: A block holds a tensor that is neither a parameter nor a buffer.
        """
        for called, block, part in capture_blocks(self.module, args, kwargs, self.options):
            size, _ = called.described(block, self._programs(called.program), part)
            unnamed = [
                w.name for w in size.weights if w.kind == "constant" and w.name not in dict(block.named_buffers())
            ]
            if unnamed:
                raise ExportError("it is no buffer of its block", where=f"{part.prefix}: {unnamed[0]}")
            self.sizes.append(size)

    def _programs(self, program: Program) -> tuple[told.Shipped, ...]:
        phases = {phase_name(phase, program.plan.groups): phase for phase in program.plan.phases}
        found: dict[str, told.Shipped] = {}
        for _, variant, traced in program.all_variants():
            if variant.name not in found:
                phase = phases.get(variant.name)
                flops = None if phase is None else program.flops(phase)
                listing = self._listing(program, variant, traced)
                found[variant.name] = told.Shipped(listing, variant.inputs, variant.kept, flops)
        return tuple(found.values())

    def _listing(self, program: Program, variant: Variant, traced: Traced) -> Listing:
        ready = make_ready(variant, traced.inputs, shares=program.shares, adopts=True)
        listing = cut_up(
            ready.gm,
            variant.name,
            self.pieces,
            read=ready.read,
            inputs=len(ready.inputs),
            adopting=ready.adopting,
        )
        for name in self.pieces.graphs:
            self.contexts.setdefault(name, traced.context)
        return listing

    # ---- the file ---------------------------------------------------------------------------------------------------

    def write(self, *, inside: bool) -> None:
        """Compile all programs, and write the file in one move: an export that fails leaves none, or the old one."""
        from .._torch.ahead import ArchiveWriter, compile_ahead

        config = _saved_config(self.options)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}.") as folder:
            made = Path(folder) / self.path.name
            hashes: dict[str, str] = {}
            with ArchiveWriter(made) as writer:
                for i, (name, gm) in enumerate(self.pieces.graphs.items(), 1):
                    what = f"compiling {name}, program {i} of {len(self.pieces.graphs)}"
                    with compiling(what, shown=self.options.progress), no_advice_on_complex_numbers(gm):
                        examples = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
                        files = compile_ahead(gm, examples, self.contexts[name], Path(folder) / "programs" / name)
                    records = writer.add_program(name, files)
                    self.program_bytes[name] = sum(map(len, records.values()))
                    hashes |= {record: hashlib.sha256(data).hexdigest() for record, data in records.items()}
                weights = self._tensors(inside=inside)
                stored = {name: _store(writer, name, value) for name, value in {**self.constants, **weights}.items()}
                self.weight_bytes = sum(value.nbytes for value in weights.values())
                saved = to_dict(self._manifest(hashes, stored, weights), "export")
                for i, size in enumerate(self.sizes):
                    if size.part is None and why_none(size, self.method, self.options) is None:
                        writer.add(f"{TIMETABLES}{i}", timetable(size, self.method, self.options).encode())
                texts = {MANIFEST: json.dumps({"schema": told.SCHEMA, "manifest": saved}), CONFIG: json.dumps(config)}
                for name, text in texts.items():
                    writer.add(name, text.encode())
                seal = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
                writer.add(SEAL, json.dumps(seal).encode())
            made.replace(self.path)

    def _tensors(self, *, inside: bool) -> dict[str, torch.Tensor]:
        """The weights that go into the file."""
        if not inside:
            return {}
        held = tensors_of(self.module)
        names = {weight.name for size in self.sizes for weight in size.weights if weight.kind != "constant"}
        return {name: held[name].detach() for name in sorted(names)}

    def _manifest(
        self, hashes: Mapping[str, str], stored: Mapping[str, told.Stored], weights: Mapping[str, torch.Tensor]
    ) -> told.Manifest:
        options = self.options
        settings = {f.name: getattr(options, f.name) for f in dataclasses.fields(told.Settings)}
        return told.Manifest(
            _built(self.module, self.sizes[0]),
            told.Settings(**settings),
            tuple(self.sizes),
            tuple(hashes.items()),
            tuple((name, stored[name]) for name in self.constants),
            tuple((name, stored[name]) for name in weights),
            _attributes(self.module),
        )


def _saved_config(options: CompileOptions) -> dict[str, Any]:
    """The config as JSON; that of a class of the user's, whose code is not taken along, as its recipe.

    Raises:
        ExportError: It holds a function of Python's.
    """
    config = options.cache
    assert isinstance(config, MethodConfig)
    try:
        if not type(config).__module__.startswith("cachepass."):
            config = RecipeConfig(config.recipe(options.num_inference_steps))
        saved = config.to_dict()
        config_of(saved)
    except ConfigError as error:
        raise ExportError(
            error.what, where=error.where, hint="leave it out: an archive holds numbers and names, and no code"
        ) from None
    return saved


def _store(writer: Any, name: str, value: torch.Tensor) -> told.Stored:
    dense = value.detach().cpu().contiguous()
    if dense.untyped_storage().nbytes() != dense.nbytes:
        dense = dense.clone()
    record = TENSORS + name
    writer.add_tensor(record, dense)
    form = dataclasses.replace(told.Form.of(dense), device=value.device.type)
    data = dense.flatten().view(torch.uint8) if dense.numel() else dense
    return told.Stored(record, form, hashlib.sha256(data.numpy().data).hexdigest())


def _built(module: torch.nn.Module, size: told.Size) -> told.Built:
    device = next((source.form.device for source in size.inputs if source.form.device != "cpu"), "cpu")
    return told.Built(
        version("cachepass"), str(torch.__version__), device, capability(device), system(), type(module).__name__
    )


def _attributes(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    """The model's configuration, of which pipelines ask: numbers, names and lists of them."""
    config = getattr(module, "config", None)
    found = []
    for name, value in config.items() if isinstance(config, Mapping) else ():
        try:
            to_dict(value, name)
        except CachepassError:
            continue
        found.append((str(name), value))
    return tuple(found)
