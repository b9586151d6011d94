"""Capture: a CUDA graph of the caller's around a cached model is refused, because it cannot be right."""

from __future__ import annotations

import torch

from ..errors import CaptureError
from ..program.runnable import Runnable


def refuse_capture(program: Runnable | None) -> None:
    """Which step of the run a call is, is decided on the host, and the host is not asked when a graph is replayed.

    It is asked where a call begins: the CUDA graphs that Inductor makes of our programs are captured inside of it.

    Raises:
        CaptureError: The current stream is being captured.
    """
    if program is not None and program.on_cuda and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            "the model is called while a CUDA graph is captured, which would repeat this one step whatever step it is",
            where="torch.cuda.graph",
            hint='capture nothing around a cached model; options={"mode": "reduce-overhead"} makes a CUDA graph of '
            "each of its programs",
        )
