"""Collectives: process groups, and the operations on them that stand in graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import fx

_NAMESPACES = {"_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "_dtensor", "symm_mem"}


def default_group() -> Any:
    """The process group of all ranks; None where torch.distributed is missing or not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def world_size() -> int:
    """Ranks of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_process_group(value: Any) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def is_collective(node: fx.Node) -> bool:
    """The node's value comes from other ranks, or waits for it."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in _NAMESPACES


def is_wait(node: fx.Node) -> bool:
    """The node waits for a collective: what that one returns must not be read before."""
    return is_collective(node) and node.target.overloadpacket.__name__ == "wait_tensor"  # pyright: ignore


def sum_over(value: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the ranks of a group; it can be traced."""
    import torch.distributed._functional_collectives as functional  # it registers operators: not on every import

    return functional.all_reduce(value, "sum", group)


def any_of_ranks(value: bool, group: Any, device: torch.device) -> bool:
    """Whether it holds on any rank of a group. All of them ask, and wait for each other."""
    flag = torch.tensor([int(value)], dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


__all__ = ["any_of_ranks", "default_group", "is_collective", "is_process_group", "is_wait", "sum_over", "world_size"]
