"""The ways in which people call a model: entry points, sizes, dtypes, adapters, runs, timesteps (eager lowering).

What is expected is computed by hand (:class:`ByHand`) on an uncompiled copy.
"""

from __future__ import annotations

import functools

import pytest
import torch
from small_models import Attention, FeedForward, calls
from torch import nn
from zoo import relative_error

import cachepass
from cachepass import cache_context
from cachepass.testing import CompileCounts, count_compiles

TAYLOR = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": None,
          "cache_identifiers": ["attention", "mlp"]}  # fmt: skip
PAB = {"method": "pab", "spatial_attention_block_skip_range": 2}


def settings(cache=TAYLOR, *, dynamic=None, **options):
    """Arguments of torch.compile."""
    return {
        "backend": "cached_inductor",
        "dynamic": dynamic,
        "options": {"lowering": "eager", "cache": cache, **options},
    }


def whole(model, cache=TAYLOR, **options):
    return torch.compile(model, fullgraph=True, **settings(cache, **options))


def in_place(model, cache=TAYLOR, **options):
    model.compile(fullgraph=True, **settings(cache, **options))
    return model


def regional(model, cache=TAYLOR, **options):
    for block in dict.fromkeys(model.blocks):
        block.compile(fullgraph=True, **settings(cache, **options))
    return model


CACHES = pytest.mark.parametrize("cache", [TAYLOR, PAB], ids=["taylorseer", "pab"])
WAYS = pytest.mark.parametrize("way", [whole, regional])


def fired(cache=TAYLOR, runs=1):
    """What a summary says of runs of ``calls(9)``: steps 2, 4, 5, 7, 8; with PAB 3, 5, 7 (from 830 on it may not)."""
    return {"taylorseer": 5 * runs} if cache["method"] == "taylorseer" else {"spatial": 3 * runs}


# ---- models ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Gets an embedding of the timestep, as blocks do in diffusers."""

    attention = Attention

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), nn.Linear(width, width)
        self.attn, self.ff = self.attention(width), FeedForward(width)

    def forward(self, x, temb):
        x = x + self.attn(self.norm(x)) * self.scale(temb)[:, None]
        return x + self.ff(x)


