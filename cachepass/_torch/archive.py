"""Archives: what was compiled ahead of time, read and run without Dynamo and Inductor."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROGRAMS = "data/aotinductor/"


class ArchiveReader:
    """Reads an archive in the format of PyTorch's ``.pt2`` files.

    Raises:
        RuntimeError: It is none, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: Any = torch._C.PyTorchFileReader(str(path))
        self._mapped: torch.UntypedStorage | None = None

    @property
    def names(self) -> list[str]:
        return self._reader.get_all_records()

    def read(self, name: str) -> bytes:
        return self._reader.get_record(name)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A record as a tensor: a part of the file, mapped into memory, so nothing is read before it is used. What is
        written to it does not reach the file."""
        if self._mapped is None:
            size = self._path.stat().st_size
            self._mapped = torch.UntypedStorage.from_file(str(self._path), False, size)  # pyright: ignore
        offset = self._reader.get_record_offset(name)
        count = torch.Size(shape).numel()
        whole = torch.tensor([], dtype=torch.uint8).set_(self._mapped)  # pyright: ignore[reportArgumentType]
        return whole[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


def load_program(path: Path, name: str, device_index: int) -> Callable[[list[Any]], list[torch.Tensor]]:
    """A library of an archive as a callable, which empties the list that it is given. It runs on the current stream;
    threads that call it at once take turns.

    Raises:
        RuntimeError: It cannot be loaded.
    """
    aoti: Any = torch._C._aoti  # pyright: ignore[reportAttributeAccessIssue]
    loader = aoti.AOTIModelPackageLoader(str(path), name, True, 1, device_index)
    boxed_run, lock = loader.boxed_run, threading.Lock()

    def run(given: list[Any]) -> list[torch.Tensor]:
        with lock:  # its own waits for a run that is over while it keeps the interpreter from ending that run
            return boxed_run(given)

    return run


def capability(device: str) -> str:
    """What programs for a kind of device ask of it: the compute capability of the current GPU (``"9.0"``), or the
    vector instructions of the CPU, in torch's words (``"AVX2"``)."""
    if device == "cuda":
        return ".".join(map(str, torch.cuda.get_device_capability()))
    return torch.backends.cpu.get_cpu_capability()


def system() -> str:
    """Operating system and processor: ``"Linux x86_64"``."""
    return f"{platform.system()} {platform.machine()}"
