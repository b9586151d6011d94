"""``cachepass doctor``: is everything here that a cached model needs, and what to do where it is not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import _torch
from ..run.context import cache_context
from .summary import summary

OLDEST = (2, 11)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: ``"ok"``, ``"warning"`` (it works, something is missing) or ``"error"`` (it cannot work).
        found: What there is.
        fix: What to do, unless it is ok.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def examine(*, compiling: bool = True) -> Iterator[Check]:
    """Look at one thing after the other. ``compiling``: also compile and run a small cached model, on the CPU and on a
    GPU where there is one (some seconds)."""
    yield Check("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _version_of_torch()
    yield _backend()
    yield _device()
    yield _compiler()
    yield from _libraries()
    yield _folder()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])] if compiling else []:
        yield _trial(device)


def _version_of_torch() -> Check:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    oldest = ".".join(map(str, OLDEST))
    if version < OLDEST:
        return Check("torch", "error", torch.__version__, f"install torch {oldest} or later")
    return Check("torch", "ok", torch.__version__)


def _backend() -> Check:
    if "cached_inductor" in torch.compiler.list_backends(exclude_tags=()):
        return Check("backend", "ok", 'backend="cached_inductor" is known to torch.compile')
    return Check(
        "backend",
        "error",
        "torch.compile does not know cached_inductor",
        "install cachepass itself (pip install cachepass, or -e . in a clone), not a copy of its folder",
    )


def _device() -> Check:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return Check("device", "ok", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if torch.version.cuda is not None:
        return Check(
            "device",
            "warning",
            "torch is a CUDA build and sees no GPU: CPU only",
            "look at nvidia-smi: the driver may be absent or too old for this build",
        )
    return Check("device", "ok", f"CPU, {torch.get_num_threads()} threads")


def _compiler() -> Check:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        return Check(
            "C++ compiler",
            "error",
            f"none of {', '.join(names)}",
            "install one (apt install g++), or set CXX: Inductor compiles with it",
        )
    return Check("C++ compiler", "ok", found)


def _libraries() -> Iterator[Check]:
    if torch.cuda.is_available():
        yield _library("triton", "error", "Inductor's kernels for GPUs are written in it: pip install triton")
    yield _library("diffusers", "warning", "only needed for pipelines: pip install diffusers")


def _library(name: str, without: str, fix: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, without, "not installed", fix)


def _folder() -> Check:
    try:
        folder = _torch.cache_folder()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            "Inductor's cache", "error", str(error), "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        )
    return Check("Inductor's cache", "ok", folder)


# ---- a small model, compiled ----------------------------------------------------------------------------------------


class _Attention(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v))


class _Model(torch.nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attn = _Attention(width)
        self.mlp = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x) * timestep


def _trial(device: str) -> Check:
    """Five steps of a run, of which two are predicted; the computed ones are compared with the model itself."""
    name, start = f"a cached model on {device}", time.perf_counter()
    try:
        model = _Model().eval().to(device).requires_grad_(False)
        error = _run(model, device)
        counts = summary(model)
    except Exception as failure:  # whatever it is, it is what the user needs to see
        return Check(
            name,
            "error",
            f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}",
            "run the same with TORCH_LOGS=+cachepass,inductor for the whole story",
        )
    predicted = sum(counts.predicted.values())
    told = f"{predicted} of {counts.steps} steps predicted, computed ones differ by {error:.0e}"
    if predicted != 2 or not error < 1e-3:
        return Check(name, "error", told, "this installation computes wrong values: please report it")
    return Check(name, "ok", f"{told}, {time.perf_counter() - start:.0f} s")


def _run(model: torch.nn.Module, device: str) -> float:
    cache = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "cache_identifiers": ["attn"]}
    options: dict[str, Any] = {"cache": cache, "num_inference_steps": 5}
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
    error = 0.0
    x = torch.randn(1, 16, 32, device=device)
    with torch.no_grad(), cache_context("cachepass doctor"):
        for step in range(5):
            inputs = x * (1 - 0.1 * step), torch.tensor([1.0 - 0.1 * step], device=device)
            value = compiled(*inputs)
            if step in (0, 1, 3):  # the others are predicted
                error = max(error, float((value - model(*inputs)).norm() / value.norm()))
    return error
