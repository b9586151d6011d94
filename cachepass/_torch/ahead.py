"""Ahead of time: AOTInductor makes libraries of graphs, and archives hold them. Only whoever exports imports this."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner, get_cpp_wrapper_config
from torch._inductor.virtualized import V
from torch.export.pt2_archive._package import PT2ArchiveWriter

from .archive import PROGRAMS
from .inductor import SavedContext

_SOURCES = (".cpp", ".h")  # what the library was compiled from: an archive needs none of it


def compile_ahead(gm: fx.GraphModule, inputs: Sequence[Any], context: SavedContext, folder: Path) -> list[Path]:
    """Compile a straight-line graph to a library that runs without Python. Its outputs have the strides that they have
    in the graph.

    Args:
        gm: The graph; its placeholders are tensors of fixed sizes.
        inputs: Fake ones.
        context: The moment at which its ATen graph was handed over.
        folder: Where the library is written.

    Returns:
        The files of the library.
    """
    gm.graph.output_node().meta["user_visible_output_idxs"] = range(len(gm.graph.output_node().args[0]))  # pyright: ignore
    kwargs = {key: value for key, value in context.inner_kwargs.items() if key != "cudagraphs"}
    kwargs |= {"static_input_idxs": (), "aot_mode": True, "cpp_wrapper": True}
    patches = {
        "cpp_wrapper": True,
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder),
        "aot_inductor.metadata": {},
    }
    with (
        context.entered(),
        torch.no_grad(),
        inductor_config.patch(patches),
        inductor_config.patch(get_cpp_wrapper_config()),
        V.set_aot_compilation(True),
    ):
        made: Any = compile_fx_inner(gm, list(inputs), **kwargs)
    files = [Path(name) for name in getattr(made, "filename", made) if isinstance(name, str)]
    kept = [path for path in files if path.suffix not in _SOURCES]
    for path in kept:
        if path.suffix == ".so":
            _strip(path)
    return kept


def _strip(path: Path) -> None:
    """Without its symbols a library is a quarter as large."""
    strip = shutil.which("strip")
    if strip is not None:
        subprocess.run([strip, str(path)], check=False, capture_output=True)


class ArchiveWriter:
    """Writes an archive in the format of PyTorch's ``.pt2`` files.

    Records lie uncompressed and aligned, so that what is large can be mapped into memory.
    """

    def __init__(self, path: Path) -> None:
        self._writer = PT2ArchiveWriter(str(path))

    def __enter__(self) -> ArchiveWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def add(self, name: str, data: bytes) -> None:
        self._writer.write_bytes(name, data)

    def add_tensor(self, name: str, value: torch.Tensor) -> None:
        """The memory of a contiguous tensor on the CPU."""
        storage = value.untyped_storage()
        self._writer.archive_file.write_record(name, storage, value.nbytes)  # pyright: ignore

    def add_program(self, name: str, files: Sequence[Path]) -> dict[str, bytes]:
        """A library, for ``archive.load_program``; its records."""
        records = {f"{PROGRAMS}{name}/{path.name}": path.read_bytes() for path in files}
        for record, data in records.items():
            self.add(record, data)
        return records
