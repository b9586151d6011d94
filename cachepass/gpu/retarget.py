"""Retarget: a graph that was captured on the CPU, or without memory, as it would be on a CUDA device.

    retarget : Variant, its inputs -> the same with the values of a CUDA device

        x: f32[8]cpu;  sdpa_for_cpu(q, k, v)      ->      x: f32[8]cuda;  flash_attention(q, k, v)

ATen operations are the same on all devices but for attention, of which torch has chosen a kernel by the device; here
that choice is made as torch makes it on CUDA. Values of all nodes are computed anew, because strides may differ. A
graph that was captured on CUDA is left as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .. import _torch
from .._torch import offline
from ..errors import CachepassError
from ..program.specialize import Variant

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_FLASH_WIDTH = 256  # of heads that the flash kernel takes
_FLASH_DTYPES = (torch.float16, torch.bfloat16)


def retarget(
    variant: Variant, own_inputs: Sequence[Any], context: _torch.SavedContext
) -> tuple[Variant, tuple[Any, ...], _torch.SavedContext]:
    """The variant, the model's own inputs and the context for a CUDA device; what is given is left as it is.

    Raises:
        CachepassError: An operation cannot run on CUDA.
    """
    if any(isinstance(value, torch.Tensor) and value.is_cuda for value in own_inputs):
        return variant, tuple(own_inputs), offline.offline_context(context.fake_mode, context.patches)
    mode = offline.another_fake_mode(context.fake_mode)
    with mode, torch.no_grad():
        graph, attributes = _Moved(variant.gm, mode).result
    gm = _torch.graph_module(attributes, graph)
    placeholders = graph.find_nodes(op="placeholder")[: len(own_inputs)]
    moved = dataclasses.replace(variant, gm=gm)
    inputs = tuple(node.meta.get("val") for node in placeholders)
    return moved, inputs, offline.offline_context(mode, context.patches)


class _Moved:
    """A graph module, rewritten for CUDA node by node."""

    def __init__(self, gm: fx.GraphModule, mode: Any) -> None:
        self._gm, self._mode, self._graph = gm, mode, fx.Graph()
        self._attributes: dict[str, Any] = {}
        env: dict[fx.Node, fx.Node] = {}
        constants = [
            node for node in gm.graph.find_nodes(op="get_attr") if isinstance(_attribute(gm, node), torch.Tensor)
        ]
        for node in gm.graph.find_nodes(op="placeholder"):
            env[node] = self._placeholder(node, node.meta.get("val"))
        for node in constants:  # they lie on the device from the beginning
            env[node] = self._placeholder(node, _attribute(gm, node))
        for node in gm.graph.nodes:
            if node not in env:
                env[node] = self._node(node, env)
        self._graph.lint()
        self.result = self._graph, self._attributes

    def _placeholder(self, node: fx.Node, value: Any) -> fx.Node:
        copy = self._graph.placeholder(node.name)
        copy.meta = dict(node.meta)
        copy.meta["val"] = _on_cuda(value)
        return copy

    def _node(self, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _device)  # pyright: ignore
        if node.op == "output":
            copy = self._graph.output(args[0])
            copy.meta = dict(node.meta)
            return copy
        if node.op == "get_attr":
            body = _attribute(self._gm, node)
            if isinstance(body, fx.GraphModule):
                graph, attributes = _Moved(body, self._mode).result
                self._attributes[str(node.target)] = _torch.graph_module(attributes, graph)
            copy = self._graph.get_attr(str(node.target))
            copy.meta = dict(node.meta)
            return copy
        target = node.target
        if target is aten._scaled_dot_product_flash_attention_for_cpu.default:
            target, args, kwargs = self._attention(args, kwargs)
        copy = self._graph.create_node("call_function", target, tuple(args), dict(kwargs), name=node.name)
        copy.meta = dict(node.meta)
        copy.meta["val"] = self._value(copy, node)
        return copy

    def _value(self, copy: fx.Node, node: fx.Node) -> Any:
        if isinstance(copy.target, torch._ops.HigherOrderOperator):  # what it makes is as it was, on the other device
            return fx.node.map_aggregate(node.meta.get("val"), _on_cuda)  # pyright: ignore
        args, kwargs = fx.map_arg((copy.args, dict(copy.kwargs)), lambda source: source.meta["val"])
        try:
            value = copy.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
            return fx.node.map_aggregate(value, _at_its_beginning) if _is_new(copy.target) else value  # pyright: ignore
        except NotImplementedError as error:
            raise CachepassError(
                f"{copy.target} has no kernel for CUDA", where="target", hint="capture the model on a CUDA device"
            ) from error

    def _attention(self, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The kernel that torch takes on CUDA: flash where it can, memory-efficient attention elsewhere."""
        given = dict(zip(("query", "key", "value", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        query, key, value = given["query"], given["key"], given["value"]
        dropout, causal, mask = given.get("dropout_p", 0.0), given.get("is_causal", False), given.get("attn_mask")
        scale = {"scale": given["scale"]} if given.get("scale") is not None else {}
        like = query.meta["val"]
        if mask is None and like.dtype in _FLASH_DTYPES and like.shape[-1] <= _FLASH_WIDTH:
            return aten._scaled_dot_product_flash_attention.default, (query, key, value, dropout, causal), scale
        if mask is not None:
            mask = self._bias(mask, query, key)
        target = aten._scaled_dot_product_efficient_attention.default
        return target, (query, key, value, mask, False, dropout, causal), scale

    def _bias(self, mask: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
        """The mask for each head, as the kernel wants it."""
        like = query.meta["val"]
        shape = [*like.shape[:-1], key.meta["val"].shape[-2]]
        node = self._graph.call_function(aten.expand.default, (mask, shape))
        node.meta = dict(mask.meta)
        node.meta["val"] = mask.meta["val"].expand(shape)
        return node


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    owner: Any = gm
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    return owner


def _on_cuda(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


def _is_new(target: Any) -> bool:
    """What an operation returns lies in memory of its own."""
    schema = getattr(target, "_schema", None)
    return schema is not None and all(returned.alias_info is None for returned in schema.returns)


def _at_its_beginning(value: Any) -> Any:
    """A value at the beginning of its memory. ``aten.copy`` of a view gives fake values that are not, when it is called
    for the first time, and blocks that are the same would differ by it."""
    return _on_cuda(value) if isinstance(value, torch.Tensor) and value.storage_offset() else value


def _device(argument: Any) -> Any:
    return CUDA if isinstance(argument, torch.device) else argument
