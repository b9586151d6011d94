"""What stays the same within a run is computed once in it, and an input that changes is seen."""

from __future__ import annotations

import weakref

import pytest
import torch
from residuals import MODELS
from small_models import Attention
from torch import nn
from zoo import build, first_tensor, is_one_graph, relative_error, timestep_scale, trajectory

import cachepass
from cachepass.run.dispatch import LIVE
from cachepass.run.live import programs_of
from cachepass.testing import count_compiles

OPTIONS = {"cache": "invariant", "lowering": "eager", "num_inference_steps": 4}
# Nothing but a table of class embeddings depends on an input that stays the same.
NOTHING = {"DiTTransformer2DModel"}


class Conditioned(nn.Module):
    """Cross-attention on a text, a rotary-like table of positions, and a scale."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.project, self.cross, self.out = nn.Linear(4, width), Attention(width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states, timestep, text, strength: float = 1.0):
        context = self.project(text) * strength
        return self.out(hidden_states + self.cross(hidden_states, context) * timestep[:, None, None]) * self.scale


class Counting:
    """Steps of a compiled model against the eager one; ``computed``: how often what is kept was computed."""

    def __init__(self, model: nn.Module, **options) -> None:
        self.model = model.eval().requires_grad_(False)
        torch._dynamo.reset()
        self.compiled = torch.compile(
            self.model, backend="cached_inductor", fullgraph=True, options={**OPTIONS, **options}
        )

    def step(self, *args, expected=None, **kwargs) -> None:
        with torch.no_grad():
            result = self.compiled(*args, **kwargs)
            expected = self.model(*args, **kwargs) if expected is None else expected
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)

    @property
    def states(self):
        (_, instance), *_ = programs_of(self.compiled)
        return [state for run in instance.model.runs for state in run.invariants.values()]

    @property
    def computed(self) -> int:
        return sum(state.computed for state in self.states)


def conditioned() -> Conditioned:
    torch.manual_seed(0)
    return Conditioned()


def latents(step: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))


def when(step: int) -> torch.Tensor:
    return torch.full((2,), 1 - 0.2 * step)


TEXT = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(9))


def test_it_is_computed_once_in_each_run():
    counting = Counting(conditioned())
    for run in range(3):
        for step in range(4):
            counting.step(latents(step), when(step), TEXT)
            assert counting.computed == run + 1


def test_nothing_of_the_text_is_left_in_a_step():
    explanation = cachepass.explain(
        conditioned().eval().requires_grad_(False),
        latents(),
        when(0),
        TEXT,
        cache="invariant",
        options={"num_inference_steps": 4},
    )
    step = explanation.graph("compute")
    assert "text" not in step and "project" not in step and "kv" not in step
    assert [line for line in step.splitlines() if line.startswith("invariant[")] == [
        "invariant[addmm_1]: f32[10, 16]",
    ]
    assert "kept for a run: 1 value" in str(explanation) and "(640 B)" in str(explanation)


@pytest.mark.parametrize("change", ["another object", "written to", "another parameter", "a parameter written to"])
def test_a_change_within_a_run_is_seen(change):
    counting = Counting(conditioned())
    text = TEXT.clone()
    counting.step(latents(0), when(0), text)
    counting.step(latents(1), when(1), text)
    assert counting.computed == 1
    with torch.no_grad():
        if change == "another object":
            text = text * 2
        elif change == "written to":
            text.mul_(2)
        elif change == "another parameter":
            counting.model.cross.kv.weight = nn.Parameter(counting.model.cross.kv.weight * 2, requires_grad=False)
        else:
            counting.model.project.bias.add_(1)
    counting.step(latents(2), when(2), text)
    counting.step(latents(3), when(3), text)
    assert counting.computed == 2


@pytest.mark.parametrize("change", ["swapped", "other data", "the same data elsewhere"])
def test_memory_that_is_exchanged_is_seen(change):
    """The same object with the same version, which lies somewhere else."""
    counting = Counting(conditioned())
    weight = counting.model.cross.kv.weight
    counting.step(latents(0), when(0), TEXT)
    counting.step(latents(1), when(1), TEXT)
    assert counting.computed == 1 and not weakref.getweakrefs(weight)  # torch swaps no tensor that has one
    kept = weight.data
    if change == "swapped":
        torch.utils.swap_tensors(weight, nn.Parameter(weight * 2, requires_grad=False))
    else:
        flat = torch.cat([kept.flatten(), kept.flatten() * 3])
        weight.data = flat[: kept.numel()].view_as(kept)
        if change == "other data":
            weight.data = flat[kept.numel() :].view_as(kept)
    counting.step(latents(2), when(2), TEXT)
    assert counting.computed == 2
    if change == "other data":  # within one storage
        weight.data = flat[: kept.numel()].view_as(kept)
        counting.step(latents(3), when(3), TEXT)
        assert counting.computed == 3


def test_a_parameter_at_the_address_of_one_that_is_gone_is_another_one():
    counting = Counting(conditioned(), num_inference_steps=9)
    places = set()
    for step in range(8):
        with torch.no_grad():
            values = counting.model.project.weight * 1.5
            counting.model.project.weight = None
            counting.model.project.weight = nn.Parameter(values.clone(), requires_grad=False)
        places.add(counting.model.project.weight.data_ptr())
        del values
        if step == 3:
            with pytest.warns(cachepass.CachepassWarning, match="another tensor at every step"):
                counting.step(latents(step), when(step % 5), TEXT)
        else:
            counting.step(latents(step), when(step % 5), TEXT)
    assert counting.computed == 8
    if len(places) == 8:
        pytest.skip("the allocator gave no address twice, so nothing was tried")


def test_an_adapter_that_is_swapped_in_place_is_seen():
    """PEFT writes the weights through ``.data``."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["kv"], init_lora_weights=False)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(peft.inject_adapter_in_model(config, conditioned()))
    other = {name: value for name, value in models[1].state_dict().items() if "lora_" in name}
    counting = Counting(models[0], num_inference_steps=9)
    for step in range(2):
        counting.step(latents(step), when(step), TEXT)
    assert counting.computed == 1
    versions = [parameter._version for parameter in models[0].parameters()]

    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    hotswap_adapter_from_state_dict(models[0], other, "default", config)
    assert [parameter._version for parameter in models[0].parameters()] == versions
    for step in range(2, 4):
        counting.step(latents(step), when(step), TEXT)
    assert counting.computed == 2


