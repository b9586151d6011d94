"""The command line, on the trained model (few digits, few steps, eager lowering)."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from zoo import ALL

import cachepass
from cachepass.cli import main


@pytest.mark.skipif(not ALL, reason="`.ci/newcomer` runs the demo and looks at its files")
def test_demo_writes_the_table_and_the_contact_sheet(tmp_path):
    arguments = ["demo", "--images", "5", "--steps", "50", "--lowering", "eager", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "digits.json").read_text())
    rows = {row["method"]: row for row in json.loads(result.stdout)}
    assert (tmp_path / "digits.png").stat().st_size > 2000
    uncached = rows.pop("uncached")
    assert (uncached["computed"], uncached["predicted"], uncached["cache_bytes"]) == (50, 0, 0)
    assert uncached["accuracy_percent"] >= 80
    assert len(rows) == 4
    for row in rows.values():
        assert row["computed"] + row["predicted"] == 50
        assert row["predicted"] >= 4
        assert row["psnr_db"] > 10
        assert row["cache_bytes"] > 0


def test_demo_without_its_models_says_where_they_are(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--models", str(tmp_path)])
    assert result.exit_code == 1
    assert "live in the repository" in result.output


@pytest.mark.parametrize("arguments", [["--version"], ["demo", "--help"]])
def test_help(arguments):
    assert CliRunner().invoke(main, arguments).exit_code == 0


def test_doctor_finds_nothing_wrong_here():
    result = CliRunner().invoke(main, ["doctor", "--json"], catch_exceptions=False)
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    if torch.version.cuda and not torch.cuda.is_available():  # which is worth a warning
        assert checks.pop("device")["status"] == "warning"
    assert result.exit_code == 0, result.output
    assert all(check["status"] == "ok" and check["found"] and not check["fix"] for check in checks.values())
    assert "2 of 5 steps predicted" in checks["a cached model on cpu"]["found"]


def test_doctor_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch.__version__", "2.9.1")
    monkeypatch.setattr("torch.compiler.list_backends", lambda **_: ["inductor"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(main, ["doctor", "--no-compile", "--json"])
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert {name for name, check in checks.items() if check["status"] == "error"} == {
        "torch",
        "backend",
        "C++ compiler",
        "Inductor's cache",
    }
    assert all(check["fix"] for check in checks.values() if check["status"] == "error")
    assert "no-such-compiler" in checks["C++ compiler"]["found"]
    table = CliRunner().invoke(main, ["doctor", "--no-compile"])
    assert table.exit_code == 1 and "error" in table.output


def test_doctor_tells_of_a_trial_that_fails(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernels today\nand more")

    monkeypatch.setattr("cachepass.inspect.doctor._run", fail)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    trial = next(check for check in json.loads(result.stdout) if check["name"] == "a cached model on cpu")
    assert (result.exit_code, trial["status"], trial["found"]) == (1, "error", "RuntimeError: no kernels today")


MODEL = """
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
    def forward(self, x, timestep):
        return x + self.attn(x) * timestep

def make():
    return Model().eval(), {"x": torch.ones(1, 4, 8), "timestep": torch.ones(1)}
"""


@pytest.fixture
def model_file(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    return f"{tmp_path / 'model.py'}:make"


def test_explain(model_file):
    result = CliRunner().invoke(main, ["explain", model_file], catch_exceptions=False)
    assert result.exit_code == 0
    assert "attn" in result.output and "cache per context: 128 B" in result.output
    settings = ["--cache", '{"method": "taylorseer", "cache_interval": 2}', "--diff", "predict"]
    diff = CliRunner().invoke(main, ["explain", model_file, *settings])
    assert diff.exit_code == 0
    attention = ("-bmm", "-_scaled_dot_product")  # before torch 2.14, and since
    assert any(line.startswith(attention) for line in diff.output.splitlines()), diff.output
    found = json.loads(CliRunner().invoke(main, ["explain", model_file, "--json"]).output)
    assert [(cut["region"], cut["slots"], cut["bytes"]) for cut in found["cuts"]] == [("attn", 2, 128)]
    assert found["operations"]["predict"] < found["operations"]["compute"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: [m.replace(":make", ":made")], "has no 'made'"),
    (lambda m: [m.replace("model.py", "none.py")], "is not FILE.py:FUNCTION"),
    (lambda m: [m, "--cache", "taylor"], "there is no method"),
    (lambda m: [m, "--cache", '{"method": '], "not JSON"),
    (lambda m: [m, "--diff", "predicted"], "there is no phase"),
])  # fmt: skip
def test_explain_says_what_is_wrong(model_file, change, message):
    result = CliRunner().invoke(main, ["explain", *change(model_file)])
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


@pytest.mark.inductor
def test_bench(model_file):
    settings = [
        "--cache",
        '{"method": "taylorseer", "cache_interval": 2, "disable_cache_before_step": 1}',
        "--cache",
        "invariant",
        "--steps",
        "6",
        "--rounds",
        "2",
        "--lowering",
        "eager",
    ]
    with pytest.warns(cachepass.CachepassWarning, match="nothing but parameters"):
        result = CliRunner().invoke(main, ["bench", model_file, *settings, "--json"], catch_exceptions=False)
    plain, taylorseer, invariant = json.loads(result.stdout)
    assert [row["name"] for row in (plain, taylorseer, invariant)] == [
        "plain Inductor",
        "taylorseer(cache_interval=2, disable_cache_before_step=1)",
        "invariant",
    ]
    assert (plain["steps"], taylorseer["steps"], invariant["steps"]) == ([6, 0], [3, 3], [6, 0])
    assert plain["speedup"] == 1.0 and plain["predicted"] is None and plain["cache_bytes"] == 0
    assert taylorseer["cache_bytes"] == 128
    for row in (plain, taylorseer, invariant):
        assert row["run"] > row["computed"] > 0 and row["compile"] >= 0


@pytest.mark.inductor
def test_bench_prints_a_table(model_file):
    result = CliRunner().invoke(main, ["bench", model_file, "--steps", "6", "--rounds", "1"], catch_exceptions=False)
    names = [line.split("  ")[0].strip() for line in result.stdout.splitlines()]
    assert names[-2:] == ["plain Inductor", "taylorseer"] and "predicted ms" in result.stdout


def test_bench_without_a_timestep(tmp_path):
    (tmp_path / "model.py").write_text(MODEL.replace("timestep", "now"))
    result = CliRunner().invoke(main, ["bench", f"{tmp_path / 'model.py'}:make"])
    assert result.exit_code == 1 and "no input is called timestep" in result.output
