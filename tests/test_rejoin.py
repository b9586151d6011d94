"""What was cut apart to be put together again."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from cachepass.program.rejoin import rejoin


def cats(function) -> int:
    """Concatenations that are left of a function's graph, which must give the same."""
    x = torch.randn(2, 6, 4)
    gm = make_fx(lambda x: (function(x, x.sin()),), tracing_mode="fake")(x)
    expected = fx.Interpreter(gm).run(x)
    rejoin(gm.graph)
    gm.recompile()
    assert torch.equal(gm(x)[0], expected[0])
    return sum(node.target is torch.ops.aten.cat.default for node in gm.graph.nodes)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda _, y: torch.cat([y[:, :2], y[:, 2:]], 1).cos(), 0),
        (lambda _, y: torch.cat([y[:, :2], y[:, 2:4], y[:, 4:]], -2).cos(), 0),
        (lambda _, y: torch.cat([y[:, 2:], y[:, :2]], 1).cos(), 1),  # turned round
        (lambda _, y: torch.cat([y[:, :2], y[:, 3:]], 1).cos(), 1),  # a row is missing
        (lambda _, y: torch.cat([y[:, :2], y[:, :2]], 1).cos(), 1),
        (lambda x, y: torch.cat([y[:, :2], x.cos()[:, 2:]], 1).cos(), 1),  # of two values
        (lambda _, y: torch.cat([y[..., :2], y[..., 2:]], 1).cos(), 1),  # along another dimension
        (lambda _, y: torch.cat([y[:, ::2], y[:, 1::2]], 1).cos(), 1),  # in steps
        (lambda x, _: torch.cat([x[:, :2], x[:, 2:]], 1).cos(), 1),  # an input: somebody may write to it
        (lambda _, y: torch.cat([y[:, :2], y[:, 2:]], 1), 1),  # what leaves the graph is a copy
        (lambda _, y: torch.cat([(t := y.transpose(1, 2))[:, :2], t[:, 2:]], 1).cos(), 1),  # strides differ
    ],
)
def test_only_all_parts_in_order_are_the_whole(function, left):
    assert cats(function) == left