@pytest.mark.parametrize("viewed", [False, True])
def test_what_a_replayed_graph_returns_is_never_the_same(viewed):
    """The same tensor each time, whose version does not rise: as Inductor marks the outputs of its CUDA graphs."""
    counting, text = Counting(conditioned(), num_inference_steps=9), TEXT.clone()
    torch._C._set_cached_tensors_enabled(True)
    torch._C._add_cached_tensor(text)
    try:
        for step in range(3):
            text.data.mul_(2.0)  # as a replay writes it
            counting.step(latents(step), when(step), text[:] if viewed else text)
    finally:
        torch._C._remove_cached_tensor(text)
        torch._C._set_cached_tensors_enabled(False)
    assert counting.computed == 3


@pytest.mark.parametrize("captured", ["a module", "a function"])
def test_a_model_can_be_converted_by_swapping_its_tensors(captured):
    """torch swaps only tensors that nothing refers to weakly."""
    model = conditioned().eval().requires_grad_(False)
    cache = {"method": "taylorseer", "cache_identifiers": ["cross"], "taylor_factors_dtype": None}
    target = model if captured == "a module" else lambda *inputs: model(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(target, backend="cached_inductor", options={**OPTIONS, "cache": cache})
    for step in range(2):
        compiled(latents(step), when(step), TEXT)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    inputs = [value.double() for value in (latents(2), torch.ones(2), TEXT)]
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_models_that_a_function_calls_have_states_of_their_own():
    """Also where one gets the ids of another one that is gone."""
    holder = []
    cache = {
        "method": "taylorseer",
        "cache_identifiers": [r".*cross"],
        "taylor_factors_dtype": None,
        "max_order": 0,
        "disable_cache_before_step": 1,
        "cache_interval": 8,
    }
    torch._dynamo.reset()
    others = set(LIVE)
    compiled = torch.compile(
        lambda x, t, text: holder[0](x, t, text),
        backend="cached_inductor",
        options={"cache": cache, "lowering": "eager", "num_inference_steps": 20},
    )
    for seed in range(5):
        holder.clear()
        torch.manual_seed(seed)
        holder.append(Conditioned().eval().requires_grad_(False))
        torch.testing.assert_close(compiled(latents(), when(0), TEXT), holder[0](latents(), when(0), TEXT))
        compiled(latents(1), when(0), TEXT)
    dispatcher = next(one for one in LIVE if one not in others and one.program is not None)
    assert len(dispatcher.instances) == 1  # the others are gone, with what they kept


def test_a_write_through_data_is_seen_in_the_next_run():
    """As fusing a LoRA does it."""
    counting = Counting(conditioned())
    for step in range(4):
        counting.step(latents(step), when(step), TEXT)
    counting.model.project.weight.data += 1
    for step in range(4):
        counting.step(latents(step), when(step), TEXT)
    assert counting.computed == 2


def test_views_of_the_same_tensor_are_the_same_and_others_are_not():
    counting, both = Counting(conditioned()), torch.cat([TEXT, -TEXT])
    for step in range(3):
        counting.step(latents(step), when(step), both[:2])
    assert counting.computed == 1
    counting.step(latents(3), when(3), both[2:])
    assert counting.computed == 2


def test_a_new_object_at_every_step_warns_once_and_stays_right():
    counting = Counting(conditioned(), num_inference_steps=9)
    for step in range(3):
        counting.step(latents(step), when(step), TEXT * (1 + step))
    with pytest.warns(cachepass.CachepassWarning, match="the input text is another tensor at every step"):
        counting.step(latents(3), when(3), TEXT * 4)
    counting.step(latents(4), when(4), TEXT * 5)
    assert counting.computed == 5


def test_declared_inputs_are_not_compared_within_a_run():
    counting = Counting(conditioned(), invariant_inputs=["text"])
    for step in range(8):
        counting.step(latents(step), when(step % 4), TEXT.clone())
    assert counting.computed == 2


class ByName(nn.Module):
    """A model whose inputs are known by the names in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Conditioned()

    def forward(self, hidden_states, **kwargs):
        return self.inner(hidden_states, kwargs["timestep"], kwargs["encoder_hidden_states"])


@pytest.mark.parametrize("name", ["encoder_hidden_states", "kwargs.encoder_hidden_states"])
def test_the_end_of_a_name_is_enough(name):
    torch.manual_seed(0)
    counting = Counting(ByName(), invariant_inputs=[name], cache="invariant")
    for step in range(4):
        counting.step(latents(step), timestep=when(step), encoder_hidden_states=TEXT.clone())
    assert counting.computed == 1


def test_inference_tensors_leave_no_trace_so_they_must_be_declared():
    with torch.inference_mode():
        text = TEXT.clone()
    for declared, slots in (([], 0), (["text"], 1)):
        counting = Counting(conditioned(), invariant_inputs=declared, cache="taylorseer", num_inference_steps=20)
        counting.step(latents(0), when(0), text)
        assert sum(len(state.slots) for state in counting.states) == slots


def test_a_number_that_changes_is_compared_by_value():
    counting = Counting(conditioned(), num_inference_steps=9)
    for step, strength in enumerate([0.5, 0.5, 0.25, 0.25]):
        counting.step(latents(step), when(step), TEXT, strength=strength)
    assert counting.computed <= 3


def test_contexts_keep_their_own():
    counting, negative = Counting(conditioned()), -TEXT
    for step in range(4):
        for context, text in (("cond", TEXT), ("uncond", negative)):
            with cachepass.cache_context(context):
                counting.step(latents(step), when(step), text)
    assert [state.computed for state in counting.states] == [1, 1]


def test_sizes_that_change_have_slots_of_their_own_size():
    counting = Counting(conditioned(), num_inference_steps=12)
    torch._dynamo.config.automatic_dynamic_shapes = True
    with count_compiles() as counts:
        for step, tokens in enumerate([5, 5, 7, 7, 9, 9, 5]):
            text = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(tokens))
            counting.step(latents(step), when(step), text)
    assert counts.graphs == 2  # static, then dynamic
    assert {tuple(slot.shape) for state in counting.states for slot in state.slots.values()} == {(10, 16)}


def test_a_failed_computation_leaves_nothing_that_counts():
    counting = Counting(conditioned())
    counting.step(latents(0), when(0), TEXT)
    (dispatcher, _), *_ = programs_of(counting.compiled)
    (once,) = dispatcher.program._once.values()
    run = once.run

    def failing(inputs):
        run(inputs)
        raise MemoryError("out of memory")

    object.__setattr__(once, "run", failing)
    with pytest.raises(MemoryError):
        counting.step(latents(1), when(1), TEXT * 3)
    object.__setattr__(once, "run", run)
    counting.step(latents(1), when(1), TEXT)


def test_the_caller_owns_what_the_model_returns():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, hidden_states, timestep, text):
            projected = self.project(text)
            return hidden_states * timestep + projected.sum(), projected

    model = Returns().eval().requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=OPTIONS)
    with torch.no_grad():
        for step in range(3):
            result, projected = compiled(latents(step), torch.ones(1), TEXT)
            projected.zero_()
            torch.testing.assert_close(result, model(latents(step), torch.ones(1), TEXT)[0])


def test_it_works_with_a_forecast_and_can_be_switched_off():
    cache = {
        "method": "taylorseer",
        "cache_interval": 2,
        "disable_cache_before_step": 1,
        "cache_identifiers": ["cross"],
        "taylor_factors_dtype": None,
    }
    results = []
    for invariants in (True, False):
        model = conditioned().eval().requires_grad_(False)
        torch._dynamo.reset()
        compiled = torch.compile(
            model,
            backend="cached_inductor",
            fullgraph=True,
            options={**OPTIONS, "cache": cache, "invariants": invariants, "num_inference_steps": 8},
        )
        with torch.no_grad():
            results.append([compiled(latents(step), when(step % 5), TEXT) for step in range(8)])
        summary = cachepass.summary(compiled)
        assert ("once" in summary.variants) == invariants and summary.predicted["taylorseer"] > 0
        assert bool(summary.invariant_bytes) == invariants
    torch.testing.assert_close(results[0], results[1])


def test_a_module_that_stays_the_same_is_not_forecast():
    class Refined(nn.Module):
        def __init__(self):
            super().__init__()
            self.refine, self.attn = Attention(4), Attention(4)

        def forward(self, hidden_states, timestep, text):
            return self.attn(hidden_states * timestep, self.refine(text))

    torch.manual_seed(0)
    model = Refined().eval().requires_grad_(False)
    cache = {"method": "taylorseer", "cache_identifiers": ["attn", "refine"], "taylor_factors_dtype": None}
    inputs = latents()[..., :4], torch.ones(1), TEXT
    explanation = cachepass.explain(model, *inputs, cache=cache, options={"num_inference_steps": 9})
    assert [cut.region for cut in explanation.plan.cuts] == ["attn"]
    assert {skip.region: skip.reason for skip in explanation.skips}["refine"].startswith("it stays the same")


class FourBits(nn.Module):
    """Two weights in each byte, with a scale for each row, which is stored as its logarithm."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        packed = torch.randint(0, 256, (width, width // 2), generator=generator, dtype=torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(torch.full((width, 1), -4.0), requires_grad=False)

    def forward(self, x):
        halves = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).float() - 7.5
        return x @ (halves * torch.exp(self.scale.expand_as(halves))).T


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.project = nn.ModuleList([FourBits() for _ in range(2)]), nn.Linear(4, 96)

    def forward(self, hidden_states, timestep, text):
        context = self.project(text).mean(1, keepdim=True)
        for layer in self.layers:
            hidden_states = layer(hidden_states * timestep[:, None, None] + context)
        return hidden_states


