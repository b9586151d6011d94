"""The timeline of ``explain`` says what runs do: it is compared with real ones, step by step."""

from __future__ import annotations

import pytest
import torch
from small_models import calls, transformer
from torch import nn

import cachepass
from cachepass.inspect.timeline import even_timesteps
from cachepass.run.live import programs_of

X, T = calls(1)[0]
STEPS = 20
RANGE = (100, 800)


class Guided(nn.Module):
    """A small transformer whose output has the layout of images, ``[batch, channels, height, width]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = transformer()

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        tokens = self.inner(hidden_states.reshape(batch, channels, height * width), timestep)
        return tokens.reshape(batch, channels, height, width)


FASTER = {"method": "fastercache", "tensor_format": "BCHW", "unconditional_batch_skip_range": 4,
          "unconditional_batch_timestep_skip_range": (-1, 700), "spatial_attention_block_skip_range": 2,
          "spatial_attention_timestep_skip_range": RANGE}  # fmt: skip
CONFIGS = {
    "taylorseer": {"method": "taylorseer", "cache_interval": 4, "disable_cache_before_step": 3,
                   "disable_cache_after_step": 17, "cache_identifiers": ["attention", "mlp"]},
    "pab, two kinds": {"method": "pab", "spatial_attention_block_skip_range": 2, "mlp_block_skip_range": 3,
                       "spatial_attention_timestep_skip_range": RANGE, "mlp_timestep_skip_range": (-1, 500)},
    "fastercache, distilled": {**FASTER, "is_guidance_distilled": True},
    "fastercache": FASTER,
    "invariant": {"method": "invariant"},
}  # fmt: skip


def real_run(model, cache, timesteps, contexts, inputs):
    """What groups did in every call: ``{(context, group): [predicted, ...]}``, and the summary."""
    compiled = torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": cache, "lowering": "eager"}
    )
    seen: dict[tuple[str, str], list[bool]] = {}
    for timestep in timesteps:
        for context in contexts:
            with cachepass.cache_context(context):
                compiled(inputs, torch.full((len(inputs),), timestep))
            record = next(iter(programs_of(compiled)))[1].model
            run = record.latest(context)
            assert not run.computed & run.predicted
            for group in run.computed | run.predicted:
                seen.setdefault((context, group), []).append(group in run.predicted)
    return seen, cachepass.summary(compiled)


def assert_agrees(lanes, seen, summary):
    assert {
        (lane.context, lane.group): [cell.state not in ("computed", "plain") for cell in lane.cells] for lane in lanes
    } == seen
    for counts, kind in ((summary.computed, "computed"), (summary.predicted, "predicted")):
        told: dict[str, int] = {}
        for lane in lanes:
            told[lane.group] = told.get(lane.group, 0) + getattr(lane, kind)
        assert {group: count for group, count in told.items() if count} == counts


@pytest.mark.parametrize("name", ["taylorseer", "pab, two kinds", "fastercache, distilled", "fastercache"])
def test_the_timeline_is_what_a_run_does(name):
    cache, contexts = CONFIGS[name], ("default",)
    guided = name == "fastercache"
    model, inputs = (Guided(), torch.randn(2, 4, 2, 4)) if guided else (transformer(), X)
    timesteps = even_timesteps(STEPS)
    lanes = cachepass.explain(model.eval(), inputs, T, cache=cache).timeline(STEPS, contexts=contexts)
    seen, summary = real_run(model, cache, timesteps, contexts, inputs)
    assert_agrees(lanes, seen, summary)
    assert all(lane.predicted and lane.computed for lane in lanes)
    if guided:
        assert {cell.state for cell in lanes[0].cells} == {"computed", "half"}
        assert {cell.phase for cell in lanes[1].cells} == {"both", "half", "half/predict"}


@pytest.mark.parametrize("contexts", [("cond", "uncond"), ("a/cond", "b/cond", "b/uncond", "a/uncond")])
def test_guidance_by_two_calls(contexts):
    model, inputs = Guided().eval(), torch.randn(1, 4, 2, 4)
    with cachepass.cache_context("cond"):
        explanation = cachepass.explain(model, inputs, T[:1], cache=FASTER)
    lanes = explanation.timeline(STEPS, contexts=contexts)
    assert_agrees(lanes, *real_run(model, FASTER, even_timesteps(STEPS), contexts, inputs))
    assert "answered" in {cell.state for cell in lanes[-1].cells}
    if len(contexts) == 2:
        assert explanation.timeline(STEPS) == lanes  # these contexts are the default of such a plan


def test_an_unconditional_call_that_comes_first_keeps_nothing():
    model = Guided().eval()
    with cachepass.cache_context("cond"):
        explanation = cachepass.explain(model, torch.randn(1, 4, 2, 4), T[:1], cache=FASTER)
    lanes = explanation.timeline(STEPS, contexts=("uncond", "cond"))
    assert {(lane.group, cell.state) for lane in lanes for cell in lane.cells} == {
        ("unconditional", "plain"),
        ("spatial", "computed"),
    }
    seen, summary = real_run(model, FASTER, even_timesteps(4), ("uncond", "cond"), torch.randn(1, 4, 2, 4))
    assert not summary.predicted and not any(predicted for lane in seen.values() for predicted in lane)


def test_timesteps_are_scaled_as_the_model_is_called():
    options = {"timestep_scale": 1000, "num_inference_steps": 8}
    explanation = cachepass.explain(transformer(), X, T, cache=CONFIGS["pab, two kinds"], options=options)
    given = [1 - step / 8 for step in range(8)]
    assert explanation.timeline(timesteps=given) == explanation.timeline()
    assert [cell.timestep for cell in explanation.timeline()[0].cells] == [1000 - 125 * step for step in range(8)]
    assert len(explanation.timeline(5)[0].cells) == 5


def test_a_lane_prints_as_a_line():
    lanes = cachepass.explain(transformer(), X, T, cache=CONFIGS["taylorseer"]).timeline(12)
    assert [str(lane) for lane in lanes] == ["default taylorseer: ###.#...#...  5 computed, 7 predicted"]
    assert len(cachepass.explain(transformer(), X, T, cache=CONFIGS["taylorseer"]).timeline()[0].cells) == 28


def test_no_group_no_lane():
    explanation = cachepass.explain(
        transformer(cross=True), X, T, torch.randn(2, 4, 8), cache="invariant", options={"num_inference_steps": 9}
    )
    assert explanation.timeline() == ()


def test_what_is_wrong_is_an_error():
    explanation = cachepass.explain(transformer(), X, T, cache=CONFIGS["taylorseer"])
    with pytest.raises(cachepass.OptionError, match="3 timesteps for 4 steps"):
        explanation.timeline(4, timesteps=[3, 2, 1])
    batches = cachepass.explain(Guided().eval(), torch.randn(2, 4, 2, 4), T, cache=FASTER)
    with pytest.raises(cachepass.BatchError, match="guidance batches, and not for two calls"):
        batches.timeline(contexts=("cond", "uncond"))
