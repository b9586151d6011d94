"""Results as a markdown table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _digits(n: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{n}f}"


COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("subject", "subject", str), ("compute ms", "compute_ms", _digits(1)), ("skip ms", "skip_ms", _digits(1)),
    ("predict ms", "predict_ms", _digits(1)), ("run ms", "run_ms", _digits(0)),
    ("compute / plain", "compute_vs_plain", _digits(3)), ("skip / compute", "skip_vs_compute", _digits(3)),
    ("skip / compiled hooks", "skip_vs_compiled_hooks", _digits(3)),
    ("predict / compiled hooks", "predict_vs_compiled_hooks", _digits(3)), ("run / plain", "run_vs_plain", _digits(3)),
    ("ideal (FLOPs)", "ideal_run_vs_plain", _digits(3)), ("cold compile s", "cold_compile_s", _digits(1)),
    ("/ plain", "cold_compile_vs_plain", _digits(2)), ("graphs", "graphs", str), ("breaks", "graph_breaks", str),
    ("recompiles", "recompiles", str), ("cache MiB", "cache_bytes", lambda value: f"{value / 2**20:.1f}"),
)  # fmt: skip


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for title, rows in results.items():
        # Columns without a value in any row (the phases that a method does not have) are left out.
        columns = [c for c in COLUMNS if any(r[c[1]] is not None for r in rows)]
        lines += [f"**{title}**", "", "| " + " | ".join(c[0] for c in columns) + " |", "|---" * len(columns) + "|"]
        for r in rows:
            cells = ["" if r[key] is None else form(r[key]) for _, key, form in columns]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