def test_weights_are_not_kept_larger_than_they_are_stored():
    """Dequantised they would take eight times the memory of what they are made of."""
    model = Quantised().eval().requires_grad_(False)
    inputs = torch.randn(2, 3, 96), when(0), TEXT
    explanation = cachepass.explain(model, *inputs, cache="invariant", options={"num_inference_steps": 4})
    assert [tuple(slot.shape) for slot in explanation.hoisted.slots] == [(2, 1, 96)]
    note = next(note for note in explanation.notes if "not kept for a run" in note)
    assert "2 values of 73728 B, larger than the parameters alone that make it" in note
    counting = Counting(model)
    for step in range(4):
        counting.step(inputs[0] + step, when(step), TEXT)
    assert counting.computed == 1


def test_a_budget_keeps_what_saves_most():
    """Keys and values cost more to compute than the projection that they are made of."""
    inputs, model = (latents(), when(0), TEXT), Wide().eval().requires_grad_(False)
    reports = {
        limit: cachepass.explain(model, *inputs, cache="invariant", options={"invariant_bytes": limit})
        for limit in (None, 2**30, 1000, 0)
    }
    kept = {limit: 0 if r.hoisted is None else r.hoisted.slot_bytes for limit, r in reports.items()}
    assert kept == {None: 2560, 2**30: 2560, 1000: 640, 0: 0}
    assert "kept for a run: 1 value, 640 B (640 B) of at most 1000 B" in str(reports[1000])
    assert "1 value of 1920 B, beyond the budget of 1000 B, options" in str(reports[1000])
    assert "of at most" not in str(reports[None])
    counting = Counting(model, cache="taylorseer", num_inference_steps=20, invariant_bytes=1000)
    counting.step(latents(), when(0), TEXT)
    assert sum(state.cache_bytes for state in counting.states) == 640


