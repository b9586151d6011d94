"""The documentation: every message has an entry, code blocks are Python, links lead somewhere, the site builds."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cachepass

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ERRORS = {name for name in cachepass.__all__ if name.endswith("Error")}
_FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def literals(node: ast.expr) -> list[str]:
    """The fixed parts of a message."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.BinOp):
        return literals(node.left) + literals(node.right)
    return []


def message_of(call: ast.Call) -> ast.expr | None:
    """The message argument of a call that makes an error or a warning of cachepass."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in {*ERRORS, "TypeError", "warn", "_warn"}:
        return call.args[0] if call.args else None
    return call.args[1] if name in {"fail", "_fail", "warn_once"} and len(call.args) > 1 else None


def messages() -> list[tuple[str, str]]:
    """``(where, phrase)`` of every message in the package: the longest fixed part, up to 60 characters."""
    found = []
    for path in sorted((ROOT / "cachepass").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            message = message_of(node) if isinstance(node, ast.Call) else None
            if path.name == "review.py" and isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
                message = node.value.elts[1]
            parts = literals(message) if message is not None else []
            phrase = max(parts, key=len).strip()[:60].strip() if parts else ""
            if len(phrase) > 3:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", phrase))
    return found


def plain(markdown: str) -> str:
    return " ".join(markdown.split())


def test_every_message_is_explained():
    page = plain((DOCS / "troubleshooting.md").read_text())
    found = messages()
    assert len(found) > 60
    missing = [f"{where}: {phrase!r}" for where, phrase in found if plain(phrase) not in page]
    assert not missing, "docs/troubleshooting.md says nothing of\n" + "\n".join(missing)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_class_has_a_section(name):
    assert f"\n## {name}\n" in (DOCS / "troubleshooting.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_compile(page):
    for _, language, _, code in _FENCE.findall(page.read_text()):
        if language == "python" and "--8<--" not in code:
            compile(textwrap.dedent(code), page.name, "exec")


def test_readme_links_resolve():
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    local = [link.split("#")[0] for link in links if not re.match(r"\w+:", link) and not link.startswith("#")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_to_sources_resolve(page):
    """Those that leave docs/, which the site renders as code and does not check."""
    links = re.findall(r"\]\(((?:\.\./)+[^)#\s]*)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_pictures_are_drawn_from_the_data(tmp_path):
    known = json.loads((DOCS / "data" / "curves.json").read_text())
    methods = {point["method"] for point in known["points"]}
    assert methods == {"taylorseer", "pab", "fastercache"}
    assert all(p["computed"] + p["predicted"] == known["settings"]["steps"] for p in known["points"])
    _drawn("curves", [f"{method}-quality" for method in methods], tmp_path)


def test_the_pictures_of_decisions_and_forecasts_are_drawn_from_the_data(tmp_path):
    known = json.loads((DOCS / "data" / "adaptive.json").read_text())
    assert all(0 < p["computed"] < known["settings"]["steps"] for p in known["points"])
    _drawn("adaptive", ["adaptive-methods", "adaptive-forecasts"], tmp_path)


def test_the_picture_of_tuning_is_drawn_from_the_data(tmp_path):
    known = json.loads((DOCS / "data" / "tuned.json").read_text())
    assert [row["budget"] for row in known["rows"]] == [8, 10, 13, 16, 20, 25]
    _drawn("tuned", ["tuned"], tmp_path)
    for count in (10, 16):  # the configs of the demo are those of the data
        shipped = ROOT / "examples" / "digits" / f"tuned-{count}.json"
        assert (tmp_path / f"tuned-{count}.json").read_text() == shipped.read_text()


def _drawn(script, pictures, folder):
    (folder / "data").mkdir()
    shutil.copy(DOCS / "data" / f"{script}.json", folder / "data")
    command = [sys.executable, str(ROOT / "examples" / "digits" / f"{script}.py"), "--draw", "--out", str(folder)]
    drawn = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    for picture in pictures:
        assert (folder / "images" / f"{picture}.svg").stat().st_size > 10_000
        assert (DOCS / "images" / f"{picture}.svg").is_file()


TESTED = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.skipif(not torch.__version__.startswith(TESTED), reason=f"graphs are written by torch {TESTED}")
def test_written_outputs_are_what_the_blocks_print():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "docs/outputs.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout + checked.stderr[-3000:]


def test_the_site_builds_without_warnings(tmp_path):
    missing = [
        name
        for name in ("mkdocs", "material", "mkdocstrings_handlers", "markdown_exec")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        pytest.skip(f"the docs extra is not installed ({', '.join(missing)}): pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CACHEPASS_DOCS": "written"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    tutorial = (tmp_path / "site" / "tutorial.html").read_text()
    assert "history[blocks.0.attn:0][0]" in tutorial
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        assert not fetched, f"{page.name} fetches {fetched}"
