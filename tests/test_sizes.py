"""Sizes that change from run to run: prompts and images of other sizes through one graph (eager lowering).

Expected is what the same model gives, compiled for each size by itself (``dynamic=False``).
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from pipelines import PIPELINES
from reference import FasterCache
from small_models import Attention, FeedForward
from test_calling import settings
from test_fastercache import SMALL, Guided, guided_calls, small
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from zoo import ALL, build, first_tensor, is_one_graph, relative_error, sweep_over, timestep_scale, trajectory

import cachepass
from cachepass.integrations.diffusers import enable_cache
from cachepass.program.sizes import SymbolBinder
from cachepass.testing import count_compiles

STEPS, TOLERANCE = 6, 1e-5
SCHEDULE = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
CACHES = {
    "attentions": {"method": "taylorseer", **SCHEDULE},
    "blocks": {"method": "taylorseer", **SCHEDULE, "cache_identifiers": ["block"]},
    "pab": {"method": "pab", "spatial_attention_block_skip_range": 2},
    "first_block": cachepass.FirstBlockCacheConfig(threshold=0.4),
}

# ---- models of diffusers --------------------------------------------------------------------------------------------

# The inputs that carry the prompt, and in which dimension its tokens are.
PROMPTS = {
    "FluxTransformer2DModel": {"encoder_hidden_states": 1, "txt_ids": 0},
    "Flux2Transformer2DModel": {"encoder_hidden_states": 1, "txt_ids": 1},
    "SD3Transformer2DModel": {"encoder_hidden_states": 1},
    "SD3Transformer2DModel:SD35": {"encoder_hidden_states": 1},
    "QwenImageTransformer2DModel": {"encoder_hidden_states": 1, "encoder_hidden_states_mask": 1},
    "CogVideoXTransformer3DModel:CogVideoX15": {"encoder_hidden_states": 1},
    "HunyuanVideoTransformer3DModel": {"encoder_hidden_states": 1, "encoder_attention_mask": 1},
    "HunyuanVideoTransformer3DModel:HunyuanVideoI2V": {"encoder_hidden_states": 1, "encoder_attention_mask": 1},
    "HunyuanVideoTransformer3DModel:HunyuanVideoTokenReplace": {"encoder_hidden_states": 1,
                                                                "encoder_attention_mask": 1},
    "HunyuanVideo15Transformer3DModel": {"encoder_hidden_states": 1, "encoder_attention_mask": 1},
    "HiDreamImageTransformer2DModel": {"encoder_hidden_states_t5": 1, "encoder_hidden_states_llama3": 2},
    "Lumina2Transformer2DModel": {"encoder_hidden_states": 1, "encoder_attention_mask": 1},
    "MochiTransformer3DModel": {"encoder_hidden_states": 1, "encoder_attention_mask": 1},
    "ZImageTransformer2DModel": {"cap_feats": 0},
}  # fmt: skip


def resized(value, dim, size):
    """A prompt of another length."""
    if isinstance(value, list):
        return [resized(v, dim, size) for v in value]
    times = [1] * value.ndim
    times[dim] = -(-size // value.shape[dim])
    return value.repeat(times).narrow(dim, 0, size).clone()


def run_of(name, length):
    """The calls of a run with a prompt of this length."""
    calls = [call for _, call in trajectory(name, STEPS)]
    prompt = {key: resized(calls[0][key], dim, length) for key, dim in PROMPTS[name].items()}
    return [call | prompt for call in calls]


def compiled(name, cache, dynamic=None):
    options = {"cache": cache, "lowering": "eager", "timestep_scale": timestep_scale(name)}
    return torch.compile(
        build(name), backend="cached_inductor", fullgraph=is_one_graph(name), dynamic=dynamic, options=options
    )


def plain_graphs(name, lengths):
    """How often Dynamo captures a model without a cache: Qwen-Image's for each length."""
    model = torch.compile(build(name), backend="eager", fullgraph=is_one_graph(name))
    with count_compiles() as counts:
        for length in lengths:
            model(**run_of(name, length)[0])
    return counts.graphs


def counts_of(model):
    summary = cachepass.summary(model)
    return sum(summary.predicted.values()), summary.runs, summary.steps


MANY = ("FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel")