class Wide(nn.Module):
    """A dear value of 640 bytes and a cheap one of 1920, both made of the text."""

    def __init__(self):
        super().__init__()
        self.cross, self.deep, self.light = Attention(), nn.Linear(4, 4096), nn.Linear(4096, 8)
        self.wide = nn.Linear(4, 48)

    def forward(self, hidden_states, timestep, text):
        hidden_states = self.cross(hidden_states * timestep[:, None, None], self.light(self.deep(text)))
        return hidden_states * (1 + (self.wide(text) * timestep[:, None, None]).mean())


def test_a_region_that_is_too_large_to_keep_is_computed_and_said():
    model = conditioned().eval().requires_grad_(False)
    cache = {"method": "taylorseer", "cache_identifiers": ["cross", "project"], "taylor_factors_dtype": None}
    for limit, says in ((2**30, "computed once"), (0, "too large to be kept: computed every time")):
        explanation = cachepass.explain(
            model, latents(), when(0), TEXT, cache=cache, options={"num_inference_steps": 9, "invariant_bytes": limit}
        )
        assert says in {skip.region: skip.reason for skip in explanation.skips}["project"]
        assert [cut.region for cut in explanation.plan.cuts] == ["cross"]


def test_nothing_to_keep_is_said():
    model = nn.Sequential(nn.Linear(8, 8)).eval().requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="cached_inductor", options=OPTIONS)
    with torch.no_grad(), pytest.warns(cachepass.CachepassWarning, match="nothing but parameters"):
        compiled(torch.ones(2, 8))


