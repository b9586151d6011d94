"""``CACHEPASS_DUMP``: the graph after each pass, as numbered files."""

from __future__ import annotations

import pytest
import torch
from small_models import calls, transformer

import cachepass

CACHE = {
    "method": "taylorseer",
    "cache_identifiers": ["attention"],
    "cache_interval": 3,
    "disable_cache_before_step": 1,
}


def run(steps=4):
    torch._dynamo.reset()
    model = torch.compile(
        transformer(),
        backend="cached_inductor",
        fullgraph=True,
        options={"cache": CACHE, "lowering": "eager", "num_inference_steps": steps},
    )
    for call in calls(steps):
        model(*call)


def test_every_pass_is_written_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPASS_DUMP", str(tmp_path / "graphs"))
    run()
    files = sorted((tmp_path / "graphs").iterdir())
    names = [path.name for path in files]
    assert [name[4:-4] for name in names] == [
        "dynamo",
        "annotated",
        "aten",
        "hoisted",
        "canonical",
        "compute",
        "predict",
    ]
    assert [name[:3] for name in names] == [f"{number:03d}" for number in range(7)]
    texts = {path.name[4:-4]: path.read_text() for path in files}
    assert "cachepass.cut" in texts["annotated"] and "cachepass.cut" not in texts["dynamo"]
    assert "aten.addmm" in texts["aten"] and "blocks.0.attn" in texts["aten"]
    assert "cond(predict[" in texts["canonical"]
    assert "scaled_dot_product" in texts["compute"] and "scaled_dot_product" not in texts["predict"]
    assert "history[blocks.0.attn" in texts["predict"]
    run()
    assert len(list((tmp_path / "graphs").iterdir())) == 14
    assert files[0].read_text() == texts["dynamo"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHEPASS_DUMP", str(tmp_path / "file"))
    with pytest.raises(cachepass.OptionError, match="CACHEPASS_DUMP"):
        run()


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv("CACHEPASS_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    run()
    assert list(tmp_path.iterdir()) == []
