"""What is in an archive, for people."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArchiveError
from ..inspect.tables import human_bytes, table
from ..method import Method
from ..options import CompileOptions
from .load import Archive, options_of
from .manifest import Size
from .records import TIMETABLES
from .timetable import why_none


def content(path: str | Path) -> str:
    """Everything that an archive says of itself. Its programs and its tensors are verified.

    Raises:
        ArchiveError: It is no archive, or it is damaged.
    """
    archive = Archive(path)
    archive.verify_tensors()
    manifest, built = archive.manifest, archive.manifest.built
    options = options_of(archive)
    method = Method(archive.config, options.num_inference_steps)
    held = sum(one.form.nbytes for _, one in manifest.weights)
    weights = f"{len(manifest.weights)} tensors, {human_bytes(held)}" if manifest.weights else "none"
    lines = [
        f"{built.model}, {archive.config.label}",
        f"for {built.device} ({built.system}, {built.capability}), torch {built.torch}, cachepass {built.cachepass}",
        f"programs: {len(archive.programs)}, {human_bytes(sum(archive.programs.values()))}; weights inside: {weights}",
    ]
    for size in manifest.sizes:
        lines += ["", *_size(size, method, options)]
    return "\n".join(lines) + "\n\nverified: every program and tensor is what was written\n"


def _size(size: Size, method: Method, options: CompileOptions) -> list[str]:
    rows = []
    for one in size.programs:
        calls = one.listing.calls
        flops = "" if one.flops is None else f"{one.flops / 1e9:.3g}"
        rows.append((one.name, len(calls), len({call.program for call in calls}), flops))
    slots = sum(cut.history * cut.slot_bytes for cut in size.plan.cuts)
    reason = why_none(size, method, options)
    told = "timetable: written out" if reason is None else f"no timetable: {reason}"
    head = f"inputs: {size}"
    return [
        head,
        table(("phase", "calls", "of programs", "GFLOP"), rows).rstrip("\n"),
        f"slots: {human_bytes(slots)}; {told}",
    ]


def timetable_of(path: str | Path) -> str:
    """The timetable of an archive's first size.

    Raises:
        ArchiveError: It has none, and why.
    """
    archive = Archive(path)
    options = options_of(archive)
    reason = why_none(archive.manifest.sizes[0], Method(archive.config, options.num_inference_steps), options)
    if reason is not None:
        raise ArchiveError(f"there is no timetable: {reason}", where=str(path))
    return archive.reader.read(f"{TIMETABLES}0").decode()