@pytest.mark.parametrize(("name", "cache"), sweep_over([
    *((name, "blocks") for name in PROMPTS if is_one_graph(name)),
    *((name, "attentions") for name in PROMPTS if not is_one_graph(name)),
    *((name, cache) for name in MANY for cache in CACHES if cache != "blocks"),
], few=[
    ("FluxTransformer2DModel", "pab"), ("QwenImageTransformer2DModel", "first_block"),
]))  # fmt: skip
def test_prompts_of_other_lengths(name, cache):
    """The second length makes the sizes symbolic; no more graphs are captured than without a cache."""
    lengths = (9, 17, 13)
    graphs = plain_graphs(name, lengths)
    model = compiled(name, CACHES[cache])
    with count_compiles() as counts:
        for length in lengths:
            results = [first_tensor(model(**call)) for call in run_of(name, length)]
    assert counts.graphs == graphs
    expected = compiled(name, CACHES[cache], dynamic=False)
    for step, (call, result) in enumerate(zip(run_of(name, 13), results, strict=True)):
        error = relative_error(result, first_tensor(expected(**call)))
        assert error < TOLERANCE, f"step {step}: {error:.1e}"
    fired, runs, steps = counts_of(expected)
    assert fired > 0 and counts_of(model) == (3 * fired, 3 * runs, 3 * steps)


SIGNS = ("", "negative_")


@pytest.mark.parametrize("name", sweep_over(["QwenImage", "SD3", "Flux"], few=["QwenImage"]))
def test_pipelines_with_prompts_of_other_lengths(name):
    """Each request has another; Qwen-Image's negative prompt has a length of its own."""
    case = PIPELINES[name]

    def results(dynamic):
        pipe = case.make()
        enable_cache(pipe, CACHES["blocks"], dynamic=dynamic, lowering="eager")
        given = case.inputs()
        found = []
        for lengths in ((6, 4), (5, 3), (3, 6)):
            both = lengths if name == "QwenImage" else lengths[:1] * 2
            cut = {
                f"{sign}{key}": given[f"{sign}{key}"][:, :length]
                for sign, length in zip(SIGNS, both, strict=True)
                for key in ("prompt_embeds", "prompt_embeds_mask")
                if f"{sign}{key}" in given
            }
            found.append(case.run(pipe, STEPS, **cut))
        return found, counts_of(pipe.transformer)

    automatic, static = results(None), results(False)
    assert automatic[1] == static[1] and static[1][0] > 0
    for a, b in zip(automatic[0], static[0], strict=True):
        assert relative_error(a, b) < TOLERANCE


# ---- sizes that inputs carry in expressions --------------------------------------------------------------------------


class JointBlock(nn.Module):
    """Two streams with one attention."""

    def __init__(self, width):
        super().__init__()
        self.attn, self.ff, self.ff_context = Attention(width), FeedForward(width), FeedForward(width)

    def forward(self, x, prompt):
        both = self.attn(torch.cat([prompt, x], 1))
        prompt, x = prompt + both[:, : prompt.shape[1]], x + both[:, prompt.shape[1] :]
        return prompt + self.ff_context(prompt), x + self.ff(x)