@pytest.mark.parametrize(("options", "match"), [
    ({"invariants": "yes"}, "expected a bool"), ({"invariant_inputs": "text"}, "list of names"),
    ({"invariant_bytes": -1}, "a number of bytes"),
    ({"invariants": False}, "the method 'invariant'"), ({"invariant_inputs": ["txt"]}, "no tensor input 'txt'.*text"),
])  # fmt: skip
def test_options_are_checked(options, match):
    counting = Counting(conditioned(), **options)
    with torch.no_grad(), pytest.raises(cachepass.OptionError, match=f"(?s){match}"):
        counting.compiled(latents(), when(0), TEXT)


def test_a_part_of_a_model_is_refused():
    class Broken(Conditioned):
        def forward(self, hidden_states, timestep, text, strength=1.0):
            torch._dynamo.graph_break()
            return super().forward(hidden_states, timestep, text, strength)

    model = Broken().eval().requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="cached_inductor", options=OPTIONS)
    with torch.no_grad(), pytest.raises(cachepass.PartialGraphError, match="graph of a whole model only"):
        compiled(latents(), when(0), TEXT)


@pytest.mark.parametrize("name", [name for name in MODELS if is_one_graph(name)])
def test_every_model_is_exact(name, sweep):
    """Two runs of four steps: equal to the model itself, and computed once in each."""
    torch._dynamo.reset()
    model = build(name)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(
            model,
            backend="cached_inductor",
            fullgraph=True,
            options={**OPTIONS, "timestep_scale": timestep_scale(name)},
        )
        worst = 0.0
        for _ in range(2):
            for _, inputs in trajectory(name, 4):
                with torch.no_grad():
                    if name in NOTHING and worst == 0.0:
                        with pytest.warns(cachepass.CachepassWarning, match="nothing but parameters"):
                            result = compiled(**inputs)
                    else:
                        result = compiled(**inputs)
                    worst = max(worst, relative_error(first_tensor(result), first_tensor(model(**inputs))))
    assert worst < 1e-6
    (_, instance), *_ = programs_of(compiled)
    states = [state for run in instance.model.runs for state in run.invariants.values()]
    assert [state.computed for state in states] == ([] if name in NOTHING else [2])
    sweep("invariant", worst)
