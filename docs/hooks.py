"""What the site's build needs beside mkdocs: links out of docs/, the folders of the examples, tables from data.

The pages link to source files (``../cachepass/backend.py``), which a code host shows and the site does not have: there
the link becomes the file's path, as code.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import cachepass

DOCS = Path(__file__).parent
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)\)")
_FENCE = re.compile(r"^ *(```|~~~)")
BEGIN, END = "<!-- output -->", "<!-- end of output -->"
EXECUTED = re.compile(r'^( *)```python exec="1"([^\n]*)\n(.*?)^\1```\n', re.MULTILINE | re.DOTALL)
WRITTEN = re.compile(rf"\n{BEGIN}\n.*?{END}\n", re.DOTALL)  # by outputs.py


def on_config(config: Any) -> None:  # noqa: ARG001 (mkdocs calls it so)
    """Executed blocks import the examples, and run as fast as one thread allows."""
    for folder in (DOCS, DOCS.parent / "examples"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch").setLevel(logging.ERROR)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links that leave docs/ become plain code; written outputs go, because the blocks are executed here.

    With ``CACHEPASS_DOCS=written`` it is the other way round, for tests: they check what is written by itself.
    """
    if os.environ.get("CACHEPASS_DOCS") == "written" and BEGIN in markdown:
        markdown = EXECUTED.sub(lambda block: f"```python\n{block[3]}```\n" if "source=" in block[2] else "", markdown)
    else:
        markdown = WRITTEN.sub("", markdown)
    folder = (DOCS / page.file.src_uri).parent
    lines, fenced = [], False
    for line in markdown.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        lines.append(line if fenced else _LINK.sub(lambda match: _plain(match, folder), line))
    return "\n".join(lines)


def _plain(match: re.Match[str], folder: Path) -> str:
    target = (folder / match[2]).resolve()
    if target.is_relative_to(DOCS):
        return match[0]
    path = target.relative_to(DOCS.parent.resolve()).as_posix()
    label = match[1].strip("`")
    return f"`{path}`" if path.endswith(label) else f"{label} (`{path}`)"


def curves(method: str) -> str:
    """The measured points of one method as a Markdown table, from data/curves.json."""
    known = json.loads((DOCS / "data" / "curves.json").read_text())
    lines = [
        "| curve | knob | computed | predicted | FLOPs, % of uncached | PSNR dB | accuracy % | cache MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in (point for point in known["points"] if point["method"] == method):
        cells = [
            p["curve"],
            p["knob"],
            p["computed"],
            p["predicted"],
            f"{p['flops_percent']:.1f}",
            f"{p['psnr_db']:.1f}",
            f"{p['accuracy_percent']:.1f}",
            f"{p['cache_bytes'] / 2**20:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def adaptive() -> str:
    """The measured points of data/adaptive.json as a Markdown table."""
    known = json.loads((DOCS / "data" / "adaptive.json").read_text())
    lines = [
        "| method | knob | computed | FLOPs, % of uncached | PSNR dB | accuracy % | cache MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in known["points"]:
        cells = [
            p["curve"],
            f"{p['knob']} {p['value']}",
            p["computed"],
            f"{p['flops_percent']:.1f}",
            f"{p['psnr_db']:.1f}",
            f"{p['accuracy_percent']:.1f}",
            f"{p['cache_bytes'] / 2**20:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def signature(name: str) -> str:
    """A config's fields and their defaults, as a call."""
    fields = dataclasses.fields(getattr(cachepass, name))
    lines = [f"    {field.name}={field.default!r}," for field in fields]
    return "\n".join(["Fields and defaults:", "", "```python", f"{name}(", *lines, ")", "```"])


def how_measured(data: str = "curves") -> str:
    """The settings of the points, as a sentence."""
    known = json.loads((DOCS / "data" / f"{data}.json").read_text())
    s = known["settings"]
    return (
        f"`{known['command']}`: {s['images']} digits, {s['steps']} steps, guidance {s['guidance']:g}, seed "
        f"{s['seed']}, torch {known['versions']['torch']}; the uncached digits' accuracy is "
        f"{known['uncached_accuracy_percent']:.1f} %"
    )
