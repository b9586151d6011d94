"""The bound that benchmarks print beside a time: counted on graphs whose work is known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bounds import Cost, Peaks, cost_of


def test_products_and_bytes_of_a_graph():
    def function(x, w, _unused, b):
        return torch.addmm(b, x, w).relu(), x.sum()

    gm = make_fx(function, tracing_mode="fake")(torch.ones(3, 4), torch.ones(4, 5), torch.ones(9), torch.ones(5))
    cost = cost_of(gm)
    assert cost.flops == 2 * 3 * 4 * 5
    assert cost.products == ((2 * 3 * 4 * 5, 4 * (5 + 12 + 20 + 15)),)
    assert cost.bytes == 4 * (12 + 20 + 5 + 15 + 1)  # the inputs that are read, and what is returned


@pytest.mark.parametrize(("peaks", "seconds"), [
    (Peaks(flops=100, bandwidth=1e9), 3.0),  # bound by arithmetic
    (Peaks(flops=1e9, bandwidth=10), 5.0),  # by the products' operands
    (Peaks(flops=100, bandwidth=10), 3.0 + 3.0),  # the one product by this, the other by that
])  # fmt: skip
def test_the_bound(peaks, seconds):
    cost = Cost(products=((300, 20), (0, 30)), bytes=10)
    assert cost.seconds(peaks) == pytest.approx(seconds, rel=1e-3)
    assert Cost(products=(), bytes=70).seconds(Peaks(flops=1, bandwidth=10)) == pytest.approx(7.0)
