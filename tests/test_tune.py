"""``tune``: from a user's loop and a budget to a config in a file, and what it does there."""

from __future__ import annotations

import json

import pytest
import torch
from browser import missing
from click.testing import CliRunner
from pipelines import PIPELINES
from small_models import Transformer, transformer

import cachepass
from cachepass import ConfigError, OptionError, Tuning, cache_context, tune
from cachepass.cli import main
from cachepass.cut import Blocks, Modules
from cachepass.forecast import Reuse, Taylor
from cachepass.integrations.diffusers import enable_cache
from cachepass.integrations.diffusers import tune as tune_pipeline
from cachepass.testing import count_compiles

STEPS = 12
EAGER = {"lowering": "eager"}
QUICK = {"options": EAGER, "progress": False, "tries": 4}


class Result(dict):
    """What a pipeline returns."""

    @property
    def images(self) -> torch.Tensor:
        return self["x"]


def times(steps: int = STEPS) -> list[float]:
    return [1000.0 * (1 - step / steps) for step in range(steps)]


def sample(model, run, steps=STEPS):
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(run))
    for t in times(steps):
        x = x - model(x, torch.full((2,), t)) / steps
    return x


def guided(model, run):
    """Guidance by two calls per step."""
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(run))
    prompts = {
        name: torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
        for name, seed in (("cond", 7), ("uncond", 8))
    }
    for t in times():
        found = {}
        for name, prompt in prompts.items():
            with cache_context(name):
                found[name] = model(x, torch.full((2,), t), prompt)
        x = x - (found["uncond"] + 2 * (found["cond"] - found["uncond"])) / STEPS
    return x


def batched(model, run):
    """Guidance by a batch."""
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(run))
    prompt = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(7))
    for t in times():
        uncond, cond = model(torch.cat([x, x]), torch.full((2,), t), prompt).chunk(2)
        x = x - (uncond + 2 * (cond - uncond)) / STEPS
    return x


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    return tune(transformer(depth=3), sample, steps=[4, 6], **QUICK)


def test_the_best_is_not_worse_than_any_fixed_method(tuning):
    assert [point.computed for point in tuning.frontier] == [4, 6]
    for point in tuning.frontier:
        assert point.fixed is not None and point.calibrated >= point.fixed[1]
        assert point.psnr is not None and point.psnr > 10 and point.fixed[2] is not None
        assert point.share == pytest.approx(point.computed / STEPS, abs=0.2)
    few, more = tuning.frontier
    assert more.calibrated >= few.calibrated
    assert few.psnr > tune_fixed(4)  # on runs that nothing was tuned with