class Joint(nn.Module):
    """Nothing reads the last block's prompt: what is cut of it is dead."""

    def __init__(self, width=8):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([JointBlock(width) for _ in range(2)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, hidden_states, prompt, timestep):
        x = hidden_states * torch.cos(timestep / 1000)[:, None, None]
        for block in self.transformer_blocks:
            prompt, x = block(x, prompt)
        return self.proj_out(x)


class TwoPrompts(Joint):
    """The prompt is a sum of two, of which the second is as long as a mask says twice."""

    def forward(self, hidden_states, prompt, timestep, other=None, mask=None):
        if other is None:
            other, mask = prompt[:, :2], prompt.new_ones(1, 4)
        mask = mask.view(1, other.shape[1], 2).sum(-1, keepdim=True)
        return super().forward(hidden_states, torch.cat([prompt, other * mask], 1), timestep)


class Pairs(Joint):
    """Tokens that are merged two by two: half as many as the input has."""

    def forward(self, hidden_states, prompt, timestep):
        merged = prompt.unflatten(1, (-1, 2)).mean(2)
        return super().forward(hidden_states, merged, timestep)


def joint(kind=Joint):
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def joint_run(length, tokens=6, kind=Joint):
    generator = torch.Generator().manual_seed(1)
    x, prompt = (torch.randn(2, n, 8, generator=generator) for n in (tokens, length))
    more = {}
    if kind is TwoPrompts:
        more = {"other": torch.randn(2, length // 2, 8, generator=generator), "mask": torch.ones(1, 2 * (length // 2))}
    for step in range(STEPS):
        x = x + 0.05 * torch.randn(x.shape, generator=generator)
        yield {"hidden_states": x, "prompt": prompt, "timestep": torch.full((2,), 900.0 - 100 * step), **more}


EVERY = CACHES | {
    "attentions": {"method": "taylorseer", **SCHEDULE, "cache_identifiers": ["attention"]},
    "lite": {"method": "taylorseer", **SCHEDULE, "use_lite_mode": True},
    "submodules": {"method": "taylorseer", **SCHEDULE, "cache_identifiers": ["attention", "mlp"]},
    "zeros": {"method": "taylorseer", **SCHEDULE, "skip_predict_identifiers": ["mlp"], "cache_identifiers": ["block"]},
    "first_blocks": cachepass.DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.4, max_warmup_steps=2),
}


@pytest.mark.parametrize(("cache", "kind"), sweep_over([
    *((cache, Joint) for cache in EVERY),
    *((cache, kind) for cache in ("blocks", "first_block") for kind in (TwoPrompts, Pairs)),
], few=[
    ("lite", Joint), ("zeros", Joint), ("pab", Joint), ("blocks", TwoPrompts), ("first_block", Pairs),
]))  # fmt: skip
def test_every_method_on_sizes_that_follow_from_others(cache, kind):
    assert_as_static(cache, kind)


@pytest.mark.inductor
@pytest.mark.parametrize("lowering", ["specialize", "cond"])
@pytest.mark.parametrize("cache", ["blocks", "first_block"])
@pytest.mark.covering
def test_lowered_with_inductor(cache, lowering):
    assert_as_static(cache, Joint, lowering=lowering)


def assert_as_static(cache, kind, **options):
    model = torch.compile(joint(kind), fullgraph=True, **settings(EVERY[cache], **options))
    expected = torch.compile(joint(kind), fullgraph=True, **settings(EVERY[cache], dynamic=False))
    for length, tokens in ((4, 6), (8, 6), (12, 10)):
        for step, call in enumerate(joint_run(length, tokens, kind)):
            error = relative_error(model(**call), expected(**call))
            assert error < TOLERANCE, f"{length} and {tokens}, step {step}: {error:.1e}"
    assert counts_of(model) == counts_of(expected)
    assert counts_of(model)[0] > 0


def symbolic(*shapes):
    """Fake tensors whose sizes are factors of two symbols and a constant: (2, 1, 0) is ``2 * a + b``; ``"a * b"``."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    a, b = mode.from_tensor(torch.empty(5, 7), symbolic_context=context).shape

    def size(factors):
        return a * b if factors == "a * b" else factors[0] * a + factors[1] * b + factors[2]

    with mode:
        return [torch.empty([size(factors) for factors in shape]) for shape in shapes]


@pytest.mark.parametrize(("inputs", "values"), [
    ([[(1, 0, 0)], [(0, 1, 0)]], [(3,), (4,)]),
    ([[(2, 0, 0)], [(1, 1, 0)]], [(6,), (7,)]),
    ([[(1, 1, 0)], [(0, 3, 1)]], [(7,), (13,)]),
    ([["a * b"], [(0, 1, 0)]], [(12,), (4,)]),
    ([[(0, 0, 8), (2, 0, 2)], [(1, 1, 0)]], [(8, 8), (7,)]),
])  # fmt: skip
def test_symbols_that_stand_in_expressions(inputs, values):
    """In all of these, a is 3 and b is 4."""
    *fakes, slot = symbolic(*inputs, [(1, 2, 0), (1, 0, 0)])
    binder, given = SymbolBinder.of(fakes, slot.shape), [torch.empty(shape) for shape in values]
    assert list(map(binder.resolver(given), slot.shape)) == [11, 3]
    assert binder.key(given) == binder.key(given) != binder.key([torch.empty([24] * v.ndim) for v in given])


def test_a_size_that_no_input_tells():
    fake, slot = symbolic(["a * b"], [(1, 0, 0)])
    with pytest.raises(cachepass.CachepassError, match=r"no input tells the size s\d+.*\n.*dynamic=False"):
        SymbolBinder.of([fake], slot.shape)


# ---- guidance: one static program for each size ---------------------------------------------------------------------


class Prompted(Guided):
    """The samples are moved by the mean of a prompt of any length, which carries the batch too."""

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return super().forward(hidden_states, timestep, encoder_hidden_states.mean(1))


def guided_run(length, size):
    prompt = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(length))
    return [(x, t, prompt) for x, t in guided_calls(4, 2, size)]


MOST_SIZES = 20 if ALL else 9  # Dynamo's limit is 8
A_LIMIT_OF_ITS_OWN = pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters,
    reason="before torch 2.13 there is one limit of captures for all functions",
)


@A_LIMIT_OF_ITS_OWN
@pytest.mark.parametrize("growing", sweep_over(["prompts", "resolutions"], few=["prompts"]))
def test_fastercache_goes_through_many_sizes(growing):
    """More than Dynamo's limit of captures, which holds for others as before. Then all of them once more."""
    more = range(MOST_SIZES)
    sizes = [(2 + i, (6, 5)) for i in more] if growing == "prompts" else [(4, (6, 4 + i)) for i in more]
    torch.manual_seed(0)
    model, limit = Prompted().eval().requires_grad_(False), torch._dynamo.config.recompile_limit
    config = cachepass.FasterCacheConfig(**{key: value for key, value in SMALL.items() if key != "method"})
    reference = FasterCache(copy.deepcopy(model), config, {f"inner.blocks.{i}.attn": "spatial" for i in range(2)})
    plain = reference.model.forward
    reference.model.forward = lambda **call: (plain(**call),)
    cached = small(model=model, num_inference_steps=4)
    for length, size in [*sizes, *sizes[:3]]:
        reference.start()
        for step, (x, t, prompt) in enumerate(guided_run(length, size)):
            given = {"hidden_states": x, "timestep": t, "encoder_hidden_states": prompt}
            expected = reference(float(t[0]), 2, **given)
            error = relative_error(cached(**given), expected)
            assert error < TOLERANCE, f"{length}, {size}, step {step}: {error:.1e}"
    runs = len(sizes) + 3
    assert counts_of(cached)[1:] == (runs, 4 * runs)
    assert cachepass.summary(cached).predicted["unconditional"] == 2 * runs
    assert torch._dynamo.config.recompile_limit == limit


@A_LIMIT_OF_ITS_OWN
def test_a_limit_of_captures_that_is_given_holds():
    torch.manual_seed(0)
    model = torch.compile(
        Prompted().eval(),
        backend="cached_inductor",
        fullgraph=True,
        recompile_limit=2,
        options={"cache": SMALL, "lowering": "eager"},
    )
    for length in (2, 3):
        model(*guided_run(length, (6, 5))[0])
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        model(*guided_run(4, (6, 5))[0])


# ---- sizes that depend on data --------------------------------------------------------------------------------------


class Masked(nn.Module):
    """As many prompt tokens as a mask says: what is computed of them has a size that only running it tells."""

    def __init__(self, width=8):
        super().__init__()
        self.attn, self.ff, self.proj_out = Attention(width), FeedForward(width), nn.Linear(width, width)

    def forward(self, hidden_states, prompt, mask, timestep):
        kept = torch.narrow(prompt, 1, 0, mask.sum().item())
        both = self.attn(torch.cat([hidden_states * torch.cos(timestep / 1000)[:, None, None], kept], 1))
        return self.proj_out(self.ff(hidden_states) + both[:, : hidden_states.shape[1]])


def masked_run():
    mask = torch.tensor([1, 1, 1, 0])
    return [call | {"mask": mask} for call in joint_run(4)]


MASKED = {"method": "taylorseer", **SCHEDULE, "cache_identifiers": ["ff"]}


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_flops_of_sizes_that_depend_on_data_are_unknown():
    """In everything that tells of them; the page is written all the same."""
    model, calls = joint(Masked), masked_run()
    explanation = cachepass.explain(model, **calls[0], cache=MASKED)
    assert {cut.region for cut in explanation.plan.cuts} == {"ff"}
    assert explanation.flops("compute") is explanation.flops("plain") is explanation.flops("predict") is None
    assert explanation.as_dict()["flops"] == {"compute": None, "predict": None}
    assert "unknown" in str(explanation) and "unknown" in explanation.to_html(num_inference_steps=STEPS)
    compiled = torch.compile(model, fullgraph=True, **settings(MASKED))
    for call in calls:
        compiled(**call)
    summary = cachepass.summary(compiled)
    assert summary.predicted == {"taylorseer": 3}
    assert (summary.flops, summary.plain_flops, summary.saved) == (None, None, None)
    assert "compute: unknown: sizes depend on data" in str(summary)
