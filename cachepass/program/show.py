"""Show: graphs as people read them, and what a pass changed as a unified diff.

Placeholders carry the names of what they hold (``blocks.0.attn.to_q.weight``), nodes keep theirs, and conditionals
are printed with their branches, so that two prints of the same model differ only where a pass changed something.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import fx

from .. import _torch

_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64",
           torch.int64: "i64", torch.int32: "i32", torch.bool: "b8",
           torch.complex64: "c64"}  # fmt: skip


def readable(graph: fx.Graph, names: dict[str, str] | None = None) -> str:
    """One line per node: ``add: f32[2, 8] = aten.add.Tensor(x, attn)``; inputs by the names given."""
    return "\n".join([*_lines(graph, names or {}, ""), *_bodies(graph)]) + "\n"


def _bodies(graph: fx.Graph) -> Iterator[str]:
    """What the graph calls, once each."""
    owner = graph.owning_module
    for node in graph.find_nodes(op="get_attr"):
        if owner is not None and _is_body(node):
            inner = owner.get_submodule(str(node.target))
            assert isinstance(inner, fx.GraphModule)
            yield f"{node.target}({', '.join(n.name for n in inner.graph.find_nodes(op='placeholder'))}):"
            yield from _lines(inner.graph, {}, "  ", inputs=False)


def _is_body(node: fx.Node) -> bool:
    return node.op == "get_attr" and any(user.target is _torch.INVOKE_SUBGRAPH for user in node.users)


def _lines(graph: fx.Graph, names: dict[str, str], indent: str, *, inputs: bool = True) -> Iterator[str]:
    """``inputs=False`` for a branch: its inputs are the outer values of the same name."""

    def name(node: fx.Node) -> str:
        return names.get(node.name, node.name)

    owner = graph.owning_module
    for node in graph.nodes:
        if node.op == "placeholder":
            if inputs and node.users:
                yield f"{indent}{name(node)}: {_type(_value(node))}"
        elif node.op == "output":
            yield f"{indent}return {_text(node.args[0], name)}"
        elif node.op == "get_attr" and any(user.target is _torch.COND for user in node.users):
            continue  # printed where it is used
        elif _is_body(node):
            continue  # printed at the end
        elif node.target is _torch.INVOKE_SUBGRAPH:
            callee, _, *given = node.args
            yield f"{indent}{node.name} = {callee.target}({', '.join(map(name, given))})"
        elif node.target is _torch.COND and owner is not None:
            predicate, predict, compute, operands = node.args
            assert isinstance(predicate, fx.Node)
            yield f"{indent}{node.name} = cond({name(predicate)}):"
            for label, branch in (("predict", predict), ("compute", compute)):
                assert isinstance(branch, fx.Node) and isinstance(branch.target, str)
                inner = owner.get_submodule(branch.target)
                assert isinstance(inner, fx.GraphModule) and isinstance(operands, tuple)
                yield f"{indent}  {label}:"
                yield from _lines(inner.graph, names, indent + "    ", inputs=False)
        else:
            yield f"{indent}{node.name}: {_type(_value(node))} = {_call(node, name)}"


def _call(node: fx.Node, name) -> str:
    target = node.target
    label = str(target) if isinstance(target, (str, torch._ops.OpOverload)) else getattr(target, "__name__", target)
    parts = [_text(arg, name) for arg in node.args] + [f"{k}={_text(v, name)}" for k, v in node.kwargs.items()]
    return f"{label}({', '.join(parts)})"


def _text(value: object, name) -> str:
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, (tuple, list)):
        left, right = ("(", ")") if isinstance(value, tuple) else ("[", "]")
        return left + ", ".join(_text(v, name) for v in value) + right
    return repr(value)


def _value(node: fx.Node) -> object:
    """Fake, as ATen graphs or as Dynamo's keep it."""
    return node.meta.get("val", node.meta.get("example_value"))


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_type(v) for v in value) + ")"
    return type(value).__name__


def diff(before: str, after: str, *, fromfile: str = "before", tofile: str = "after", context: int = 1) -> str:
    """Unified diff of two prints."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), fromfile, tofile, lineterm="", n=context)
    return "\n".join(lines) + "\n"