def tune_fixed(computed: int) -> float:
    """TaylorSeer with a warm-up of 3, evenly: decibels on the validation runs."""
    interval = -(-(STEPS - 3) // (computed - 3))
    cache = {"method": "taylorseer", "cache_interval": interval, "cache_identifiers": ["block"]}
    torch._dynamo.reset()
    compiled = torch.compile(transformer(depth=3), backend="cached_inductor", options={"cache": cache, **EAGER})
    found = []
    for run in (2, 3):
        expected, images = sample(transformer(depth=3), run), sample(compiled, run)
        error = (images - expected).square().mean()
        found.append(10 * torch.log10((expected.max() - expected.min()) ** 2 / error))
    return float(sum(found) / 2)


def test_what_was_found_is_what_the_config_does(tuning):
    """The decibels and FLOPs in the table are those of ``options["cache"]``; one graph, no break, no recompile."""
    point = tuning.frontier[0]
    with count_compiles() as counts:
        compiled = torch.compile(
            transformer(depth=3), backend="cached_inductor", fullgraph=True,
            options={"cache": tuning.config(steps=4), "num_inference_steps": STEPS, **EAGER},
        )  # fmt: skip
        values = []
        for run in (2, 3):
            expected, found = sample(transformer(depth=3), run), sample(compiled, run)
            error = (found - expected).square().mean()
            values.append(10 * torch.log10((expected.max() - expected.min()) ** 2 / error))
    assert (counts.graphs, counts.graph_breaks, counts.recompiles) == (1, 0, 0)
    assert float(sum(values) / 2) == pytest.approx(point.psnr, abs=0.05)
    summary = cachepass.summary(compiled)
    marks = "".join("#" if step in point.config.schedule.computed else "." for step in range(STEPS))
    assert summary.last_runs == {"default": {"tuned": marks}}
    assert summary.flops / summary.plain_flops == pytest.approx(point.share, rel=1e-6)
    assert summary.planned_bytes == point.kept_bytes


@pytest.mark.parametrize(
    ("loop", "states"), [(guided, ("cond", "uncond")), (batched, ("default",))], ids=["two calls", "batch"]
)
def test_guidance(loop, states):
    tuning = tune(transformer(cross=True), loop, steps=4, **QUICK)
    (point,) = tuning.frontier
    assert point.fixed is not None and point.calibrated >= point.fixed[1]
    torch._dynamo.reset()
    options = {"cache": tuning.config(), "num_inference_steps": STEPS, **EAGER}
    compiled = torch.compile(transformer(cross=True), backend="cached_inductor", options=options)
    loop(compiled, 2)
    summary = cachepass.summary(compiled)
    assert set(summary.last_runs) == set(states)
    assert all(marks["tuned"].count("#") == 4 for marks in summary.last_runs.values())


@pytest.mark.parametrize("name", ["DiT", "Flux"])
def test_a_pipeline_in_one_line(name):
    case = PIPELINES[name]
    pipe = case.make()
    prompts = [case.inputs(), case.inputs()]
    more = {"num_inference_steps": 8, "return_dict": False}
    how = {"options": EAGER, "progress": False, "tries": 2, "runs": 1, "validate": 1, "cut": Blocks()}
    tuning = tune_pipeline(pipe, prompts, steps=4, tuning=how, **more)
    (point,) = tuning.frontier
    assert point.psnr is not None and point.computed <= 4
    uncached = case.run(pipe, 8, seed=1)
    enable_cache(pipe, tuning.config(), num_inference_steps=8, **EAGER)
    cached = case.run(pipe, 8, seed=1)
    assert cachepass.summary(pipe).predicted["tuned"] == (8 - point.computed) * case.calls
    error = float((cached - uncached).norm() / uncached.norm())
    assert 0 < error < 0.5
    with pytest.raises(OptionError, match="a cache is on"):
        tune_pipeline(pipe, prompts, steps=4)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_tuning_survives_its_file(tuning, tmp_path):
    tuning.save(tmp_path / "tuned.json")
    loaded = Tuning.load(tmp_path / "tuned.json")
    assert loaded == tuning and loaded.config(steps=4) == tuning.config(steps=4)
    tuning.config(steps=4).save(tmp_path / "config.json")
    results = []
    for cache in (tuning.config(steps=4), loaded.config(steps=4), str(tmp_path / "config.json")):
        torch._dynamo.reset()
        compiled = torch.compile(transformer(depth=3), backend="cached_inductor", options={"cache": cache, **EAGER})
        results.append(sample(compiled, 5))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_file_with_one_config_is_a_cache(tuning, tmp_path):
    one = Tuning(tuning.model, tuning.steps, tuning.frontier[:1])
    one.save(tmp_path / "one.json")
    tuning.save(tmp_path / "two.json")
    parsed = cachepass.options.parse_options({"cache": str(tmp_path / "one.json")})
    assert parsed.cache == tuning.config(steps=4)
    with pytest.raises(ConfigError, match=r"2 configs, for 4, 6 computed steps[\s\S]*Tuning.load"):
        cachepass.options.parse_options({"cache": str(tmp_path / "two.json")})


def broken(text: str, how: str) -> str:
    saved = json.loads(text)
    if how == "truncated":
        return text[: len(text) // 2]
    if how == "schema":
        return json.dumps(saved | {"schema": 99})
    if how == "other":
        return json.dumps({"schema": 1, "recipe": {}})
    del saved["tuning"]["frontier"][0]["share"]
    return json.dumps(saved)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "cannot be read[\\s\\S]*copy it again, or tune again"),
        ("schema", "schema 99 is not 1[\\s\\S]*save it anew"),
        ("other", "no tuning[\\s\\S]*Tuning.save"),
        ("field", "not whole[\\s\\S]*tune again"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_to_do(tuning, tmp_path, how, words):
    path = tmp_path / "tuned.json"
    tuning.save(path)
    path.write_text(broken(path.read_text(), how))
    with pytest.raises((ConfigError, OptionError), match=words):
        Tuning.load(path)


def test_another_model_is_an_error(tuning):
    other = torch.compile(transformer(depth=2), backend="cached_inductor", options={"cache": tuning.config(), **EAGER})
    with pytest.raises(
        ConfigError, match=r"for Transformer \(3 blocks[\s\S]*this model has 2 blocks[\s\S]*cachepass.tune"
    ):
        sample(other, 0)


def test_other_weights_and_adapters_are_the_same_model(tuning):
    compiled = torch.compile(
        transformer(depth=3, seed=5), backend="cached_inductor", options={"cache": tuning.config(), **EAGER}
    )
    sample(compiled, 0)
    assert cachepass.summary(compiled).predicted["tuned"] == STEPS - 6


def test_another_number_of_steps_is_mapped_and_said(tuning):
    for known in (True, False):
        torch._dynamo.reset()
        options = {"cache": tuning.config(steps=4), **EAGER, **({"num_inference_steps": 18} if known else {})}
        compiled = torch.compile(transformer(depth=3), backend="cached_inductor", options=options)
        with pytest.warns(cachepass.CachepassWarning, match=r"tuned for runs of 12 steps, and used for one of 18"):
            found = sample(compiled, 4, steps=18)
            sample(compiled, 4, steps=18)
        assert cachepass.summary(compiled).last_runs["default"]["tuned"].count("#") == 4
        expected = sample(transformer(depth=3), 4, steps=18)
        error = float((found - expected).norm() / expected.norm())
        assert error < 0.1


# ---- budgets --------------------------------------------------------------------------------------------------------


def test_a_quality_is_reached_with_as_few_steps_as_can_be():
    tuning = tune(transformer(depth=3), sample, quality=35.0, cut=Blocks(), **QUICK)
    (point,) = tuning.frontier
    assert point.psnr is not None and point.psnr >= 35 and point.calibrated >= 35
    assert 1 < point.computed < STEPS
    assert tuning.config(quality=35.0) == point.config
    seen = []

    def good(found, uncached):
        seen.append(type(found["x"]))
        found, uncached = found["x"], uncached["x"]
        return float((found - uncached).norm() / uncached.norm()) < 0.02

    def wrapped(model, run):
        return Result(x=sample(model, run))

    (other,) = tune(transformer(depth=3), wrapped, quality=good, cut=Blocks(), **QUICK).frontier
    assert set(seen) == {torch.Tensor} and other.computed < STEPS
    unreachable = tune(transformer(depth=3), sample, quality=149.0, cut=Blocks(), **QUICK)
    assert "no number of computed steps" in unreachable.notes[-1]
    assert unreachable.frontier[0].computed == STEPS - 1


def test_bytes_are_a_budget_too():
    whole = tune(transformer(depth=3), sample, steps=5, cut=Blocks(), **QUICK).frontier[0]
    slot = whole.kept_bytes // whole.config.forecast.form.history
    less = tune(transformer(depth=3), sample, steps=5, cut=Blocks(), max_bytes=2 * slot, **QUICK).frontier[0]
    assert less.kept_bytes <= 2 * slot and less.config.forecast.form.history <= 2
    with pytest.raises(OptionError, match=r"max_bytes: one output takes"):
        tune(transformer(depth=3), sample, steps=5, cut=Blocks(), max_bytes=slot - 1, **QUICK)


def test_a_cut_and_forecasts_of_ones_own():
    cut = Modules("attention")
    tuning = tune(transformer(), sample, steps=5, cut=cut, forecasts=[Taylor(1)], runs=1, validate=0, **QUICK)
    (point,) = tuning.frontier
    assert point.config.cut == cut and point.psnr is None
    assert point.fixed is not None and point.fixed[0].endswith("taylor(1)")
    assert isinstance(tuning.config().forecast, cachepass.forecast.Fitted | Taylor | Reuse)


def test_a_model_without_blocks_is_cut_where_it_can_be():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Transformer(depth=1).blocks[0].attn

        def forward(self, x, timestep):
            return x + self.attention(x) * torch.cos(timestep / 1000).view(-1, 1, 1)

    torch.manual_seed(0)
    tuning = tune(Flat().eval().requires_grad_(False), sample, steps=5, runs=1, validate=0, **QUICK)
    assert isinstance(tuning.config().cut, Modules)
    assert any("has no cut blocks" in note for note in tuning.notes)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_sampler_that_is_not_deterministic_is_found_out():
    generator = torch.Generator().manual_seed(0)

    def noisy(model, run):
        return sample(model, run) + 0.1 * torch.randn(2, 4, 8, generator=generator)

    with pytest.raises(OptionError, match=r"two uncached runs of one seed differ[\s\S]*seeds with run"):
        tune(transformer(), noisy, steps=5, **QUICK)


def test_random_numbers_of_the_default_generator_are_those_of_the_run():
    def loop(model, run):
        return sample(model, run) + 0.1 * torch.randn(2, 4, 8)

    before = torch.random.get_rng_state()
    assert tune(transformer(), loop, steps=5, cut=Blocks(), **QUICK).frontier[0].calibrated > 10
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give steps or quality"),
        ({"steps": 5, "quality": 30.0}, "give steps or quality"),
        ({"steps": 0}, "0 computed steps"),
        ({"steps": []}, "no number of steps"),
        ({"steps": 2.5}, "computed steps"),
        ({"steps": STEPS}, "nothing is left to save"),
        ({"steps": 5, "runs": 0}, "one run at least"),
        ({"steps": 5, "num_inference_steps": 30}, f"a run has {STEPS} steps"),
    ],
)
def test_budgets_that_make_no_sense(given, words):
    with pytest.raises(OptionError, match=words):
        tune(transformer(), sample, **{"cut": Blocks(), **QUICK, **given})


