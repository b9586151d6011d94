"""FasterCache where guidance ends in the middle of a run, or begins late: as its definition, written slowly, says."""

from __future__ import annotations

import warnings

import pytest
import torch
from pipelines import PIPELINES
from reference import FasterCache
from test_diffusers import Defined
from test_fastercache import SMALL, guided, guided_calls, small
from zoo import relative_error

import cachepass
from cachepass.inspect.summary import programs_of
from cachepass.integrations.diffusers import enable_cache
from cachepass.run.guidance import is_half
from cachepass.testing import count_compiles

STEPS, TOLERANCE = 9, 1e-5
KINDS = {f"inner.blocks.{i}.attn": "spatial" for i in range(2)}


def run_of(batch, alone, steps=STEPS):
    """The calls of a run of guidance batches ``[uncond, cond]``; of the steps ``alone`` the second half only."""
    return [
        (x[batch // 2 :], t[batch // 2 :]) if step in alone else (x, t)
        for step, (x, t) in enumerate(guided_calls(steps, batch))
    ]


def definition():
    return FasterCache(
        guided(), cachepass.FasterCacheConfig(**{k: v for k, v in SMALL.items() if k != "method"}), KINDS
    )


def check(model, reference, batch, alone):
    reference.start()
    for step, (x, t) in enumerate(run_of(batch, alone)):
        expected = reference(float(t[0]), len(x), alone=step in alone, hidden_states=x, timestep=t)
        error = relative_error(model(x, t), expected)
        assert error < TOLERANCE, f"step {step}: {error:.1e}"


def predicted(model):
    return cachepass.summary(model).predicted


@pytest.fixture
def reference(monkeypatch):
    made = definition()
    plain = made.model.forward
    monkeypatch.setattr(made.model, "forward", lambda **call: (plain(**call),))
    return made


@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize("options", [{}, {"num_inference_steps": STEPS}], ids=["timesteps", "counted"])
@pytest.mark.covering
def test_guidance_that_ends(batch, options, reference):
    """The attentions go on from the same history; the next run is guided as ever. Three captures in all."""
    model = small(**options)
    with count_compiles() as counts:
        for end in (5, 5, STEPS, 4):
            check(model, reference, batch, range(end, STEPS))
    assert (counts.graphs, counts.graph_breaks) == (3, 0)
    summary = cachepass.summary(model)
    assert (summary.runs, summary.steps) == (4, 4 * STEPS)
    assert summary.predicted == {"unconditional": 3 + 3 + 6 + 2, "spatial": 4 * 3}
    assert not summary.warnings


@pytest.mark.parametrize("batch", [2, 6])
def test_guidance_that_begins_late(batch, reference):
    """Known from a run with guidance before it: without one, a batch that cannot be halved is an error."""
    model = small()
    check(model, reference, batch, ())
    before = predicted(model)["unconditional"]
    for _ in range(2):
        check(model, reference, batch, range(4))
    check(model, reference, batch, (0, 1, 7, 8))
    summary = cachepass.summary(model)
    assert (summary.runs, summary.steps) == (4, 4 * STEPS)
    assert summary.predicted["unconditional"] == before + 2 * 3 + 2
    assert not summary.warnings


def test_batches_of_two_sizes_that_take_turns():
    """Each is guided, and one is half of the other: nothing of the one is taken for the other's conditional half."""
    model, alone = small(), [small(), small()]
    sizes = [guided_calls(STEPS, batch) for batch in (4, 2)]
    for step in range(STEPS):
        for which in (0, 1):
            call = sizes[which][step]
            assert torch.equal(model(*call), alone[which](*call))
    assert predicted(model)["unconditional"] == sum(predicted(one)["unconditional"] for one in alone)


def test_a_size_that_is_both():
    """A graph is captured for guidance batches, or for their conditional half: as the other nothing is predicted."""
    model, plain = small(), guided()
    for x, t in guided_calls(STEPS, 4):
        model(x, t)
    for x, t in guided_calls(STEPS, 2):
        model(x, t)
    before = predicted(model)
    with pytest.warns(cachepass.CachepassWarning, match="guidance batches first and the conditional half"):
        for step, (x, t) in enumerate(run_of(4, range(5, STEPS))):
            result = model(x, t)
            if step >= 5:
                assert relative_error(result, plain(x, t)) < TOLERANCE
    assert predicted(model)["unconditional"] == before["unconditional"] + 3

    torch._dynamo.reset()
    model = small()
    for x, t in run_of(4, range(5, STEPS)):
        model(x, t)
    with pytest.warns(cachepass.CachepassWarning, match="conditional half of larger batches first and guidance"):
        for x, t in guided_calls(STEPS, 2, seed=4):
            assert relative_error(model(x, t), plain(x, t)) < TOLERANCE


def test_a_run_that_was_given_up_is_not_gone_on_with(reference):
    """A guided run stops at 760; the next one begins at 900 without guidance, and gets it at 690."""
    model = small()
    check(model, reference, 2, range(5, STEPS))
    for x, t in run_of(2, ())[:3]:
        model(x, t)
    check(model, reference, 2, range(3))


def test_two_calls_per_step_at_the_size_of_the_half():
    model = small()
    for x, t in run_of(2, range(5, STEPS)):
        model(x, t)
    with cachepass.cache_context("cond"), pytest.raises(cachepass.BatchError, match="captured for guidance batches"):
        model(x, t)


@pytest.mark.parametrize(("kind", "whole", "half"), [
    ((((1, 4, 8), "f"),), (((2, 4, 8), "f"),), True),
    ((((2, 4, 8), "f"),), (((2, 4, 8), "f"),), False),
    ((((1, 4, 8), "f"),), (((2, 4, 8), "h"),), False),
    ((((1, 4, 8), "f"),), (((2, 5, 8), "f"),), False),
    ((((4, 8), "f"),), (((4, 8), "f"), ((4, 8), "f")), True),
    ((((4, 8), "f"),), (((4, 8), "f"), ((4, 9), "f")), False),
    (((), "f"), ((), "f"), False),
    (None, None, False),
])  # fmt: skip
def test_kinds_of_half_a_batch(kind, whole, half):
    assert is_half(kind, whole) is half


def test_the_cut_off_callback_of_diffusers():
    """StableDiffusion3Pipeline with SD3CFGCutoffCallback, twice, and once more without it."""
    from diffusers.callbacks import SD3CFGCutoffCallback

    case = PIPELINES["SD3"]
    config = cachepass.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=3,
        tensor_format=case.latents,
    )
    pipe, expected = case.make(), case.make()
    enable_cache(pipe, config, lowering="eager")
    more = [{"callback_on_step_end": SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=4)}] * 2 + [{}]
    with warnings.catch_warnings():
        warnings.simplefilter("error", cachepass.CachepassWarning)
        results = [case.run(pipe, STEPS, seed, **given) for seed, given in enumerate(more)]
    summary = cachepass.summary(pipe.transformer)
    assert (summary.runs, summary.steps) == (3, 3 * STEPS)
    kinds = {cut.region: cut.group for cut in next(programs_of(pipe.transformer))[0].program.plan.cuts}
    reference = FasterCache(case.make().transformer, config, kinds)
    expected.transformer.forward = WithoutGuidance(expected, case, reference, 1)
    for seed, (result, given) in enumerate(zip(results, more, strict=True)):
        reference.start()
        assert relative_error(result, case.run(expected, STEPS, seed, **given)) < TOLERANCE


class WithoutGuidance(Defined):
    """Calls with one sample are conditional ones."""

    def _output(self, cond):
        batch = len(cond["hidden_states"])
        return self.reference(float(cond["timestep"].flatten()[0]), batch, alone=batch == 1, **cond)
