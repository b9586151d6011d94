"""Real diffusers pipelines that call their transformer several times per step, compiled in every way (eager lowering).

Equal to diffusers' own hooks in the same pipelines, told what the pipelines do not say.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, Case, _flow, _latents, _make, _prompts
from reference import TaylorSeer
from silent_pipelines import SILENT, Told, image_inputs, shorter, tiny_vae
from zoo import ALL, relative_error

import cachepass
from cachepass import TaylorSeerCacheConfig
from cachepass.integrations.diffusers import enable_cache

STEPS = 9
TOLERANCE = 1e-5  # relative, fp32
FIELDS: dict[str, Any] = {"cache_interval": 5, "max_order": 1, "disable_cache_before_step": 3,
                          "taylor_factors_dtype": torch.float32, "cache_identifiers": [r".*\.attn\d?"]}  # fmt: skip
TWICE = ("Flux", "Wan", "QwenImage", "HunyuanVideo")


def options() -> dict[str, Any]:
    return {"backend": "cached_inductor", "options": {"cache": TaylorSeerCacheConfig(**FIELDS), "lowering": "eager"}}


def one_line(pipe: Any) -> None:
    """What the README says."""
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, **options())


def in_place(pipe: Any) -> None:
    pipe.transformer.compile(**options())


def by_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, **options())


def enabled(pipe: Any) -> None:
    enable_cache(pipe, TaylorSeerCacheConfig(**FIELDS), lowering="eager")


Way = Callable[[Any], None]


def check(case: Case, way: Way, *, silent: bool, seeds: Sequence[int] = (0, 1, 1)) -> cachepass.Summary:
    """All runs are those of the hooks, and as much is predicted as they predict."""
    told, pipe, predicted = Told(case.make(), FIELDS, silent=silent), case.make(), 0
    way(pipe)
    schedule = TaylorSeer(FIELDS["cache_interval"], FIELDS["disable_cache_before_step"], FIELDS["max_order"])
    for seed in seeds:
        error = relative_error(case.run(pipe, STEPS, seed), case.run(told.pipe, STEPS, seed))
        assert error < TOLERANCE, f"run of seed {seed}: {error:.1e}"
        predicted += sum(schedule.predicts(step, 0) for count in told.calls.values() for step in range(count))
        told.end()
    summary = cachepass.summary(pipe.transformer)
    assert sum(summary.predicted.values()) == predicted > 0
    return summary


@pytest.mark.parametrize("lengths", ["same length", "shorter negative prompt"])
@pytest.mark.parametrize("way", [one_line, by_blocks])
@pytest.mark.parametrize("name", TWICE)
@pytest.mark.covering(strength=2)
def test_pipelines_that_name_their_calls(name, way, lengths):
    case = PIPELINES[name]
    if lengths != "same length":
        if name == "Flux":
            pytest.skip("FluxPipeline takes embeddings of one length only")
        case = dataclasses.replace(case, inputs=shorter(case.inputs, 3))
    summary = check(case, way, silent=False)
    assert set(summary.contexts) == {"cond", "uncond"}
    assert summary.runs == 3 * 2


@pytest.mark.parametrize(("name", "way"), [
    *((name, way) for name in ("FluxImg2Img", "FluxControlNet", "WanVideoToVideo")
      for way in (one_line, by_blocks, enabled)),
    *(("SD3 that skips layers", way) for way in (one_line, enabled)),
    *((f"QwenImage, {guider}", way) for guider in ("guidance", "projected") for way in (in_place, by_blocks)),
])  # fmt: skip
@pytest.mark.covering
def test_pipelines_that_do_not_name_their_calls(name, way):
    """A modular pipeline asks for the signature of ``forward``, which ``torch.compile(module)`` hides: in place."""
    summary = check(SILENT[name].case, way, silent=True)
    assert set(summary.contexts) == set(SILENT[name].contexts)


@pytest.mark.skipif(not ALL, reason="some forty captures; SD3's pipeline skips layers, too")
def test_a_guider_that_skips_layers():
    """Its third call has the first one's inputs; what differs is a hook, made anew each time: another graph."""
    silent = SILENT["QwenImage, skipped layers"]
    with torch._dynamo.config.patch(recompile_limit=64):
        summary = check(silent.case, in_place, silent=True, seeds=(0, 1))
    assert set(summary.contexts) == set(silent.contexts)


def test_a_pipeline_whose_timestep_ascends():
    """Lumina 2 gets 0 to 1, and calls twice, in no context; that a rise is no new run shows at the second one."""
    case = Case(
        lambda: _make("Lumina2Pipeline", "Lumina2Transformer2DModel", _flow, "vae text_encoder tokenizer"),
        lambda: _latents(**_prompts(6, 8, masks=True)),
        calls=2,
    )
    fields = FIELDS | {"cache_identifiers": [r"layers\.\d\.attn"]}
    told, pipe = Told(case.make(), fields, silent=True), case.make()
    pipe.transformer.compile(
        backend="cached_inductor", options={"cache": TaylorSeerCacheConfig(**fields), "lowering": "eager"}
    )
    case.run(pipe, STEPS)  # in which the first rise may be taken for a new run
    for seed in (0, 1):
        assert relative_error(case.run(pipe, STEPS, seed), case.run(told.pipe, STEPS, seed)) < TOLERANCE, seed
        told.end()
    assert cachepass.summary(pipe.transformer).predicted["taylorseer"] > 0