def test_a_loop_of_one_argument():
    with pytest.raises(OptionError, match=r"number of a run[\s\S]*def sample\(model, run\)"):
        tune(transformer(), lambda model: sample(model, 0), steps=5, **QUICK)  # pyright: ignore


def test_a_loop_that_does_the_same_in_every_run_is_told():
    with pytest.warns(cachepass.CachepassWarning, match="the same result for all runs"):
        found = tune(transformer(), lambda model, _run: sample(model, 0), steps=5, cut=Blocks(), **QUICK)
    assert sum("the same result" in note for note in found.notes) == 1


def test_a_model_that_is_compiled():
    wrapped = torch.compile(transformer(), backend="eager")
    assert tune(wrapped, sample, steps=5, cut=Blocks(), runs=1, validate=0, **QUICK).config().steps == STEPS
    in_place = transformer()
    in_place.compile(backend="eager")
    with pytest.raises(OptionError, match="compiled in place"):
        tune(in_place, sample, steps=5, **QUICK)


def test_the_fewest_steps():
    (point,) = tune(transformer(), sample, steps=1, cut=Blocks(), **QUICK).frontier
    assert point.config.schedule.computed == (0,)


def test_a_loop_that_does_not_call_the_model():
    with pytest.raises(OptionError, match="must call the model that it is given"):
        tune(transformer(), lambda _model, _run: torch.zeros(2), steps=5, **QUICK)


