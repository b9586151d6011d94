"""examples/custom_method.py: a method of one's own, against the same one written down slowly, and its errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from reference import Reference, twin
from small_models import calls, transformer

import cachepass
from cachepass import Group, Part, Recipe
from cachepass.config import MethodConfig, cache_config
from cachepass.config.base import parse_cache
from cachepass.cut import BlockResidual, Blocks, Latents, Modules
from cachepass.forecast import DMD, Extrapolate, Forecast, ForecastRule, Lagrange, Reuse, Taylor, Zeros
from cachepass.schedule import Before, Every, Final, Step, Threshold, Timesteps

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_method.py"
sys.path.insert(0, str(EXAMPLE.parent))

from custom_method import ChebyshevNodes, DampedLine, chebyshev  # noqa: E402


def test_it_is_short():
    lines = EXAMPLE.read_text().splitlines()
    code = [line for line in lines[lines.index("@dataclass(frozen=True)") :] if line.strip()]
    assert 15 < len(code) < 25


class Slow:
    """The method by definition: nodes one by one, every output kept, the line through the last two of them."""

    def __init__(self, steps: int, computed: int, damping: float) -> None:
        self.steps, self.damping = steps, damping
        self.nodes = []
        for i in range(computed):
            x = -math.cos(math.pi * i / (computed - 1))  # in -1 .. 1
            self.nodes.append(round((x + 1) / 2 * (steps - 1)))

    def predicts(self, step: int, timestep: float) -> bool:
        return step < self.steps and step not in self.nodes

    def forecast(self, outputs, step: int):
        if len(outputs) == 1:
            return outputs[0][1]
        (older, before), (newest, last) = outputs[-2:]
        share = self.damping * (step - newest) / (newest - older)
        return [h + share * (h - g) for g, h in zip(before, last, strict=True)]


@pytest.mark.parametrize(("identifiers", "paths"), [
    (("block",), ["blocks.0", "blocks.1"]),
    (("attention",), ["blocks.0.attn", "blocks.1.attn"]),
    ((r"blocks\.1\.ff",), ["blocks.1.ff"]),
])  # fmt: skip
@pytest.mark.parametrize("damping", [1.0, 0.4, 0.0])
def test_equal_to_the_slow_reference(identifiers, paths, damping):
    steps, computed = 12, 5
    model = transformer()
    slow = Reference(twin(model), Slow(steps, computed, damping), paths)
    recipe = chebyshev(steps, computed, damping, Modules(*identifiers))
    compiled = torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": recipe, "lowering": "eager"}
    )
    for run in range(2):
        for x, timestep in calls(steps, seed=run):
            torch.testing.assert_close(compiled(x, timestep), slow("", x, timestep), rtol=1e-5, atol=1e-5)
    done = cachepass.summary(compiled)
    assert (done.computed, done.predicted, done.runs) == ({"chebyshev": 2 * 5}, {"chebyshev": 2 * 7}, 2)


def test_compiled_by_inductor():
    model = transformer()
    slow = Reference(twin(model), Slow(6, 3, 1.0), ["blocks.0", "blocks.1"])
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options={"cache": chebyshev(6, 3)})
    for x, timestep in calls(6):
        torch.testing.assert_close(compiled(x, timestep), slow("", x, timestep), rtol=1e-5, atol=1e-5)


def test_nodes_lie_dense_at_both_ends():
    nodes = sorted(ChebyshevNodes(50, 10).nodes())
    gaps = [b - a for a, b in itertools.pairwise(nodes)]
    assert (nodes[0], nodes[-1], len(nodes)) == (0, 49, 10)
    assert gaps[0] < gaps[len(gaps) // 2] > gaps[-1]


def compiled(cache, **options):
    return torch.compile(
        transformer(),
        backend="cached_inductor",
        fullgraph=True,
        options={"cache": cache, "lowering": "eager", **options},
    )


def test_a_run_of_nodes_only_is_reported():
    with pytest.warns(cachepass.CachepassWarning, match="never fires: ChebyshevNodes.* computes each of 4 steps"):
        compiled(chebyshev(4, 4), num_inference_steps=4)(*calls(1)[0])


def test_identifiers_that_match_nothing():
    with pytest.raises(cachepass.NoMatchError, match=r"Group\('chebyshev'\).parts: 'layers' matches no module"):
        compiled(chebyshev(cut=Modules("layers")))(*calls(1)[0])


# ---- a recipe under a name of its own -------------------------------------------------------------------------------


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setattr("cachepass.config.base._METHODS", dict(cachepass.config.base._METHODS))

    @cache_config("chebyshev")
    class ChebyshevCacheConfig(MethodConfig):
        steps: int = 50
        computed: int = 20

        def check(self):
            if not 2 <= self.computed <= self.steps:
                raise self.fail("computed", f"{self.computed} is out of range", f"allowed: 2 to steps={self.steps}")

        def recipe(self, num_inference_steps):
            return chebyshev(num_inference_steps or self.steps, self.computed)

    return ChebyshevCacheConfig


def test_it_can_be_named_and_given_as_a_dict(named):
    assert parse_cache("chebyshev") == named()
    assert parse_cache({"method": "chebyshev", "computed": 9}) == named(computed=9)
    assert MethodConfig.from_dict(json.loads(json.dumps(named(computed=9).to_dict()))) == named(computed=9)


def test_a_field_that_does_not_exist_names_the_closest_one(named):
    with pytest.raises(cachepass.ConfigError, match="did you mean 'computed'"):
        named(computd=5)


@pytest.mark.parametrize("fields", [{"computed": 1}, {"computed": 60}, {"steps": 5, "computed": 6}])
def test_values_that_make_no_sense(named, fields):
    with pytest.raises(cachepass.ConfigError, match=r"ChebyshevCacheConfig\.computed: .*out of range"):
        named(**fields)


def test_a_name_is_given_once(named):
    with pytest.raises(cachepass.OptionError, match=f"there is a method {named.method!r} already"):

        @cache_config("chebyshev")
        class Again(MethodConfig):
            pass


def test_a_config_without_a_recipe(monkeypatch):
    monkeypatch.setattr("cachepass.config.base._METHODS", dict(cachepass.config.base._METHODS))

    @cache_config("nobody")
    class NobodyConfig(MethodConfig):
        pass

    with pytest.raises(cachepass.ConfigError, match=r"NobodyConfig: it has no recipe"):
        cachepass.explain(transformer(), *calls(1)[0], cache=NobodyConfig())


# ---- what a recipe may be -------------------------------------------------------------------------------------------


def rule(form):
    """A forecast that keeps what the form says."""

    class Own(ForecastRule):
        def derive(self, nodes, at):
            return (1.0, *(0.0 for _ in nodes[1:]))

    Own.form = form
    Own.__abstractmethods__ = frozenset()
    return Own()


@pytest.mark.parametrize(("other", "says"), [
    (Forecast("cubic", history=3), "(2 outputs) and blocks.1: cubic (3 outputs)"),
    (Forecast("reuse", history=1, constant_weights=(1.0,)), "blocks.1: reuse (1 output)"),
    (Forecast("own", history=2, recursive=True), "own (2 outputs, predictions too)"),
    (Forecast("fitted", history=2, from_gram=True), "fitted (2 outputs, weights from what is kept)"),
])  # fmt: skip
def test_forecasts_of_a_group_keep_alike(other, says):
    """A group has one history: of two depths, one would read outputs that its weights are not for."""
    with pytest.raises(cachepass.ConfigError, match=r"Group\('two'\): the forecasts of one group") as caught:
        Group("two", Every(3), (Part(Modules("blocks.0"), DampedLine()), Part(Modules("blocks.1"), rule(other))))
    assert says in str(caught.value)


def test_a_forecast_that_keeps_nothing_stands_in_any_group():
    parts = Part(Modules(r"blocks\.0"), Zeros()), Part(Modules(r"blocks\.1"), Reuse())
    explanation = cachepass.explain(transformer(), *calls(1)[0], cache=Recipe((Group("two", Every(3), parts),)))
    assert [str(cut.forecast) for cut in explanation.plan.cuts] == ["zeros", "reuse"]


PART = Part(Modules("attention"), Taylor(1))


@pytest.mark.parametrize(("make", "says"), [
    (lambda: Recipe(Group("a", Every(2), (PART,))), r"Recipe.groups: expected a tuple of groups"),
    (lambda: Recipe((Group("a", Every(2), (PART,)), Group("a", Every(3), (PART,)))), "two groups are called 'a'"),
    (lambda: Group("", Every(2), (PART,)), "Group.name: expected a name"),
    (lambda: Group("a", 5, (PART,)), "Group.schedule: expected a value of cachepass.schedule, got 5"),
    (lambda: Group("a", Every(2), PART), r"Group\('a'\).parts: expected a tuple of parts"),
    (lambda: Group("a", Threshold(0.1), (PART,)), "the schedule's threshold has nothing to ask"),
    (lambda: Group("a", Every(2), (PART,), BlockResidual()), "nothing decides by it"),
    (lambda: Group("a", Every(2), (PART, Part(Blocks(), Taylor(1)))), "a stack of blocks is cut as one value"),
    (lambda: Recipe(tuple(Group(n, Threshold(0.1), (PART,), Latents()) for n in "ab")), "more than one group has a"),
    (lambda: Part("attention", Reuse()), "Part.cut: expected a value of cachepass.cut"),
    (lambda: Part(Blocks(), "reuse"), "Part.forecast: expected a value of cachepass.forecast"),
    (lambda: Part(Blocks(), Reuse(), torch.int8), "Part.dtype: expected a floating-point"),
    (lambda: Modules("attention", kind="attn"), "Modules.kind: there is no kind 'attn'"),
])  # fmt: skip
def test_recipes_that_make_no_sense(make, says):
    with pytest.raises(cachepass.ConfigError, match=says):
        make()


def test_two_groups_with_schedules_of_their_own():
    """A module belongs to the first group that takes it."""
    recipe = Recipe(
        (
            Group("first", Every(2), (Part(Modules(r"blocks\.0\..*"), Reuse()),)),
            Group("others", Every(3), (Part(Modules("attention", "mlp"), Taylor(1)),)),
        )
    )
    step = compiled(recipe)
    for call in calls(6):
        step(*call)
    assert cachepass.summary(step).last_runs["default"] == {"first": "#.#.#.", "others": "#..#.."}
    explanation = cachepass.explain(transformer(), *calls(1)[0], cache=recipe)
    groups = {target.region.path: target.group for target in explanation.targets}
    assert groups["blocks.0.attn"] == "first" and groups["blocks.1.attn"] == groups["blocks.1.ff"] == "others"


def test_a_recipe_is_told_the_length_of_a_run():
    """Its groups and its guidance."""
    guided = cachepass.FasterCacheConfig().recipe(None)
    schedule = Every(3) & Final(2)
    given = Recipe((Group("a", schedule, (PART,)),), dataclasses.replace(guided.guidance, schedule=schedule))
    bound = given.bind(20)
    assert bound.groups[0].schedule == bound.guidance.schedule == Every(3) & Before(18)


# ---- saved ----------------------------------------------------------------------------------------------------------

CONFIGS = [
    cachepass.TaylorSeerCacheConfig(skip_predict_identifiers=["blocks.0"], cache_identifiers=["blocks.1"]),
    cachepass.TaylorSeerCacheConfig(use_lite_mode=True, taylor_factors_dtype=None, disable_cache_after_step=9),
    cachepass.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, mlp_block_skip_range=3),
    cachepass.FasterCacheConfig(tensor_format="BSC", latent_grid=(4, 4)),
    cachepass.FasterCacheConfig(is_guidance_distilled=True),
    cachepass.InvariantConfig(),
    cachepass.FirstBlockCacheConfig(),
    cachepass.DBCacheConfig(calibrator=Taylor(1), force_refresh_step_hint=5),
    cachepass.SeaCacheConfig(latent_grid=(4, 4)),
    cachepass.TeaCacheConfig(coefficients=(1.0, 0.5), final_steps=0),
    cachepass.MagCacheConfig(mag_ratios=cachepass.FLUX_MAG_RATIOS),
    cachepass.CacheConfig(cut="mlp", schedule=~Every(3) | Timesteps(-math.inf, 500), forecast=DMD()),
    cachepass.CacheConfig(schedule=Threshold(0.2, coefficients=(1, 0)), forecast=Lagrange(2), probe=Latents()),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_configs_and_their_recipes_are_saved_and_loaded(config, tmp_path):
    """Equal to what was saved, through JSON as other programs read it, from a file that ``options`` names."""
    saved = json.dumps(config.to_dict(), allow_nan=False)
    assert MethodConfig.from_dict(json.loads(saved)) == config
    recipe = config.recipe(20)
    again = json.loads(json.dumps(recipe.to_dict(), allow_nan=False))
    assert Recipe.from_dict(again) == recipe and hash(Recipe.from_dict(again)) == hash(recipe)
    for name, text in (("config.json", saved), ("recipe.json", json.dumps(again))):
        (tmp_path / name).write_text(text)
    assert parse_cache(str(tmp_path / "config.json")) == config
    assert parse_cache(tmp_path / "recipe.json").recipe(20) == recipe


def test_a_file_says_what_runs(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(chebyshev(12, 5).to_dict()))
    runs = []
    for cache in (chebyshev(12, 5), str(path)):
        step = compiled(cache)
        runs.append([step(*call) for call in calls(12)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize(("value", "where"), [
    (cachepass.FasterCacheConfig(attention_weight_callback=len), "FasterCacheConfig.attention_weight_callback"),
    (cachepass.SeaCacheConfig(raw_vision_callback=lambda *_: []), "SeaCacheConfig.raw_vision_callback"),
    (Recipe((Group("a", Every(2), (Part(Blocks(), Extrapolate(callback=len)),)),)),
     r"recipe.groups\[0\].parts\[0\].forecast.callback"),
])  # fmt: skip
def test_what_holds_a_function_cannot_be_saved(value, where):
    with pytest.raises(cachepass.ConfigError, match=f"{where}: a function of Python's cannot be saved"):
        value.to_dict()


@pytest.mark.parametrize(("change", "says"), [
    ({"schema": 99}, "schema 99 is not 1"),
    ({"recipe": {"type": "Recip"}}, "(?s)there is no value 'Recip'.*did you mean 'Recipe'"),
    ({"recipe": {"type": "Recipe", "groops": []}}, "Recipe has no field 'groops'"),
    ({"recipe": [1, 2]}, "expected a Recipe"),
])  # fmt: skip
def test_what_was_saved_and_makes_no_sense(change, says):
    with pytest.raises(cachepass.ConfigError, match=says):
        Recipe.from_dict({**chebyshev().to_dict(), **change})


@pytest.mark.parametrize(
    ("text", "says"), [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "holds no recipe")]
)
def test_files_that_cannot_be_read(tmp_path, text, says):
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(cachepass.OptionError, match=says):
        parse_cache(str(path))


def test_a_step_needs_no_model_to_ask_a_schedule():
    assert ChebyshevNodes(12, 5).predicts(Step(1), None) and not ChebyshevNodes(12, 5).predicts(Step(0), None)