# ---- threads --------------------------------------------------------------------------------------------------------


class Turns:
    """One step of each thread after the other's."""

    def __init__(self, threads: int) -> None:
        self._waiting = list(range(threads))  # whose turn it is comes first
        self._changed = threading.Condition()

    def wait(self, own: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting[0] == own, timeout=120)

    def over(self, own: int, *, last: bool = False) -> None:
        with self._changed:
            self._waiting.remove(own)
            self._waiting += [] if last else [own]
            self._changed.notify_all()


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_two_copies_of_a_pipeline_in_two_threads(name):
    """They share the transformer, whose cache is on, and nothing else: each gives what it gives alone."""
    case, pipe = PIPELINES[name], PIPELINES[name].make()
    enabled(pipe)
    alone = [case.run(pipe, STEPS, seed) for seed in (0, 1)]
    results: dict[int, torch.Tensor] = {}
    failures: list[BaseException] = []
    turns = Turns(2)

    def work(seed: int) -> None:
        def next_one(_: Any, __: int, ___: Any, tensors: Any) -> Any:
            turns.over(seed)
            turns.wait(seed)
            return tensors

        own = copy.copy(pipe)
        own.scheduler = copy.deepcopy(pipe.scheduler)
        turns.wait(seed)
        try:
            with torch.no_grad():
                results[seed] = case.run(own, STEPS, seed, callback_on_step_end=next_one)
        except BaseException as error:
            failures.append(error)
        turns.over(seed, last=True)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for seed, expected in enumerate(alone):
        assert relative_error(results[seed], expected) < TOLERANCE, f"thread {seed}"
    predicted = sum(cachepass.summary(pipe.transformer).predicted.values())
    schedule = TaylorSeer(FIELDS["cache_interval"], FIELDS["disable_cache_before_step"], FIELDS["max_order"])
    assert predicted == 2 * 2 * 2 * sum(schedule.predicts(step, 0) for step in range(STEPS))


# ---- other runs of the same transformer -----------------------------------------------------------------------------


def image_to_image_of(pipe: Any) -> Any:
    """A second pipeline on the components of a first one, with a scheduler of its own, as ``from_pipe`` makes it."""
    import diffusers

    components = pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}
    other = diffusers.FluxImg2ImgPipeline(**components)
    other.set_progress_bar_config(disable=True)
    return other


def flux_with_vae() -> Any:
    return _make(
        "FluxPipeline",
        "FluxTransformer2DModel",
        _flow,
        "text_encoder tokenizer text_encoder_2 tokenizer_2",
        vae=tiny_vae(),
    )


FLUX = dataclasses.replace(PIPELINES["Flux"], make=flux_with_vae)
IMAGE_TO_IMAGE = Case(flux_with_vae, image_inputs)


def cancel(step: int) -> Callable[..., Any]:
    def callback(_: Any, now: int, __: Any, tensors: Any) -> Any:
        if now == step:
            raise KeyboardInterrupt
        return tensors

    return callback


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("way", [one_line, in_place, by_blocks, enabled])
@pytest.mark.covering
def test_image_to_image_after_a_run_that_was_cancelled(way, cfg):
    """It begins below the timestep at which the other one stopped, on the same latents' size, in no context."""
    given = {"strength": 0.5, "true_cfg_scale": cfg}
    expected = image_to_image_of(flux_with_vae())
    fresh = Told(expected, FIELDS, silent=True)
    pipe = flux_with_vae()
    way(pipe)
    second = image_to_image_of(pipe)
    with pytest.raises(KeyboardInterrupt):
        FLUX.run(pipe, STEPS, true_cfg_scale=cfg, height=16, width=16, callback_on_step_end=cancel(3))
    for seed in (0, 1):
        result = IMAGE_TO_IMAGE.run(second, 2 * STEPS, seed, **given)
        error = relative_error(result, IMAGE_TO_IMAGE.run(fresh.pipe, 2 * STEPS, seed, **given))
        assert error < TOLERANCE, f"run {seed}: {error:.1e}"
        fresh.end()


PAB: dict[str, Any] = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 900)}


def test_a_transformer_that_a_second_pipeline_shares():
    """The pipeline whose cache was enabled is gone: the second one's timesteps are heard, and PAB fires."""
    import diffusers
    from diffusers.hooks import apply_pyramid_attention_broadcast

    expected, now = image_to_image_of(flux_with_vae()), [0.0]
    expected.transformer.register_forward_pre_hook(
        lambda _, __, given: now.__setitem__(0, 1000 * float(given["timestep"][0])), with_kwargs=True
    )
    config = diffusers.PyramidAttentionBroadcastConfig(**PAB, current_timestep_callback=lambda: now[0])
    apply_pyramid_attention_broadcast(expected.transformer, config)
    pipe = flux_with_vae()
    enable_cache(pipe, PAB | {"method": "pab"}, lowering="eager")
    second = image_to_image_of(pipe)
    del pipe
    result = IMAGE_TO_IMAGE.run(second, 2 * STEPS)
    assert relative_error(result, IMAGE_TO_IMAGE.run(expected, 2 * STEPS)) < TOLERANCE
    assert cachepass.summary(second.transformer).predicted["spatial"] > 0