class Net(nn.Module):
    """``blocks`` in an ``order``, then ``proj_out``; subclasses do something in between."""

    block = Block
    order = (0, 1)

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time, self.proj_out = nn.Linear(1, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList([self.block(width) for _ in range(2)])

    def forward(self, x, timestep):
        temb = nn.functional.silu(self.time(self.scaled(timestep).to(x.dtype)))
        for index in self.order:
            x = self.blocks[index](self.between(x), temb)
        return self.proj_out(self.after(x))

    def scaled(self, timestep):
        return timestep[:, None] / 1000

    def between(self, x):
        return x

    def after(self, x):
        return x


def net(kind=Net, seed=0, **kwargs):
    torch.manual_seed(seed)
    return kind(**kwargs).eval().requires_grad_(False)


class ByHand(nn.Module):
    """A model whose attentions and feed-forwards remember their outputs: the caching, uncompiled, in a few lines."""

    def __init__(self, model, cache=TAYLOR):
        super().__init__()
        self.model, self.taylor = model, cache["method"] == "taylorseer"
        self.restart()
        names = {"attention": "attn", "mlp": "ff"}
        chosen = [names[kind] for kind in cache.get("cache_identifiers", ["attention"])]
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in chosen:
                module.forward = functools.partial(self._remembered, module, module.forward)

    def restart(self):
        self.step, self.kept = 0, {}

    def forward(self, x, timestep):
        highest = float(torch.as_tensor(timestep).max())
        self.predicts = self.step > 1 and self.step % 3 > 0 if self.taylor else self.step % 2 and 100 < highest < 800
        self.called = {}
        result = self.model(x, timestep)
        self.step += 1
        return result

    def _remembered(self, module, forward, x):
        self.called[module] = nth = self.called.get(module, 0) + 1
        kept = self.kept.setdefault((module, nth), [])
        if not self.predicts:
            kept[:] = [(self.step, forward(x)), *kept[: self.taylor]]
            return kept[0][1]
        (newest, value), (older, before) = kept[0], kept[-1]
        slope = (value.float() - before.float()) / max(newest - older, 1)
        return (value.float() + slope * (self.step - newest)).to(value.dtype)


def check(model, expected, run=None, tolerance=1e-5):
    """A whole run equals that of the expected model, step by step."""
    expected.restart()
    for step, (x, t) in enumerate(calls(9) if run is None else run):
        error = relative_error(model(x, t), expected(x, t))
        assert error < tolerance, f"step {step}: {error:.1e}"


def check_two_runs(way, original, expected, cache, run=None, tolerance=1e-5):
    """Two runs are the expected ones, through one graph, and the cache fires as its schedule says."""
    with count_compiles() as counts:
        model = way(original, cache)
        for _ in range(2):
            check(model, expected, run, tolerance)
    assert counts == CompileCounts(graphs=1)
    summary = cachepass.summary(original)
    assert summary.predicted == fired(cache, 2)
    assert (summary.runs, summary.steps) == (2, 18)
    return model


@CACHES
def test_the_expectation_is_not_the_plain_model(cache):
    """Steps that are predicted differ by more than any tolerance here, so no test passes without its cache."""
    expected, plain = ByHand(net(), cache), net()
    errors = [relative_error(plain(x, t), expected(x, t)) for x, t in calls(9)]
    assert sum(error > 1e-3 for error in errors) == sum(fired(cache).values())
    assert sum(error == 0 for error in errors) == 9 - sum(fired(cache).values())


# ---- entry points ---------------------------------------------------------------------------------------------------


def _forward(model, cache):
    return whole(model.forward, cache)


def _function(model, cache):
    def step(latents, timestep):
        return model(latents, timestep)

    return whole(step, cache)


@CACHES
@pytest.mark.parametrize("way", [in_place, whole, _forward, _function, regional])
@pytest.mark.covering
def test_entry_points(way, cache):
    """Whatever is given to torch.compile."""
    check_two_runs(way, net(), ByHand(net(), cache), cache)


class Sampler(nn.Module):
    """A module whose forward is the whole loop."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latents, timesteps):
        seen = []
        for t in timesteps:
            latents = latents - 0.1 * self.model(latents, t.expand(len(latents)))
            seen.append(latents)
        return seen


@CACHES
@pytest.mark.parametrize("way", [in_place, whole, regional])
def test_a_sampler_that_is_a_module(way, cache):
    """Its ``timesteps`` are all of the run's; the model's own timestep counts."""
    original, expected = net(), ByHand(net(), cache)
    sampler, by_hand = Sampler(way(original, cache)), Sampler(expected)
    noise, timesteps = calls(1)[0][0], torch.arange(900.0, 300.0, -70)
    with count_compiles() as counts:
        for _ in range(2):
            expected.restart()
            for a, b in zip(sampler(noise, timesteps), by_hand(noise, timesteps), strict=True):
                assert relative_error(a, b) < 1e-5
    assert counts == CompileCounts(graphs=1)
    assert cachepass.summary(original).predicted == fired(cache, 2)


class Denoiser(nn.Module):
    """k-diffusion's way to call a model: with a noise level, of which the wrapper makes the timestep."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, sigma):
        scale = (1 + sigma**2).rsqrt()[:, None, None]
        return x - sigma[:, None, None] * self.model(x * scale, timestep=1000 * sigma)


def _wrapper(denoiser, cache):
    return whole(denoiser.eval(), cache, timestep_scale=1000)


@CACHES
@pytest.mark.parametrize("way", [in_place, whole, regional, _wrapper])
@pytest.mark.covering
def test_a_wrapper_that_takes_sigma(way, cache):
    """The model inside is compiled, or the wrapper as a whole."""
    original, expected = net(), ByHand(net(), cache)
    model = _wrapper(Denoiser(original), cache) if way is _wrapper else Denoiser(way(original, cache))
    by_hand = Denoiser(expected)
    with count_compiles() as counts:
        for _ in range(2):
            expected.restart()
            for x, t in calls(9):
                assert relative_error(model(x, t / 1000), by_hand(x, t / 1000)) < 1e-5
    assert counts == CompileCounts(graphs=1)
    assert cachepass.summary(model if way is _wrapper else original).predicted == fired(cache, 2)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def wider(run):
    """The same run at twice the resolution."""
    return [(torch.cat([x, -0.5 * x], 1), t) for x, t in run]


SIZES = [lambda: calls(9), lambda: wider(calls(9)), lambda: calls(9, batch=3)]


def plain_counts(way, dynamic, runs):
    """What Dynamo compiles of the same model without a cache."""
    original = net()
    with count_compiles() as counts:
        for part in original.blocks if way is regional else [original]:
            part.compile(backend="eager", dynamic=dynamic)
        for run in runs:
            for call in run:
                original(*call)
    return counts


DYNAMIC = pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])


