"""What is kept is the cache's, what is returned is the caller's; computed steps are the uncached model's to the bit."""

from __future__ import annotations

import pytest
import torch
from small_models import calls, transformer
from torch import nn
from torch.utils import _pytree as pytree

LOWERINGS = ["eager", pytest.param("specialize", marks=pytest.mark.inductor),
             pytest.param("cond", marks=pytest.mark.inductor)]  # fmt: skip


def reuse(*identifiers, **fields):
    """Outputs of these modules, computed at every third step and reused as they are."""
    return {"method": "taylorseer", "max_order": 0, "cache_interval": 3, "disable_cache_before_step": 1,
            "taylor_factors_dtype": None, "cache_identifiers": list(identifiers), **fields}  # fmt: skip


def compiled(model, cache, **options):
    options = {"lowering": "eager", "num_inference_steps": 9, "cache": cache, **options}
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)


# ---- what a model returns -------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """It returns what is cut, what is kept for a run, and views of both, in dicts and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.project = transformer(), nn.Linear(4, 4)

    def forward(self, x, timestep, text):
        sample, kept = self.inner(x, timestep), self.project(text)
        return {"sample": [sample], "rows": (sample[:, 0],), "kept": kept, "turned": kept.transpose(0, 1),
                "parts": list(kept.chunk(2, -1))}  # fmt: skip


@pytest.mark.parametrize("identifier", ["inner.proj_out", "inner"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_caller_owns_what_a_model_returns(identifier, lowering):
    """Written to in place it changes nothing of the cache, and held it is changed by no later step."""
    torch.manual_seed(0)
    original = Returns().eval().requires_grad_(False)
    model, text = compiled(original, reuse(identifier), lowering=lowering), torch.randn(2, 5, 4)
    runs = []
    for spoils in (False, True, False):
        held, seen = [], []
        for x, timestep in calls(9):
            returned = pytree.tree_leaves(model(x, timestep, text))
            held.append(returned)
            seen.append([value.clone() for value in returned])
            for value in returned if spoils else ():
                value.fill_(7.0)
        runs.append(seen)
        if not spoils:
            assert all(map(torch.equal, pytree.tree_leaves(held), pytree.tree_leaves(seen)))
    for other in runs[1:]:
        assert all(map(torch.equal, pytree.tree_leaves(other), pytree.tree_leaves(runs[0])))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_outputs_that_share_memory_in_a_model_share_it(lowering):
    torch.manual_seed(0)
    model = compiled(Returns().eval().requires_grad_(False), reuse("inner.proj_out"), lowering=lowering)
    text = torch.ones(2, 5, 4)
    for x, timestep in calls(4):
        returned = model(x, timestep, text)
        returned["kept"].fill_(1.0)
        returned["sample"][0].fill_(2.0)
        assert (returned["turned"] == 1).all() and (returned["parts"][1] == 1).all()
        assert (returned["rows"][0] == 2).all()
