"""Values whose sizes depend on data: prompts that are cut off where a mask ends.

Expected is what diffusers' hooks, or the method's definition, give.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from reference import Reference, TaylorSeer, twin
from small_models import Attention, FeedForward
from torch import nn
from zoo import build, first_tensor, relative_error, taylorseer_oracle, trajectory

import cachepass
from cachepass.testing import count_compiles

STEPS, TOLERANCE = 8, 1e-5
FRAMEPACK = "HunyuanVideoFramepackTransformer3DModel"  # with one sample, its attentions run over what the mask leaves
FIELDS = {"cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(x)


class Masked(nn.Module):
    """Attentions over the latents and as many tokens of the prompt as its mask has (or, ``by_latents``, as many as the
    latents have values above zero)."""

    def __init__(self, *, by_latents: bool = False) -> None:
        super().__init__()
        self.blocks, self.ff, self.by_latents = nn.ModuleList([Layer()]), FeedForward(), by_latents

    def forward(self, x, timestep, prompt, mask):
        count = (x[:, :, 0] > 0).sum(1) if self.by_latents else mask.sum(1)
        prompt = prompt[:, : count[0]]
        both = torch.cat([x * torch.cos(timestep / 500)[:, None, None], prompt], 1)
        both = self.blocks[0](both)
        x, prompt = both[:, : x.shape[1]], both[:, x.shape[1] :]
        return self.ff(x) + prompt.mean(1, keepdim=True)


def masked(**options) -> Masked:
    torch.manual_seed(0)
    return Masked(**options).eval().requires_grad_(False)


def compiled(model, lowering="eager", **options):
    cache = {"method": "taylorseer", **FIELDS, "taylor_factors_dtype": None}
    options = {"cache": cache, "lowering": lowering, **options}
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)


def calls(seed: int):
    generator = torch.Generator().manual_seed(seed)
    x, prompt = torch.randn(1, 6, 8, generator=generator), torch.randn(1, 7, 8, generator=generator)
    for step in range(STEPS):
        x = x + 0.05 * torch.randn(x.shape, generator=generator)
        yield x, torch.full((1,), 900.0 - 100 * step), prompt


def mask_of(tokens: int) -> torch.Tensor:
    return (torch.arange(7) < tokens).long()[None]


@pytest.mark.parametrize("lowering", ["eager", pytest.param("specialize", marks=pytest.mark.inductor)])
def test_kept_while_the_mask_stays_the_same(lowering):
    """Masks of several lengths, through one capture."""
    model = masked()
    reference, step = Reference(twin(model), TaylorSeer(3, 2, 1), ["blocks.0.attn"]), compiled(model, lowering)
    with count_compiles() as counts:
        for seed, mask in enumerate([mask_of(3), mask_of(5), mask_of(3)]):
            for x, t, prompt in calls(seed):
                expected = reference.step(seed, float(t), x, t, prompt, mask)
                assert relative_error(step(x, t, prompt, mask), expected) < TOLERANCE, (seed, float(t))
    assert counts.graph_breaks == 0 and counts.recompiles == 0
    done = cachepass.summary(step)
    assert done.predicted["taylorseer"] == reference.predicted == 12
    slot = (6 + 3) * 8 * 4
    assert done.cache_bytes == 2 * slot  # of the last mask's length, and nothing of what it was cut out of


def test_a_mask_that_is_made_anew_in_every_step():
    """Declared to be no other conditioning, it still may have another length: everything is computed, and that said."""
    model = masked()
    step = compiled(model, varying_inputs=["mask"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", cachepass.CachepassWarning)
        for number, (x, t, prompt) in enumerate(calls(0)):
            mask = mask_of(3 + number % 2)
            torch.testing.assert_close(step(x, t, prompt, mask), model(x, t, prompt, mask))
    said = [str(each.message) for each in caught if issubclass(each.category, cachepass.CachepassWarning)]
    assert any("give the same tensor object in all steps of a run" in message for message in said)
    assert cachepass.summary(step).predicted.get("taylorseer", 0) == 0


@pytest.mark.parametrize(("model", "lowering", "reason"), [
    (masked(by_latents=True), "eager", "attn: .*the size of an output depends on data that may change from step"),
    (masked(), "cond", 'attn: .*the size of an output depends on data, which lowering="cond" does not allow'),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused(model, lowering, reason):
    x, t, prompt = next(calls(0))
    with pytest.raises(cachepass.NoMatchError, match=reason):
        compiled(model, lowering)(x, t, prompt, mask_of(3))


def test_a_decision_looks_at_nothing_of_unknown_size():
    x, t, prompt = next(calls(0))
    cache = cachepass.CacheConfig(
        cut=cachepass.cut.Modules("ff"),
        schedule=cachepass.schedule.Threshold(0.1),
        probe=cachepass.cut.ModuleOutput("blocks.0.attn"),
    )
    with pytest.raises(cachepass.NoMatchError, match="what a decision looks at has a size that depends on data"):
        compiled(masked(), cache=cache)(x, t, prompt, mask_of(3))


def test_bytes_of_unknown_size_are_unknown():
    x, t, prompt = next(calls(0))
    printed = str(cachepass.explain(masked(), x, t, prompt, mask_of(3), cache="taylorseer"))
    assert (
        "as data says" in printed and "cache per context: 0 B (0 B) and what sizes that depend on data take" in printed
    )


def test_a_model_of_diffusers_equals_its_hooks():
    patterns = {"cache_identifiers": [r".*transformer_blocks\.\d+\.attn$"]}
    oracle = taylorseer_oracle(FRAMEPACK, **FIELDS, **patterns, taylor_factors_dtype=torch.float32)
    cache = {"method": "taylorseer", **FIELDS, **patterns, "taylor_factors_dtype": None}
    model = build(FRAMEPACK)
    step = compiled(model, cache=cache)
    for tokens in (4, 5):
        mask = (torch.arange(6) < tokens).long()[None]
        for now, call in trajectory(FRAMEPACK, STEPS):
            given = {name: value[:1] if not name.startswith("indices") else value for name, value in call.items()}
            given["encoder_attention_mask"] = mask
            result = first_tensor(step(**given))
            assert relative_error(result, oracle(**given)) < TOLERANCE, (tokens, now)
        oracle.reset()
    done = cachepass.summary(step)
    assert len(done.modules) == 4 and done.predicted["taylorseer"] == 8
    assert done.flops is None