def test_nothing_with_this_name_was_tuned():
    with pytest.raises(ConfigError, match=r"nothing was tuned[\s\S]*cachepass.tune"):
        cachepass.options.parse_options({"cache": "tuned"})


def test_control_c_keeps_what_was_found():
    calls = 0

    def until(most):
        def loop(model, run):
            nonlocal calls
            calls += 1
            if calls > most:
                raise KeyboardInterrupt
            return sample(model, run)

        return loop

    tuning = tune(transformer(), until(30), steps=[4, 6], cut=Blocks(), **QUICK)
    assert "interrupted" in tuning.notes[-1]
    assert [point.computed for point in tuning.frontier] == [4]
    assert len(tuning.config().schedule.computed) == 4
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        tune(transformer(), until(3), steps=4, cut=Blocks(), **QUICK)


# ---- looking --------------------------------------------------------------------------------------------------------


def test_a_config_says_what_it_is_for(tuning):
    text = str(tuning.config(steps=4))
    assert text.startswith("tuned(4 of 12), for Transformer (3 blocks, 3 attentions, 3 MLPs), ")
    assert "dB\ncut: blocks; key steps 0, " in text and "of 12; fitted weights of the last" in text


def test_the_table(tuning):
    text = str(tuning)
    assert "4 of 12" in text and "best fixed method" in text and "Transformer, runs of 12 steps" in text


MODEL = """
import torch
from small_models import transformer
from test_tune import sample

def make():
    return transformer(), sample
"""


def test_the_command_writes_a_file(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    out, page = tmp_path / "tuned.json", tmp_path / "tuned.html"
    arguments = ["tune", f"{tmp_path / 'model.py'}:make", "--steps", "5", "--tries", "2", "--lowering", "eager"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out), "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert "5 of 12" in result.output and f"wrote {out}" in result.output
    assert cachepass.options.parse_options({"cache": str(out)}).cache == Tuning.load(out).config()
    assert "5 of 12" in page.read_text()


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_page_in_a_browser(tuning, tmp_path):
    from browser import browser

    tuning.to_html(tmp_path / "tuned.html")
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "tuned.html")
        assert [len(row.find_elements("css selector", "span")) for row in page.all(".steps")] == [STEPS, STEPS]
        assert len(page.all(".steps .computed")) == 4 + 6
        assert len(page.all(".frontier circle")) == 6
