"""GPUs: what compiling for one and estimating its times must know of it.

Peak rates are those of dense matrix products with fp32 accumulation, without sparsity; sources are the makers' own
documents, named beside each.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import OptionError

_GB, _MIB, _KIB = 10**9, 2**20, 2**10
_TERA = 10**12


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As in ``target="h100"``.
        title: Its full name.
        capability: Compute capability: major, minor.
        multiprocessors: Streaming multiprocessors.
        memory_bytes: Of its memory.
        bandwidth: Of its memory, bytes per second.
        peaks: FLOPs per second of matrix products by dtype, a multiply-add counted as two. ``torch.float32`` without
            TF32; ``"tf32"`` with it.
        cache_bytes: Of its L2 cache.
        block_memory: Bytes of shared memory that one block may have.
        multiprocessor_memory: Bytes of shared memory of a multiprocessor.
        threads: That may be resident on a multiprocessor.
        source: Where the figures are from.
        launch_seconds: Between the end of a kernel and the beginning of the next one of a stream: an assumption, the
            same for all.
    """

    name: str
    title: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    bandwidth: float
    peaks: dict[torch.dtype | str, float] = field(hash=False)
    cache_bytes: int
    block_memory: int
    multiprocessor_memory: int
    threads: int
    source: str
    launch_seconds: float = 2e-6

    def peak(self, dtype: torch.dtype | None) -> float:
        """FLOPs per second of matrix products of a dtype. fp32 follows ``torch.set_float32_matmul_precision``."""
        if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
            return self.peaks["tf32"]
        known = self.peaks.get(dtype) if dtype is not None else None
        return self.peaks[torch.float32] if known is None else known

    @property
    def properties(self) -> dict[str, Any]:
        """What ``torch.cuda.get_device_properties`` would say."""
        return {
            "major": self.capability[0],
            "minor": self.capability[1],
            "total_memory": self.memory_bytes,
            "multi_processor_count": self.multiprocessors,
            "regs_per_multiprocessor": 65536,
            "max_threads_per_multi_processor": self.threads,
            "max_threads_per_block": 1024,
            "warp_size": 32,
            "shared_memory_per_block": 48 * _KIB,
            "shared_memory_per_block_optin": self.block_memory,
            "shared_memory_per_multiprocessor": self.multiprocessor_memory,
            "L2_cache_size": self.cache_bytes,
            "gcnArchName": "",
        }


def _peaks(half: float, tf32: float, fp32: float, fp64: float, eight: float | None = None) -> dict[Any, float]:
    """In TFLOPs: fp16 and bf16, TF32, fp32 and fp64; of 8 bits, if it has such units."""
    rates: dict[Any, float] = {torch.float16: half, torch.bfloat16: half, "tf32": tf32}
    rates |= {torch.float32: fp32, torch.float64: fp64}
    if eight is not None:
        rates |= dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2, torch.int8), eight)
    return {dtype: rate * _TERA for dtype, rate in rates.items()}


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "a100", "NVIDIA A100 SXM 80 GB", (8, 0), 108, 80 * _GB, 2039e9, _peaks(312, 156, 19.5, 19.5),
            40 * _MIB, 163 * _KIB, 164 * _KIB, 2048, "NVIDIA A100 Tensor Core GPU datasheet (2021)",
        ),
        Gpu(
            "h100", "NVIDIA H100 SXM 80 GB", (9, 0), 132, 80 * _GB, 3350e9, _peaks(989.4, 494.7, 66.9, 66.9, 1978.9),
            50 * _MIB, 227 * _KIB, 228 * _KIB, 2048,
            "NVIDIA H100 Tensor Core GPU datasheet (2023) and architecture white paper, table 3",
        ),
        Gpu(
            "l40s", "NVIDIA L40S 48 GB", (8, 9), 142, 48 * _GB, 864e9, _peaks(362.05, 183, 91.6, 1.43, 733),
            96 * _MIB, 99 * _KIB, 100 * _KIB, 1536, "NVIDIA L40S datasheet (2023)",
        ),
        Gpu(
            "rtx4090", "NVIDIA GeForce RTX 4090 24 GB", (8, 9), 128, 24 * _GB, 1008e9,
            _peaks(165.2, 82.6, 82.6, 1.29, 330.3), 72 * _MIB, 99 * _KIB, 100 * _KIB, 1536,
            "NVIDIA Ada GPU architecture white paper, appendix A (2023)",
        ),
        Gpu(
            "b200", "NVIDIA B200 180 GB", (10, 0), 148, 180 * _GB, 8000e9, _peaks(2250, 1125, 75, 37, 4500),
            126 * _MIB, 227 * _KIB, 228 * _KIB, 2048,
            "NVIDIA DGX B200 datasheet (2025), an eighth of the system; dense rates are half of the sparse ones",
        ),
    )
}  # fmt: skip


def gpu_of(name: object) -> Gpu:
    """The GPU of a name.

    Raises:
        OptionError: There is none of this name in the table.
    """
    if isinstance(name, Gpu):
        return name
    plain = name.lower().replace("-", "").replace(" ", "").replace("_", "") if isinstance(name, str) else ""
    if plain in GPUS:
        return GPUS[plain]
    near = difflib.get_close_matches(plain, GPUS, n=1, cutoff=0.5)
    prefix = f"did you mean {near[0]!r}? " if near else ""
    raise OptionError(
        f"there is no GPU {name!r} in the table",
        where="target",
        hint=f"{prefix}known: {', '.join(GPUS)}; of another one give a cachepass.Gpu",
    )
