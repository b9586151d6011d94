"""``compare``: a sampling loop with several caches and without, its table, JSON and page."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from pipelines import PIPELINES
from small_models import transformer

import cachepass
from cachepass import TaylorSeerCacheConfig, compare
from cachepass.cli import main
from cachepass.inspect.results import as_pictures, as_tensor, psnr

STEPS = 9
EVERY = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)
FEW = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=5)
EAGER = {"lowering": "eager", "num_inference_steps": STEPS}


def sample(model):
    """Two pictures of 4 x 8 pixels."""
    x = torch.randn(2, 4, 8)
    for step in range(STEPS):
        x = x - 0.1 * model(x, torch.full((2,), 1000.0 - 100 * step))
    return x.unsqueeze(1).sigmoid()


def test_each_config_against_none():
    model = transformer()
    found = compare(model, sample, [EVERY, FEW], options=EAGER, progress=False)
    uncached, every, few = found.rows
    assert [row.name for row in found.rows] == ["uncached", EVERY.label, FEW.label]
    assert (uncached.error, uncached.predicted, uncached.flops, uncached.speedup) == (0.0, 0.0, 1.0, 1.0)
    assert (every.predicted, few.predicted) == (5 / 9, 2 / 9)  # all but 0, 1, 3 and 6; 6 and 8
    assert 0 < few.error < every.error < 1
    assert every.psnr < few.psnr < float("inf") == uncached.psnr
    assert every.flops < few.flops < 1
    assert every.kept_bytes > 0
    assert all(row.seconds > 0 and row.compile_seconds >= 0 for row in found.rows)
    assert few.best or every.best
    assert "PSNR" in str(found)


def test_results_are_those_of_the_configs_alone():
    model = transformer()
    found = compare(model, sample, [EVERY], options=EAGER, progress=False)
    torch._dynamo.reset()
    alone = torch.compile(transformer(), backend="cached_inductor", options={"cache": EVERY, **EAGER})
    torch.manual_seed(0)
    assert torch.equal(found.results[EVERY.label], sample(alone))


def test_more_configs_than_dynamo_captures():
    caches = [TaylorSeerCacheConfig(cache_interval=n, disable_cache_before_step=1) for n in range(2, 12)]
    found = compare(transformer(), sample, caches, options=EAGER, rounds=1, progress=False)
    assert all(row.failed is None for row in found.rows) and len(found.rows) == 11


def test_what_cannot_be_used_has_a_row_that_says_why():
    wrong = TaylorSeerCacheConfig(cache_identifiers=["nothing"])
    found = compare(transformer(), sample, [wrong, EVERY], options=EAGER, rounds=1, progress=False)
    assert "matches no module" in found.rows[1].failed and found.rows[1].seconds is None
    assert found.rows[2].failed is None
    assert "matches no module" in str(found) and "matches no module" in found.to_html()


def test_the_fastest_that_is_good_enough(tmp_path):
    found = compare(transformer(), sample, [EVERY, FEW], options=EAGER, rounds=1, progress=False)
    few = found.rows[2]
    assert found.fastest(psnr=few.psnr) is few
    assert found.fastest(error=1.0).config in (EVERY, FEW)
    with pytest.raises(cachepass.OptionError, match="no config is as good as that"):
        found.fastest(psnr=500.0)
    few.config.save(tmp_path / "few.json")
    (row,) = compare(transformer(), sample, [str(tmp_path / "few.json")], options=EAGER, progress=False).rows[1:]
    assert row.config == FEW and row.error == few.error


def test_a_loop_that_is_not_repeatable_is_refused():
    calls = iter(range(100))

    def other(model):
        return sample(model) + next(calls)

    with pytest.raises(cachepass.OptionError, match="returns another result each time"):
        compare(transformer(), other, [EVERY], options=EAGER, progress=False)


def test_pipelines():
    case = PIPELINES["Flux"]
    pipe = case.make()
    own = pipe.transformer
    cache = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2}
    found = compare(
        pipe, lambda pipe: case.run(pipe, 6), [cache], options={"lowering": "eager"}, rounds=1, progress=False
    )
    assert pipe.transformer is own
    assert found.rows[1].failed is None and 0 < found.rows[1].predicted < 1


def test_the_page_and_the_json_hold_all_rows():
    found = compare(transformer(), sample, [EVERY, FEW], options=EAGER, rounds=1, progress=False)
    page = found.to_html()
    assert page.count("<img") == 6 and EVERY.label in page and "http" not in page.replace("http-equiv", "")
    rows = json.loads(json.dumps(found.as_dict()))
    assert [row["name"] for row in rows] == [row.name for row in found.rows]
    assert rows[0]["psnr"] is None and cachepass.TaylorSeerCacheConfig.from_dict(rows[1]["config"]) == EVERY


def test_results_as_numbers_and_pictures():
    from PIL import Image

    image = Image.new("RGB", (3, 2), (255, 0, 51))
    assert as_tensor([image]).shape == (1, 2, 3, 3) and as_tensor(image)[0, 0].tolist() == pytest.approx([1, 0, 0.2])
    video = torch.rand(1, 3, 5, 4, 6)  # five frames
    assert [picture.size for picture in as_pictures(video)] == [(6, 4)]
    assert as_pictures(torch.rand(2, 7)) == []
    assert psnr(torch.tensor([0.0, 0.9]), torch.tensor([0.0, 1.0])) == pytest.approx(23.0103, abs=1e-3)


MODEL = """
import torch
from small_models import transformer
from test_compare import sample

def make():
    return transformer(), sample

def alone():
    return transformer()
"""


def test_the_command(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    EVERY.save(tmp_path / "every.json")
    source = f"{tmp_path / 'model.py'}:make"
    given = ["compare", source, "--cache", str(tmp_path / "every.json"), "--lowering", "eager", "--steps", str(STEPS)]
    result = CliRunner().invoke(main, [*given, "--json", "--html", str(tmp_path / "page.html")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    uncached, row = json.loads(result.stdout)
    assert row["predicted"] == pytest.approx(5 / 9) and uncached["name"] == "uncached"
    assert "<table" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("command", ["compare", "explain", "bench"])
def test_a_factory_that_returns_a_model_alone(command, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    result = CliRunner().invoke(main, [command, f"{tmp_path / 'model.py'}:alone"])
    assert result.exit_code == 1 and "FUNCTION returned (Transformer); it must return the model and" in result.output
