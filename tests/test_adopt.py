"""Slots that take over the memory of values: which they are, and that a step leaves the same behind."""

from __future__ import annotations

import pytest
import torch
from small_models import calls, transformer

import cachepass
from cachepass.program.adopt import adopt
from cachepass.program.adopting import adopting
from cachepass.program.show import readable
from cachepass.run.live import programs_of

TAYLOR = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1,
          "taylor_factors_dtype": torch.float32}  # fmt: skip
X, T = torch.randn(2, 4, 8), torch.tensor([0.5, 0.5])


class Net(torch.nn.Module):
    """A layer that is cut, ``tail`` behind it."""

    def __init__(self, tail=torch.relu):
        super().__init__()
        self.cut, self.tail = torch.nn.Linear(8, 8), tail

    def forward(self, x, timestep):
        return self.tail(self.cut(x * timestep.view(-1, 1, 1)))


def adopted(model, cut="cut", **settings):
    """The compute program of a model, after adoption."""
    cache = TAYLOR | {"cache_identifiers": [cut]} | settings
    with torch.no_grad():
        found = cachepass.explain(model.eval(), X, T, cache=cache)
    program = found.program
    (phase,) = [phase for phase in program.plan.phases if not phase.predicted]
    variant = program.variant(phase)
    return adopt(variant.gm, variant.inputs, len(program.full.inputs)), program.names()


def test_a_product_is_returned_instead_of_copied():
    adoption, names = adopted(Net())
    assert len(adoption.slots) == 1
    lines = readable(adoption.gm.graph, names).splitlines()
    assert not any("copy_" in line for line in lines)
    assert lines[-1].startswith("return") and len(lines[-1].split(",")) == 2


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Net(torch.nn.Identity()), {}),  # the model returns it
        (Net(lambda x: x[:, :2]), {}),  # a part of it
        (Net(), {"taylor_factors_dtype": torch.bfloat16}),  # it is kept in another dtype
    ],
    ids=["returned", "returned in part", "another dtype"],
)
def test_what_is_copied_all_the_same(model, settings):
    adoption, _ = adopted(model, **settings)
    assert adoption.slots == ()


class Gelu(Net):
    def __init__(self):
        super().__init__()
        self.cut = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())


def test_a_kernel_of_inductors_writes_the_slot_itself():
    adoption, _ = adopted(Gelu())
    assert adoption.slots == ()


@pytest.mark.inductor
def test_what_is_kept_is_the_same():
    """Runs with and without, and their bytes; without, as CUDA graphs have it."""
    told = []
    for options in ({}, {"mode": "reduce-overhead"}):
        torch._dynamo.reset()
        model = torch.compile(
            transformer(), backend="cached_inductor", fullgraph=True, options={"cache": TAYLOR, **options}
        )
        with torch.no_grad():
            outputs = [model(x, t).clone() for _ in range(2) for x, t in calls(9)]
        (dispatcher, _), *_ = programs_of(model)
        assert any(lowered.name == "compute" for lowered in dispatcher.program.variants.values())
        summary = cachepass.summary(model)
        assert summary.cache_bytes == summary.planned_bytes > 0
        told.append((torch.stack(outputs), summary.cache_bytes))
    assert torch.equal(told[0][0], told[1][0]) and told[0][1] == told[1][1]


def test_a_program_that_fails_leaves_slots_with_memory():
    slot = torch.ones(4, 4)

    def fails(given):
        assert given[1].untyped_storage().nbytes() == 0
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        adopting(fails, (1,))([torch.ones(2), slot])
    assert slot.untyped_storage().nbytes() == 64
    slot.zero_()


def test_a_slot_takes_over_what_is_returned():
    slot, value, other = torch.zeros(4, 4), torch.ones(4, 4), torch.ones(3)
    results = adopting(lambda _: [other, value], (0,))([slot])
    assert results == [other] and slot.data_ptr() == value.data_ptr()
    with torch.inference_mode():
        kept = torch.full((4, 4), 2.0)
        adopting(lambda _: [kept], (0,))([slot])
    assert not slot.is_inference() and float(slot.sum()) == 32