@WAYS
@DYNAMIC
@pytest.mark.covering
def test_sizes_one_after_the_other(dynamic, way):
    """Another resolution, another batch size, and back; not one capture more than the model needs without a cache."""
    original, expected = net(), ByHand(net())
    runs = [SIZES[which]() for which in (0, 1, 2, 0)]
    with count_compiles() as counts:
        model = way(original, dynamic=dynamic)
        for run in runs:
            check(model, expected, run)
    assert cachepass.summary(original).predicted == fired(runs=4)
    assert counts == plain_counts(way, dynamic, runs)
    assert counts.graphs == {False: 3, True: 1}.get(dynamic, counts.graphs)


@CACHES
@WAYS
@DYNAMIC
@pytest.mark.covering
def test_sizes_interleaved(dynamic, way, cache):
    """Images of different sizes at once in the default context: each has its own clock and history."""
    original = net()
    model = way(original, cache, dynamic=dynamic)
    expected = [ByHand(net(), cache) for _ in SIZES]
    for run in range(2):
        for by_hand in expected:
            by_hand.restart()
        for step, inputs in enumerate(zip(*(size() for size in SIZES), strict=True)):
            for size, (call, by_hand) in enumerate(zip(inputs, expected, strict=True)):
                error = relative_error(model(*call), by_hand(*call))
                assert error < 1e-5, f"run {run}, step {step}, size {size}: {error:.1e}"
    summary = cachepass.summary(original)
    assert summary.predicted == fired(cache, 6)
    assert summary.runs == 6


@WAYS
@DYNAMIC
@pytest.mark.covering
def test_contexts_of_different_sizes(dynamic, way):
    """Conditional calls with two samples, unconditional ones with three."""
    original = net()
    model = way(original, dynamic=dynamic)
    expected = {"cond": ByHand(net()), "uncond": ByHand(net())}
    for run in range(2):
        for by_hand in expected.values():
            by_hand.restart()
        for step, both in enumerate(zip(calls(9), calls(9, batch=3), strict=True)):
            for (name, by_hand), call in zip(expected.items(), both, strict=True):
                with cache_context(name):
                    error = relative_error(model(*call), by_hand(*call))
                assert error < 1e-5, f"run {run}, step {step}, {name}: {error:.1e}"
    assert cachepass.summary(original).predicted == fired(runs=4)


# ---- dtypes, modes, layouts -----------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_parameters_in_half_precision(dtype, tolerance, way):
    """bf16 rounds at 2**-8, fp16 at 2**-11."""
    run = [(x.to(dtype), t) for x, t in calls(9)]
    model = check_two_runs(way, net().to(dtype), ByHand(net().to(dtype)), TAYLOR, run, tolerance)
    assert model(*run[0]).dtype == dtype


@CACHES
@WAYS
def test_autocast(way, cache):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_two_runs(way, net(), ByHand(net(), cache), cache, tolerance=2e-2)


@CACHES
@WAYS
@pytest.mark.parametrize("switch", [0, 1, 5])
@pytest.mark.covering(strength=2)
def test_inference_mode(switch, way, cache):
    """The mode, or inputs that were made in it, may begin in the middle of a run: it stays one run."""
    original, expected = net(), ByHand(net(), cache)
    model, outside = way(original, cache), calls(9)
    results = [model(x, t) for x, t in outside[:switch]]
    with torch.inference_mode():
        results.append(model(*outside[switch]))
        results += [model(x.clone(), t.clone()) for x, t in outside[switch + 1 :]]
    for step, (result, call) in enumerate(zip(results, outside, strict=True)):
        error = relative_error(result, expected(*call))
        assert error < 1e-5, f"step {step}: {error:.1e}"
    summary = cachepass.summary(original)
    assert summary.predicted == fired(cache)
    assert summary.cache_bytes == summary.planned_bytes


