"""Load: an archive and weights -> a module that is called like the model.

Neither the model's code nor a compiler is imported. Everything is checked before anything is made: an archive that
cannot run here, or weights that do not fit, leave nothing half loaded. An archive's programs are machine code: load
none that you would not run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .._torch.archive import ArchiveReader, capability, load_program, system
from ..errors import ArchiveError, listing
from ..method import Method
from ..options import CompileOptions
from ..recipe.value import from_dict
from ..run.context import hear
from ..run.listening import listen
from ..run.live import reset_around
from .binding import tensors_of
from .calls import laid_out, lies_as, require_kind
from .listing import Program
from .loaded import LoadedProgram, dispatcher_of, weights_of
from .manifest import SCHEMA, Built, Manifest, Weight
from .model import LoadedModel
from .records import CONFIG, MANIFEST, SEAL, config_of

listen(on_context=hear, on_end=reset_around)
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # of x86 CPUs, each of which has those in front of it


class Archive:
    """An archive, opened and verified.

    Args:
        path: The file.

    Raises:
        ArchiveError: It is no archive, is damaged, or of another version of cachepass.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ArchiveError("there is no such file", where=str(path))
        try:
            self.reader = ArchiveReader(self.path)
            records = {name: self.reader.read(name) for name in (SEAL, MANIFEST, CONFIG)}
            seal = json.loads(records[SEAL])
        except (RuntimeError, ValueError) as error:
            raise self._damaged(str(error).splitlines()[0]) from None
        for name in (MANIFEST, CONFIG):
            self._verify(name, records[name], seal.get(name))
        saved = json.loads(records[MANIFEST])
        if saved.get("schema") != SCHEMA:
            raise ArchiveError(
                f"schema {saved.get('schema')!r} is not {SCHEMA}",
                where=str(path),
                hint="export it anew with this version of cachepass",
            )
        self.config = config_of(json.loads(records[CONFIG]))
        self.manifest: Manifest = from_dict(saved["manifest"], str(path))
        self.programs: dict[str, int] = {}
        for name, known in self.manifest.hashes:
            try:
                data = self.reader.read(name)
            except RuntimeError:
                raise self._damaged(f"{name} is missing") from None
            self._verify(name, data, known)
            program = name.split("/")[2]
            self.programs[program] = self.programs.get(program, 0) + len(data)

    def _damaged(self, what: str) -> ArchiveError:
        return ArchiveError(
            f"it is no archive of cachepass, or it is damaged ({what})",
            where=str(self.path),
            hint="copy it again, or export it anew",
        )

    def _verify(self, name: str, data: bytes, known: str | None) -> None:
        if hashlib.sha256(data).hexdigest() != known:
            raise self._damaged(f"{name} is not what was written")

    def verify_tensors(self) -> None:
        """Read all tensors and compare them with what was written.

        Raises:
            ArchiveError: One is damaged.
        """
        for _, one in (*self.manifest.constants, *self.manifest.weights):
            self._verify(one.record, self.reader.read(one.record), one.sha256)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the archive holds of the model's tensors, mapped into memory."""
        stored = (*self.manifest.constants, *self.manifest.weights)
        return {name: self.reader.tensor(one.record, one.form.shape, one.form.dtype) for name, one in stored}


def load(path: str | Path, weights: object = None, *, num_inference_steps: int | None = None) -> LoadedModel:
    """A model that was exported, as a module that is called like it.

    Everything that holds for a compiled model holds for it: ``cache_context``, ``reset``, ``summary``, ``warmup``.

    Args:
        path: The archive that ``cachepass.export`` wrote.
        weights: The model's: a state dict, a module that has them, a ``.safetensors`` file or a folder of such files.
            Tensors that are on the device already are taken as they are, not copied. None: those in the archive.
        num_inference_steps: Of a run, where it is another number than the one that was exported; None: that one.

    Raises:
        ArchiveError: The archive is damaged, or was made for another version of torch, another system or device; or
            weights are missing or do not fit. Nothing is loaded then.
        ConfigError: Its recipe holds a value whose class is not known here.
    """
    archive = Archive(path)
    manifest = archive.manifest
    if any(size.part is not None for size in manifest.sizes):
        raise ArchiveError("it holds programs of blocks", where=str(path), hint="cachepass.apply(model, path)")
    require_here(manifest.built, str(path))
    needed = weights_of(manifest.sizes)
    tensors = _fitting(_collected(archive, weights, needed), needed)
    options = options_of(archive)
    if num_inference_steps is not None:
        options = dataclasses.replace(options, num_inference_steps=num_inference_steps)
    programs = programs_in(archive)
    model = LoadedModel(manifest, tensors)
    method = Method(archive.config, options.num_inference_steps)
    for size in manifest.sizes:
        model.serve(size, dispatcher_of(size, LoadedProgram(size, programs, method), method, options, model))
    return model


