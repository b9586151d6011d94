"""The command line, on the trained model (few digits, few steps, eager lowering)."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from cachepass.inspect.cli import main


def test_demo_writes_the_table_and_the_contact_sheet(tmp_path):
    arguments = ["demo", "--images", "10", "--steps", "12", "--lowering", "eager", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "PSNR" in result.output
    rows = {row["method"]: row for row in json.loads((tmp_path / "digits.json").read_text())}
    assert (tmp_path / "digits.png").stat().st_size > 2000
    uncached = rows.pop("uncached")
    assert (uncached["computed"], uncached["predicted"], uncached["cache_bytes"]) == (12, 0, 0)
    assert uncached["accuracy_percent"] >= 80
    assert len(rows) == 6
    for row in rows.values():
        assert row["computed"] + row["predicted"] == 12
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
