"""Outputs of the blocks that the site executes, written behind them for those who read the pages as files.

    python docs/outputs.py            write them anew
    python docs/outputs.py --check    exit with 1 where a page's outputs are others

What differs from one call to the next (seconds, temporary folders) is written as ``...``. The site leaves them out: it
prints its own (``hooks.py``).
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from hooks import BEGIN, END, EXECUTED, WRITTEN

DOCS = Path(__file__).parent
_VARYING = [
    (re.compile(r"\d+\.\d+ s\b"), "... s"),
    (re.compile(r"/tmp/\S+"), "/tmp/..."),
    (re.compile(r"of at most \d+\.\d+ GiB"), "of at most ... GiB"),  # a share of the machine's memory
]
_NUMBER = re.compile(r"\d+\.\d+(?:e[-+]\d+)?")


def with_outputs(page: str) -> str:
    """A page with what its blocks print."""
    page = WRITTEN.sub("", page)
    sessions: dict[str, dict[str, Any]] = {}
    parts, end = [], 0
    for block in EXECUTED.finditer(page):
        indent, attributes, code = block.groups()
        known = dict(re.findall(r'(\w+)="([^"]*)"', attributes))
        text = _run(_dedented(code, indent), sessions.setdefault(known.get("session", str(block.start())), {}))
        parts.append(page[end : block.end()])
        end = block.end()
        if known.get("source") and known.get("result") and text and not indent:
            parts.append(f"\n{BEGIN}\n```{known['result']}\n{text.rstrip()}\n```\n{END}\n")
    return "".join([*parts, page[end:]])


def _dedented(code: str, indent: str) -> str:
    return "\n".join(line.removeprefix(indent) for line in code.splitlines())


def _run(code: str, scope: dict[str, Any]) -> str:
    scope.setdefault("__name__", "__main__")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "<page>", "exec"), scope)
    text = printed.getvalue()
    for varying, shown in _VARYING:
        text = varying.sub(shown, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _roughly(page: str) -> str:
    """Two digits of each number, and of rounding errors none: kernels differ from machine to machine."""

    def rough(match: re.Match[str]) -> str:
        return f"{float(match[0]):.1e}" if float(match[0]) > 1e-4 else "0"

    return WRITTEN.sub(lambda output: _NUMBER.sub(rough, output[0]), page)


def main(check: bool) -> int:
    for folder in (DOCS, DOCS.parent / "examples"):
        sys.path.insert(0, str(folder))
    logging.getLogger("torch").setLevel(logging.ERROR)
    others = []
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text()
        if 'result="' in page and "reference" not in path.parts:
            written = with_outputs(page)
            if (_roughly(written) != _roughly(page)) if check else written != page:
                others.append(str(path.relative_to(DOCS)))
                if not check:
                    path.write_text(written)
    if check and others:
        print(f"outputs of {', '.join(others)} are others: python docs/outputs.py writes them anew")
    return int(check and bool(others))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