@WAYS
def test_no_grad_around_parameters_that_require_gradients(way):
    original, expected = net().requires_grad_(True), ByHand(net())
    with torch.enable_grad():
        check_two_runs(lambda *given: torch.no_grad()(way(*given)), original, expected, TAYLOR)


class Images(Net):
    """Images in and out: patches of 2 x 2."""

    def __init__(self):
        super().__init__()
        self.patch, self.unpatch = nn.Conv2d(4, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x, timestep):
        patches = self.patch(x)
        tokens = super().forward(patches.flatten(2).transpose(1, 2), timestep)
        return self.unpatch(tokens.transpose(1, 2).unflatten(2, patches.shape[2:]))


@WAYS
def test_channels_last(way):
    """The results have the strides that they have without a compiler."""
    layout = {"memory_format": torch.channels_last}
    original, plain = net(Images).to(**layout), net(Images).to(**layout)
    run = [(x.unflatten(2, (8, 8)).to(**layout), t) for x, t in calls(9, width=64)]
    model = check_two_runs(way, original, ByHand(net(Images)), TAYLOR, run)
    for call in run:
        assert model(*call).stride() == plain(*call).stride()


# ---- adapters, quantised and offloaded parameters -------------------------------------------------------------------


def with_lora(model):
    """Adapters on every linear of the blocks, whose updates are not 0."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q", "kv", "out", "up", "down"])
    model = peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    return model.requires_grad_(False)


def scale_adapters(model, scale):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)


@CACHES
@WAYS
@pytest.mark.covering
def test_lora(way, cache):
    model = check_two_runs(way, with_lora(net()), ByHand(with_lora(net()), cache), cache)
    call = calls(1)[0]
    assert relative_error(model(*call), net()(*call)) > 1e-2


@CACHES
@WAYS
@pytest.mark.covering
def test_lora_whose_scale_changes_between_runs(way, cache):
    original, expected = with_lora(net()), ByHand(with_lora(net()), cache)
    model = way(original, cache)
    for scale in (1.0, 0.5, 0.25, 1.0):
        scale_adapters(original, scale)
        scale_adapters(expected, scale)
        check(model, expected)
    assert cachepass.summary(original).predicted == fired(cache, 4)


@pytest.mark.parametrize("way", [whole, in_place])
def test_a_peft_model(way):
    """peft's own wrapper, whose forward takes ``*args`` and ``**kwargs``."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q", "kv", "out", "up", "down"], init_lora_weights=False)

    def adapted():
        torch.manual_seed(1)
        return peft.get_peft_model(net(), config).eval().requires_grad_(False)

    def by_name(original, cache):
        model = way(original, cache)
        return lambda x, t: model(x, timestep=t)

    check_two_runs(by_name, adapted(), ByHand(adapted()), TAYLOR)


@CACHES
@WAYS
def test_int8_weights_of_torchao(way, cache):
    quantization = pytest.importorskip("torchao.quantization")

    def quantised():
        model = net(width=16)
        quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
        return model

    check_two_runs(way, quantised(), ByHand(quantised(), cache), cache, calls(9, width=16))


# ---- runs -----------------------------------------------------------------------------------------------------------


def at(timesteps):
    """A run at these timesteps."""
    steps = calls(len(timesteps))
    return [(x, torch.full_like(t, value)) for (x, t), value in zip(steps, timesteps, strict=True)]


@CACHES
@WAYS
def test_stopping_in_the_middle(way, cache):
    original, expected = net(), ByHand(net(), cache)
    model = way(original, cache)
    for stop in (1, 4, 5):
        check(model, expected, calls(stop))
        cachepass.reset(original)
        check(model, expected)
        cachepass.reset(original)
    assert cachepass.summary(original).runs == 6


@CACHES
@WAYS
def test_runs_of_different_lengths_and_beginnings(way, cache):
    """9 steps, 14, an image-to-image run that begins late, and 9 again."""
    runs = [calls(9), at(range(900, 60, -60)), at(range(560, 80, -60)), calls(9)]
    original, expected = net(), ByHand(net(), cache)
    with count_compiles() as counts:
        model = way(original, cache)
        for run in runs:
            check(model, expected, run)
    assert counts == CompileCounts(graphs=1)
    summary = cachepass.summary(original)
    assert (summary.runs, summary.steps) == (4, 40)


