"""examples/custom_method.py: a method of one's own, against the same one written down slowly, and its errors."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from reference import Reference, twin
from small_models import calls, transformer

import cachepass
from cachepass.config import MethodConfig, cache_config, parse_cache
from cachepass.forecast import Forecast
from cachepass.recipe.vocabulary import Selection, Target
from cachepass.XXX import implements
from cachepass.method import Method
from cachepass.recipe.forecast.form import REUSE, ZEROS

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_method.py"
sys.path.insert(0, str(EXAMPLE.parent))

from custom_method import Chebyshev, ChebyshevCacheConfig  # noqa: E402


def test_it_is_short():
    lines = EXAMPLE.read_text().splitlines()
    code = [line for line in lines[lines.index('@cache_config("chebyshev")') :] if line.strip()]
    assert 20 < len(code) < 40


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
    config = ChebyshevCacheConfig(steps=steps, computed=computed, damping=damping, identifiers=identifiers)
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True,
                             options={"cache": config, "lowering": "eager"})  # fmt: skip
    for run in range(2):
        for x, timestep in calls(steps, seed=run):
            torch.testing.assert_close(compiled(x, timestep), slow("", x, timestep), rtol=1e-5, atol=1e-5)
    done = cachepass.summary(compiled)
    assert (done.computed, done.predicted, done.runs) == ({"chebyshev": 2 * 5}, {"chebyshev": 2 * 7}, 2)


def test_compiled_by_inductor():
    config = ChebyshevCacheConfig(steps=6, computed=3)
    model = transformer()
    slow = Reference(twin(model), Slow(6, 3, 1.0), ["blocks.0", "blocks.1"])
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options={"cache": config})
    for x, timestep in calls(6):
        torch.testing.assert_close(compiled(x, timestep), slow("", x, timestep), rtol=1e-5, atol=1e-5)


def test_nodes_lie_dense_at_both_ends():
    nodes = sorted(make_method(ChebyshevCacheConfig(steps=50, computed=10)).computed)
    gaps = [b - a for a, b in itertools.pairwise(nodes)]
    assert (nodes[0], nodes[-1], len(nodes)) == (0, 49, 10)
    assert gaps[0] < gaps[len(gaps) // 2] > gaps[-1]


def test_it_can_be_named_and_given_as_a_dict():
    assert parse_cache("chebyshev") == ChebyshevCacheConfig()
    assert parse_cache({"method": "chebyshev", "computed": 9}) == ChebyshevCacheConfig(computed=9)
    assert isinstance(make_method(ChebyshevCacheConfig()), Chebyshev)


def test_a_field_that_does_not_exist_names_the_closest_one():
    with pytest.raises(cachepass.ConfigError, match="did you mean 'damping'"):
        ChebyshevCacheConfig(dampin=0.5)


@pytest.mark.parametrize("fields", [{"computed": 1}, {"computed": 60}, {"steps": 5, "computed": 6}])
def test_values_that_make_no_sense(fields):
    with pytest.raises(cachepass.ConfigError, match=r"ChebyshevCacheConfig\.computed: .*out of range"):
        ChebyshevCacheConfig(**fields)


def test_a_run_of_nodes_only_is_reported():
    config = ChebyshevCacheConfig(steps=4, computed=4)
    compiled = torch.compile(transformer(), backend="cached_inductor", fullgraph=True,
                             options={"cache": config, "lowering": "eager"})  # fmt: skip
    with pytest.warns(cachepass.CachepassWarning, match="every step is a node"):
        compiled(*calls(1)[0])


def test_identifiers_that_match_nothing():
    config = ChebyshevCacheConfig(identifiers=("layers",))
    compiled = torch.compile(transformer(), backend="cached_inductor", fullgraph=True,
                             options={"cache": config, "lowering": "eager"})  # fmt: skip
    with pytest.raises(cachepass.NoMatchError, match="match no module"):
        compiled(*calls(1)[0])


def test_a_name_is_given_once():
    with pytest.raises(cachepass.OptionError, match="there is a method 'chebyshev' already"):

        @cache_config("chebyshev")
        class Again(MethodConfig):
            pass


def test_a_config_has_one_method():
    with pytest.raises(cachepass.ConfigError, match="has a method already"):
        implements(ChebyshevCacheConfig)(Chebyshev)


def test_a_config_without_a_method(monkeypatch):
    monkeypatch.setattr("cachepass.config.base._METHODS", dict(cachepass.config.base._METHODS))

    @cache_config("nobody")
    class NobodyConfig(MethodConfig):
        pass

    with pytest.raises(cachepass.ConfigError, match=r"NobodyConfig: no method implements it"):
        cachepass.explain(transformer(), *calls(1)[0], cache=NobodyConfig())


@pytest.mark.parametrize(("other", "says"), [
    (Forecast("cubic", history=3), "line (2 outputs), blocks.1 has cubic (3 outputs)"),
    (Forecast("reuse", history=1, constant_weights=(1.0,)), "blocks.1 has reuse (1 output)"),
    (Forecast("own", history=2, recursive=True), "own (2 outputs, predictions too)"),
    (Forecast("fitted", history=2, from_gram=True), "fitted (2 outputs, weights from what is kept)"),
])  # fmt: skip
def test_forecasts_of_a_group_keep_alike(monkeypatch, other, says):
    """A group has one history: of two depths, one would read outputs that its weights are not for."""
    forecast_blocks_by(monkeypatch, Forecast("line", history=2), other)
    with pytest.raises(cachepass.ConfigError, match="group 'chebyshev': the forecasts of one group") as caught:
        cachepass.explain(transformer(), *calls(1)[0], cache="chebyshev")
    assert says in str(caught.value)


def test_a_forecast_that_keeps_nothing_stands_in_any_group(monkeypatch):
    forecast_blocks_by(monkeypatch, ZEROS, REUSE)
    explanation = cachepass.explain(transformer(), *calls(1)[0], cache="chebyshev")
    assert [cut.forecast for cut in explanation.plan.cuts] == [ZEROS, REUSE]


def forecast_blocks_by(monkeypatch, *forecasts):
    def select(_, regions, *__):
        blocks = [region for region in regions if region.is_block]
        return Selection(tuple(Target(b, "chebyshev", f) for b, f in zip(blocks, forecasts, strict=True)))

    monkeypatch.setattr(Chebyshev, "select", select)
