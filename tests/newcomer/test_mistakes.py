"""Mistakes of a first hour, and the message that each gets: what is wrong, where, and what to do."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipelines import PIPELINES
from small_models import calls, transformer

import cachepass
from cachepass import (
    CacheConfig,
    CachepassError,
    CachepassWarning,
    DBCacheConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    Group,
    MagCacheConfig,
    Part,
    PyramidAttentionBroadcastConfig,
    Recipe,
    TaylorSeerCacheConfig,
)
from cachepass.cut import Blocks, Modules
from cachepass.forecast import Reuse, Taylor
from cachepass.integrations.diffusers import disable_cache, enable_cache
from cachepass.schedule import Every, Final, Threshold, WarmUp

TAYLOR = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)


def compiled(cache: Any = TAYLOR, model: Any = None, **options: Any) -> Any:
    options = {"cache": cache, "lowering": "eager", **options}
    model = transformer() if model is None else model
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)


def run(cache: Any = TAYLOR, model: Any = None, steps: int = 1, **options: Any) -> Any:
    model = compiled(cache, model, **options)
    for call in calls(steps):
        model(*call)
    return model


def with_gradients() -> None:
    with torch.enable_grad():
        run(model=transformer().requires_grad_(True))


def without_a_timestep() -> None:
    class Nameless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformer()

        def forward(self, x, noise_level):
            return self.inner(x, noise_level)

    run(PAB, Nameless().eval().requires_grad_(False))


def enabled_twice() -> None:
    pipe = PIPELINES["DiT"].make()
    enable_cache(pipe, "taylorseer")
    enable_cache(pipe, "pab")


def load(text: str) -> Callable[[Any], object]:
    def read(folder: Any) -> object:
        (folder / "cache.json").write_text(text)
        return run(str(folder / "cache.json"))

    return read


def compared(**given: Any) -> cachepass.Comparison:
    return cachepass.compare(transformer(), lambda model: model(*calls(1)[0]), [], progress=False, **given)


PAB = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)
GROUP = Group("a", Every(3), (Part(Modules("attention"), Reuse()),))
NOTHING = TaylorSeerCacheConfig(cache_identifiers=["nothing"])

# What is done, and what the message must say: of what, where, and what helps.
ERRORS: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    "a method's name": (lambda: run("taylorser"), ('options["cache"]', "did you mean 'taylorseer'")),
    "a method that is none": (lambda: run({"method": "magic"}), ("no method 'magic'", "known: ")),
    "a dict without a method": (lambda: run({"cache_interval": 3}), ('needs the key "method"', "methods: ")),
    "a number as cache": (lambda: run(7), ("cannot be read as a cache config: 7", "give a config object")),
    "options that are a number": (
        lambda: torch.compile(transformer(), backend="cached_inductor", options=7)(*calls(1)[0]),
        ("cannot be read as a cache config: 7", "give a config object"),
    ),
    "an option": (lambda: run(lowerin="eager"), ("unknown option 'lowerin'", "did you mean 'lowering'")),
    "an option of Inductor's": (lambda: run(max_autotun=True), ("max_autotun", "did you mean 'max_autotune'")),
    "a mode": (lambda: run(mode="max-autotun"), ("no mode 'max-autotun'", "did you mean 'max-autotune'")),
    "a lowering": (lambda: run(lowering="fast"), ('options["lowering"]', "known: cond, eager, specialize")),
    "no steps": (lambda: run(num_inference_steps=0), ('options["num_inference_steps"]', "expected an int >= 1")),
    "a timestep's number": (lambda: run(timestep_input=1), ("timestep_input", "expected the name of a model input")),
    "a scale below 0": (lambda: run(timestep_scale=-1), ('["timestep_scale"]', "expected a positive number or None")),
    "invariants": (lambda: run(invariants="no"), ('options["invariants"]', "expected a bool, got 'no'")),
    "a name for a list": (lambda: run(invariant_inputs="text"), ('["invariant_inputs"]', "expected a list of names")),
    "an input that is none": (lambda: run(invariant_inputs=["txt"]), ("no tensor input 'txt'", "inputs: x, timestep")),
    "both at once": (
        lambda: run(invariant_inputs=["x"], varying_inputs=["x"]),
        ("'x' is among the invariant_inputs too", "leave out one of the two"),
    ),
    "no memory": (lambda: run(max_cache_bytes=0), ('options["max_cache_bytes"]', "expected a number of bytes or None")),
    "progress": (lambda: run(progress=1), ('options["progress"]', "expected a bool")),
    "ranks without a group": (lambda: run(process_group="world"), ("not initialised", "init_process_group")),
    "a file that is not there": (lambda: run("nothing.json"), ("nothing.json", "cannot be read")),
    "a file that is no JSON": (load("cache_interval: 3"), ("cache.json", "cannot be read")),
    "a file of a list": (load("[1]"), ("holds no recipe", "json.dumps(config.to_dict())")),
    "a file of another schema": (load('{"schema": 99, "method": "pab"}'), ("schema 99 is not", "save it anew")),
    "a field": (lambda: TaylorSeerCacheConfig(interval=3), ("unknown field 'interval'", "cache_interval")),
    "a field in a dict": (lambda: run({"method": "taylorseer", "max_ordre": 1}), ("max_ordre", "mean 'max_order'")),
    "an interval of 0": (lambda: TaylorSeerCacheConfig(cache_interval=0), ("cache_interval", "allowed: >= 1")),
    "half an interval": (lambda: TaylorSeerCacheConfig(cache_interval=2.5), ("cache_interval", "expected an int")),
    "an order of 9": (lambda: TaylorSeerCacheConfig(max_order=9), ("max_order", "allowed: 0 to 4")),
    "no step left": (
        lambda: TaylorSeerCacheConfig(disable_cache_after_step=2),
        ("disable_cache_after_step", "predicted steps lie in"),
    ),
    "an integer history": (
        lambda: TaylorSeerCacheConfig(taylor_factors_dtype=torch.int8),
        ("taylor_factors_dtype", "torch.float32 or torch.bfloat16"),
    ),
    "one identifier": (lambda: TaylorSeerCacheConfig(cache_identifiers="attn"), ("cache_identifiers", "list of regex")),
    "no regex": (lambda: TaylorSeerCacheConfig(cache_identifiers=["a("]), ("cache_identifiers", "is not a regex")),
    "a range of 0": (
        lambda: PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=0),
        ("spatial_attention_block_skip_range", "allowed: >= 1"),
    ),
    "a reversed range": (
        lambda: PyramidAttentionBroadcastConfig(cross_attention_timestep_skip_range=(800, 100)),
        ("cross_attention_timestep_skip_range", "empty or reversed"),
    ),
    "an alpha of 0": (lambda: FasterCacheConfig(alpha_low_frequency=0), ("alpha_low_frequency", "positive number")),
    "a layout": (lambda: FasterCacheConfig(tensor_format="CHW"), ("tensor_format", "known: BCFHW")),
    "a grid of planes": (lambda: FasterCacheConfig(latent_grid=(4, 4)), ("latent_grid", 'tensor_format="BSC"')),
    "tokens without a grid": (
        lambda: run("fastercache"),
        ("tensor_format", 'tensor_format="BSC", latent_grid=(height, width)', "of its 4 tokens, such as (2, 2)"),
    ),
    "a threshold below 0": (lambda: FirstBlockCacheConfig(threshold=-1), ("threshold", "allowed: ")),
    "no ratios": (MagCacheConfig, ("mag_ratios", "calibrate=True")),
    "steps for TeaCache": (lambda: run("teacache"), ("TeaCacheConfig", 'options={"num_inference_steps": 28}')),
    "steps for SeaCache": (lambda: run("sea_cache"), ("SeaCacheConfig", 'options={"num_inference_steps": 28}')),
    "more blocks than there are": (lambda: run("dbcache"), ("Fn_compute_blocks", "DBCacheConfig(Fn_compute_blocks=1")),
    "calls that are counted": (
        lambda: DBCacheConfig(enable_separate_cfg=True),
        ("enable_separate_cfg", "cachepass.cache_context('cond')"),
    ),
    "and": (lambda: Every(3) and WarmUp(2), ("a schedule has no truth value", "Every(3) & WarmUp(2)")),
    "not": (lambda: not Every(3), ("a schedule has no truth value", "~ instead of")),
    "an interval of a schedule": (lambda: Every(0), ("Every.", "allowed: >= 1")),
    "two thresholds": (lambda: Threshold(0.1) & Threshold(0.2), ("more than one distance threshold", "leave one")),
    "a negated threshold": (lambda: ~Threshold(0.1), ("cannot be negated", "negate the parts without one")),
    "steps for Final": (
        lambda: run(CacheConfig(cut=Modules("attention"), schedule=Every(2) & Final(2), forecast=Reuse())),
        ("CacheConfig", 'options={"num_inference_steps": 28}'),
    ),
    "a recipe of nothing": (lambda: Recipe(5), ("Recipe.groups", "Recipe((Group(...),))")),  # pyright: ignore
    "a group without parts": (lambda: Group("a", Every(3), ()), ("parts", "(Part(cut, forecast),)")),
    "two depths": (
        lambda: Group("a", Every(3), (Part(Modules("mlp"), Reuse()), Part(Modules("attention"), Taylor(2)))),
        ("'a'", "give each of them a group of its own"),
    ),
    "blocks beside modules": (
        lambda: Group("a", Every(3), (Part(Modules("mlp"), Reuse()), Part(Blocks(), Reuse()))),
        ("cut as one value", "a group of its own"),
    ),
    "identifiers of nothing": (lambda: run(NOTHING), ("'nothing' matches no module", "candidates: blocks.0.attn")),
    "a part of a path": (
        lambda: run(TaylorSeerCacheConfig(cache_identifiers=["attn"])),
        ("'attn' matches no module", "matches the whole path: '.*attn'"),
    ),
    "a kind that the model lacks": (
        lambda: run({"method": "pab", "temporal_attention_block_skip_range": 2}),
        ("temporal_attention_block_identifiers", "candidates: "),
    ),
    "training": (lambda: run(model=transformer().train()), ("call model.eval()",)),
    "gradients": (with_gradients, ("no_grad",)),
    "a timestep that is not found": (without_a_timestep, ("timestep_input", "inputs: x, noise_level")),
    "a timestep of another name": (lambda: run(PAB, timestep_input="sigma"), ("no tensor input 'sigma'", "inputs: x")),
    "a summary before the first call": (lambda: cachepass.summary(compiled()), ("summary", "at least once")),
    "a function with a callback, saved": (
        lambda: FasterCacheConfig(attention_weight_callback=lambda _: 0.5).to_dict(),
        ("attention_weight_callback", "use it in the process that made it"),
    ),
    "a pipeline, explained": (
        lambda: cachepass.explain(PIPELINES["DiT"].make(), cache="taylorseer"),
        ("a pipeline is no model", "explain(pipe.transformer, cache=..."),
    ),
    "no rounds": (lambda: compared(rounds=0), ("0 rounds", "one round at least")),
    "a comparison of nothing": (lambda: compared().fastest(psnr=30), ("no config is as good",)),
    "a cache of no pipeline": (lambda: enable_cache(5, "pab"), ("neither a pipeline nor a model", "DiffusionPipeline")),
    "a cache twice": (enabled_twice, ("a cache is on already", "call disable_cache first")),
    "no cache to disable": (lambda: disable_cache(PIPELINES["DiT"].make()), ("not on", "enable_cache comes first")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ERRORS)
def test_errors(mistake, tmp_path):
    make, says = ERRORS[mistake]
    given = (tmp_path,) if make.__name__ == "read" else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CachepassWarning)
        with pytest.raises(CachepassError) as caught:
            make(*given)
    error = caught.value
    for words in says:
        assert words in str(error), str(error)
    assert error.where, f"it does not say where: {error}"
    helps = error.hint or re.search(r"expected|call |give |cannot be read", error.what)
    assert helps, f"it does not say what to do: {error}"


def falling(cache: Any, times: list[float], **options: Any) -> None:
    model, (x, _) = compiled(cache, **options), calls(1)[0]
    for time in times:
        model(x * (1 + time / 2000), torch.full((2,), time))


TEN = [1000.0 - 100 * step for step in range(10)]
WARNINGS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "no cache": (
        lambda: torch.compile(transformer(), backend="cached_inductor", options={"max_autotune": False})(*calls(1)[0]),
        ("without options={'cache': ...}", "Methods: "),
    ),
    "an interval of 1": (lambda: run(TaylorSeerCacheConfig(cache_interval=1)), ("never fires", "cache_interval=1")),
    "a warm-up as long as the run": (
        lambda: run(TaylorSeerCacheConfig(disable_cache_before_step=10), num_inference_steps=10),
        ("never fires", "num_inference_steps=10 and disable_cache_before_step=10"),
    ),
    "no range": (lambda: run("pab"), ("no skip range is given", "spatial_attention_block_skip_range=2")),
    "ranges that nothing meets": (
        lambda: falling(PAB, [5.0 - 0.5 * step for step in range(10)], num_inference_steps=10),
        ("never fired in a run of 10 steps", "timesteps seen: 0.5 to 5", 'options["timestep_scale"]'),
    ),
    "a threshold that nothing reaches": (
        lambda: falling(FirstBlockCacheConfig(threshold=12.0), TEN, num_inference_steps=10),
        ("all of 10 steps but the first were predicted", "distances: ", "Choose it among these"),
    ),
    "a threshold below everything": (
        lambda: falling(FirstBlockCacheConfig(threshold=1e-6), TEN, num_inference_steps=10),
        ("never fired in a run of 10 steps",),
    ),
    "fewer steps said than made": (
        lambda: falling(TAYLOR, TEN, num_inference_steps=5),
        ("the timestep goes on from 600 to 500 after 5 steps", "is less than a run has"),
    ),
    "both calls of a step counted": (
        lambda: falling(TAYLOR, TEN + TEN, num_inference_steps=20),
        ("a run ended after 10 steps", "if a step has two calls, count one of them"),
    ),
    "a kind that the model lacks, beside one": (
        lambda: run({"method": "pab", "spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 2}),
        ("cross_attention_block_skip_range has no effect", "match no cross module"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WARNINGS)
def test_warnings(mistake):
    make, says = WARNINGS[mistake]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CachepassWarning)
        make()
    said = [each for each in caught if issubclass(each.category, CachepassWarning)]
    text = "\n".join(str(each.message) for each in said)
    for words in says:
        assert words in text, text
    assert {each.filename for each in said} == {__file__}, "it points at the user's line"


def test_options_that_are_a_config_alone():
    model = torch.compile(transformer(), backend="cached_inductor", options=TAYLOR)
    model(*calls(1)[0])
    assert cachepass.summary(model).config == TAYLOR.label


def test_there_are_as_many_as_promised():
    assert len(ERRORS) + len(WARNINGS) >= 60


def test_a_saved_config_says_its_method(tmp_path):
    TAYLOR.save(tmp_path / "cache.json")
    assert json.loads((tmp_path / "cache.json").read_text())["method"] == "taylorseer"
