"""``benchmarks/gpu.py`` the same way through as on a GPU, with one small case on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from zoo import ALL

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(out: Path) -> str:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--toy", "--no-tests", "--out", str(out)],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def test_the_dry_run_measures_and_estimates(tmp_path):
    out = tmp_path / "toy.json"
    text = run(out)
    (rows,) = json.loads(out.read_text())["results"].values()
    ours = next(row for row in rows if row["subject"].startswith("cachepass"))
    assert ours["predict_ms"] > 0 and ours["predict_estimate_ms"] > 0 and ours["compute_estimate_ms"] > 0
    assert "| predict estimate ms |" in text and ": measured" in text
    if ALL:
        assert ": measured" not in run(out), "what is there is not measured again"