def options_of(archive: Archive) -> CompileOptions:
    """The options that the programs run with."""
    settings = archive.manifest.settings
    return CompileOptions(
        cache=archive.config, **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    )


def programs_in(archive: Archive) -> dict[str, Program]:
    """The programs of an archive, by name.

    Raises:
        ArchiveError: One cannot be loaded.
    """
    index = torch.cuda.current_device() if archive.manifest.built.device == "cuda" else -1
    try:
        return {name: load_program(archive.path, name, index) for name in archive.programs}
    except RuntimeError as error:
        what = str(error).splitlines()[0]
        raise ArchiveError(
            f"a program cannot be loaded: {what}", where=str(archive.path), hint="export it anew, here"
        ) from None


def require_here(built: Built, path: str) -> None:
    """Raise an ArchiveError unless programs can run in this process."""
    here = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    if ".".join(built.torch.split(".")[:2]) != here:
        raise ArchiveError(
            f"it was exported with torch {built.torch}, and this is {torch.__version__}",
            where=path,
            hint="export it anew with this version: programs are compiled for one",
        )
    if built.system != system():
        raise ArchiveError(f"it was exported for {built.system}, and this is {system()}", where=path)
    if built.device == "cuda" and not torch.cuda.is_available():
        raise ArchiveError("it was exported for cuda, and there is no such device here", where=path)
    own = capability(built.device)
    fits = own == built.capability
    if built.device == "cpu" and {own, built.capability} <= set(_CAPABILITIES):
        fits = _CAPABILITIES.index(own) >= _CAPABILITIES.index(built.capability)
    if not fits:
        raise ArchiveError(
            f"it was exported for a {built.device} device with {built.capability}, and this one has {own}",
            where=path,
            hint="export it on a machine like this one",
        )


# ---- weights --------------------------------------------------------------------------------------------------------


def _collected(archive: Archive, weights: object, needed: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """The tensors by name: what is in the archive, and what was given.

    Raises:
        ArchiveError: Some are missing.
    """
    found = archive.tensors()
    if weights is not None:
        found |= _given(weights, archive.manifest.built.device, needed.keys() - dict(archive.manifest.constants).keys())
    missing = [name for name in needed if name not in found]
    if missing:
        inside = "weights=None, and there are none in the archive" if weights is None else "weights"
        raise ArchiveError(
            f"{len(missing)} of {len(needed)} tensors are missing: {listing(missing, 8)}",
            where=f"load, {inside}",
            hint="give the model's state dict, or a .safetensors file of it; or export with weights='inside'",
        )
    return {name: found[name] for name in needed}


def _given(weights: object, device: str, names: set[str]) -> dict[str, torch.Tensor]:
    if isinstance(weights, torch.nn.Module):
        weights = tensors_of(weights)
    if isinstance(weights, (str, Path)):
        return _from_files(Path(weights), device, names)
    if not isinstance(weights, Mapping):
        raise ArchiveError(
            f"expected a state dict, a module or a path, got {type(weights).__name__}", where="load, weights"
        )
    return {name: value.detach() for name, value in weights.items() if name in names}


def _from_files(path: Path, device: str, names: set[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of all such files in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ArchiveError("there is no .safetensors file", where=str(path))
    try:
        from safetensors import safe_open
    except ImportError:
        raise ArchiveError(
            "safetensors is not installed", where="load, weights", hint="pip install safetensors, or give a state dict"
        ) from None
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device=device) as opened:
                found.update({name: opened.get_tensor(name) for name in opened.keys() if name in names})  # noqa: SIM118
        except Exception as error:
            raise ArchiveError(f"it cannot be read: {error}", where=str(file)) from None
    return found


def _fitting(tensors: Mapping[str, torch.Tensor], needed: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """The tensors as programs take them; copied only where they lie otherwise in memory.

    Raises:
        ArchiveError: One has another shape or dtype; or the device is another one.
    """
    fitting: dict[str, torch.Tensor] = {}
    for name, weight in needed.items():
        value, form = tensors[name], weight.form
        if isinstance(value, torch.Tensor) and form.device != value.device.type == "cpu":
            value = value.to(form.device)
        require_kind(weight, value)
        fitting[name] = value if lies_as(value, form) else laid_out(value, form)
    return fitting