@pytest.mark.parametrize("shared", [True, False])
def test_three_configs_interleaved(shared):
    """Three compiled models, of one module or of three."""
    caches = [TAYLOR, PAB, {**TAYLOR, "cache_identifiers": ["mlp"]}]
    originals = [net()] * 3 if shared else [net(), net(), net()]
    models = [whole(original, cache) for original, cache in zip(originals, caches, strict=True)]
    expected = [ByHand(net(), cache) for cache in caches]
    for _ in range(2):
        for by_hand in expected:
            by_hand.restart()
        for x, t in calls(9):
            for model, by_hand in zip(models, expected, strict=True):
                assert relative_error(model(x, t), by_hand(x, t)) < 1e-5
    if not shared:
        for model, cache in zip(models, caches, strict=True):
            assert cachepass.summary(model).predicted == fired(cache, 2)


@CACHES
@WAYS
def test_a_compiler_that_is_reset_in_the_middle(way, cache):
    """What was captured is gone, and the history with it: the next step is the first of a run."""
    original, expected = net(), ByHand(net(), cache)
    model = way(original, cache)
    check(model, expected, calls(5))
    torch._dynamo.reset()
    check(model, expected, calls(9)[5:])
    check(model, expected)
    summary = cachepass.summary(original)
    assert (summary.runs, summary.steps) == (2, 13)


# ---- timesteps ------------------------------------------------------------------------------------------------------


class Numbers(nn.Module):
    """Takes the timestep as a Python number."""

    def __init__(self):
        super().__init__()
        self.model = Net()

    @property
    def blocks(self):
        return self.model.blocks

    def forward(self, x, timestep: float):
        return self.model(x, torch.full((x.shape[0],), timestep))


@CACHES
@WAYS
@pytest.mark.parametrize("number", [int, float])
@pytest.mark.covering
def test_timesteps_that_are_python_numbers(number, way, cache):
    """One capture for all of them."""
    run = [(x, number(t[0])) for x, t in calls(9)]
    check_two_runs(way, net(Numbers), ByHand(net(Numbers), cache), cache, run)


class PerToken(Net):
    def scaled(self, timestep):
        return timestep.mean(1, keepdim=True) / 1000


@pytest.mark.parametrize("number", [int, float])
def test_explain_of_a_python_number(number):
    """The timestep is found, as it is when the model runs: no warning, and the range of the method holds."""

    class Number(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x, timestep):
            return self.inner(x, torch.full((x.shape[0],), timestep, dtype=torch.float32))

    explanation = cachepass.explain(Number().eval(), calls(1)[0][0], number(500), cache=PAB)
    assert explanation.phases == ("compute", "predict")


@CACHES
@WAYS
def test_a_timestep_for_each_token(way, cache):
    """Tokens that are clean have 0: the highest one is the step's."""
    run = [(x, t[:, None].repeat(1, 4)) for x, t in calls(9)]
    for _, t in run:
        t[:, 0] = t[1] = 0
    check_two_runs(way, net(PerToken), ByHand(net(PerToken), cache), cache, run)


# ---- contexts of a server -------------------------------------------------------------------------------------------


def test_the_runs_of_a_context_are_ended_by_its_name():
    """From outside of it, and no others."""
    model = whole(net(), TAYLOR)
    for step, call in enumerate(calls(5)):
        for name in ("a", "ab") if step < 4 else ("b",):
            with cachepass.cache_context(name), cachepass.cache_context("cond"):
                model(*call)
    cachepass.reset(model, context="a")
    marks = cachepass.summary(model).last_runs
    for name in ("a/cond", "ab/cond"):
        with cachepass.cache_context(name):
            model(*calls(5)[4])
    found = cachepass.summary(model)
    assert found.last_runs["a/cond"] == dict.fromkeys(marks["a/cond"], "#")
    assert all(len(line) == 5 for line in found.last_runs["ab/cond"].values())


def test_contexts_whose_runs_are_over_are_freed_but_for_two():
    model = whole(net(), TAYLOR, num_inference_steps=9)
    held = []
    for request in range(6):
        with cachepass.cache_context(f"request-{request}"):
            for call in calls(9):
                model(*call)
        held.append(cachepass.memory(model).held)
    assert held == [held[0], 2 * held[0], *[3 * held[0]] * 4]
    assert list(cachepass.memory(model).contexts) == ["request-3", "request-4", "request-5"]
