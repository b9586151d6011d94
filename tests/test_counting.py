"""The backend that counts what would be launched on a GPU: graphs, what is between them, and what the GPU is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_models import calls, transformer
from torch import nn
from zoo import ALL

import cachepass
from cachepass.gpu.program import seconds_of
from cachepass.gpu.table import GPUS

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from counting import Counting

H100 = GPUS["h100"]


class Deciding(nn.Module):
    """A block that is left out where its input is as it was, as hooks decide it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.before = nn.Linear(64, 64), nn.Linear(64, 64), None

    @torch.compiler.disable
    def differs(self, x):
        return self.before is None or ((x - self.before).abs().mean() / self.before.abs().mean()).item() > 0.5

    def forward(self, x):
        x = self.first(x).relu()
        if self.differs(x):
            x = self.second(x).sigmoid()
        self.before = x
        return x


def names(launches) -> list[str]:
    return ["fused" if launch.fused else launch.name for launch in launches]


def test_graphs_and_what_is_between_them():
    torch._dynamo.reset()
    counting, model, x = Counting(H100), Deciding().eval(), torch.ones(8, 64)
    compiled = torch.compile(model, backend=counting.backend, dynamic=False)
    asked = ["aten.sub", "aten.abs", "aten.mean", "aten.abs", "aten.mean", "aten.div"]
    product = ["aten.mm", "fused"]
    for answer, own in ((0.0, product), (1.0, [*asked, *product]), (0.0, asked)):
        counting.answer = answer
        with counting.step() as launches, torch.no_grad():
            out = compiled(x)
        assert names(launches) == [*product, *own] and out.shape == (8, 64)
    first, relu, difference, *_ = launches
    assert (first.flops, first.bytes_read) == (2 * 8 * 64 * 64, 4 * (8 * 64 + 64 * 64))
    assert (relu.bytes_moved, difference.bytes_moved) == (4 * (2 * 8 * 64 + 64), 3 * 4 * 8 * 64)
    assert seconds_of(launches, H100) > len(launches) * H100.launch_seconds


def test_without_breaks_it_is_the_plain_program():
    torch._dynamo.reset()
    x, t = calls(1)[0]
    counting = Counting(H100)
    compiled = torch.compile(transformer(), backend=counting.backend, dynamic=False)
    with counting.step() as launches, torch.no_grad():
        compiled(x, t)
    plain = cachepass.explain(transformer(), x, t, cache={"method": "taylorseer"}, target="h100").target.plain
    assert counting.graphs == 1
    assert [launch.bytes_moved for launch in launches] == [launch.bytes_moved for launch in plain.launches]
    assert seconds_of(launches, H100) == pytest.approx(plain.seconds)


def test_what_only_has_the_shape_of_a_value_does_not_read_it():
    x = torch.ones(8, 64)
    with Counting(H100).step() as launches:
        torch.zeros_like(x)
    assert [(launch.bytes_read, launch.bytes_written) for launch in launches] == [(0, 4 * 8 * 64)]


@pytest.mark.skipif(not ALL, reason="runs with CACHEPASS_ZOO=1")
@pytest.mark.parametrize(("method", "settings"), [
    ("taylorseer", {"cache_interval": 5, "max_order": 1, "disable_cache_before_step": 2}),
    ("pab", {"spatial_attention_block_skip_range": 2}),
    ("first_block_cache", {"threshold": 0.1}),
])  # fmt: skip
def test_hooks_of_diffusers(method, settings):
    from hooked import counted

    told = counted("toy", method, settings, H100)
    assert told["compute"]["flops"] == told["plain"]["flops"] > told["predict"]["flops"] > 0
