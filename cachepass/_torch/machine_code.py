"""Machine code of Triton kernels for a GPU that is not there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._inductor.codecache import PyCodeCache

from .offline import Kernel


@dataclass(frozen=True)
class MachineCode:
    """A kernel compiled for a GPU.

    Attributes:
        cubin: The machine code.
        registers: Of a thread.
        stack: Bytes of a thread's stack: what its registers do not hold, and the table that sines of large angles need.
        shared: Bytes of shared memory of a block.
        warps: Of a block, 32 threads each.
        blocks: Elements of a block in each direction, by Triton's names (``XBLOCK``, ...).
    """

    cubin: bytes
    registers: int
    stack: int
    shared: int
    warps: int
    blocks: dict[str, int]


def heuristics(kernel: Kernel) -> Any:
    """Inductor's object for a kernel: the function, and the block sizes among which it would choose by measurement.

    To be called while ``pretending``.
    """
    return getattr(PyCodeCache.load(kernel.source), kernel.name)


def assemble(kernel: Kernel) -> MachineCode:
    """Compile a kernel, with the first of the block sizes that Inductor would try, while ``pretending``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tuner = heuristics(kernel)
    config = tuner.configs[0]
    meta = tuner._create_compile_meta(config)
    source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    target = GPUTarget("cuda", meta["cc"], 32)
    binary = triton.compile(source, target=target, options=tuner._create_compile_options(config, meta))
    blocks = {name: int(value) for name, value in config.kwargs.items()}
    cubin = bytes(binary.asm["cubin"])
    return MachineCode(cubin, *_resources(cubin), int(binary.metadata.shared), int(config.num_warps), blocks)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+)", told), re.search(r"STACK:(\d+)", told)
    assert registers is not None and stack is not None, told
    return int(registers[1]), int(stack[1])
