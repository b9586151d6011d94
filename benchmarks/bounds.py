"""What a program does at least: floating-point operations and bytes, and how long they take a machine at its best."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """The work of one program.

    Attributes:
        products: Of each matrix product, convolution and attention: its FLOPs and the bytes that it reads and writes.
        bytes: What must be moved in any case: all inputs that are read, once, and all outputs and slots written.
    """

    products: tuple[tuple[int, int], ...]
    bytes: int

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.products)

    def seconds(self, peaks: Peaks) -> float:
        """The bound: every product at the peak rate or, if that is slower, its bytes at the peak bandwidth; and not
        less than all bytes take. What stands between the products costs nothing, as if fused without a trace."""
        products = sum(max(flops / peaks.flops, size / peaks.bandwidth) for flops, size in self.products)
        return max(products, self.bytes / peaks.bandwidth)


@dataclass(frozen=True)
class Peaks:
    """FLOPs and bytes per second that the machine reached in this process."""

    flops: float
    bandwidth: float


def cost_of(gm: fx.GraphModule) -> Cost:
    """The cost of an ATen graph."""
    products = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            count = flop_registry.get(node.target.overloadpacket)
            if count is not None:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                moved = sum(_bytes(source.meta["val"]) for source in node.all_input_nodes) + _bytes(node.meta["val"])
                products.append((int(count(*args, **kwargs, out_val=node.meta["val"])), moved))
    read = [node for node in gm.graph.find_nodes(op="placeholder") if node.users]
    written = gm.graph.output_node().all_input_nodes
    return Cost(tuple(products), sum(_bytes(node.meta["val"]) for node in (*read, *written)))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return math.prod(value.shape) * value.dtype.itemsize
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def measure_peaks(device: str, dtype: torch.dtype, size: int = 2048, repeats: int = 8) -> Peaks:
    """The best of several large matrix products, and of several copies of a large tensor."""
    size = size if device == "cpu" else 4 * size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty((1 << 28) if device == "cpu" else (1 << 30), dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    product, copy = (math.inf, math.inf)
    for _ in range(repeats):
        product = min(product, _timed(device, lambda: torch.mm(a, b)))
        copy = min(copy, _timed(device, lambda: target.copy_(source)))
    return Peaks(2 * size**3 / product, 2 * source.nbytes / copy)


def _timed(device: str, function: Any) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
