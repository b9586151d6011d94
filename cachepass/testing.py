"""For tests of models and methods: count compilations, and hold a phase's graph diff against a golden.

```python
from cachepass.testing import assert_graph_diff

def test_predicted_attention_is_gone():
    assert_graph_diff(model, x, timestep, cache="taylorseer", phase="predict", golden='''
-softmax: f32[2, 4, 4] = ...
+history[blocks.0.attn:0][0]: f32[2, 4, 8]
''')
```
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ._torch import compile_statistics, reset_compile_statistics
from .inspect.explain import Explanation, explain


@dataclass
class CompileCounts:
    """What Dynamo did inside a ``count_compiles`` block.

    Attributes:
        graphs: Graphs captured (each is one call of the backend).
        graph_breaks: Places at which a capture was cut.
        recompiles: Captures of a function that had been captured before.
    """

    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0


@contextlib.contextmanager
def count_compiles() -> Iterator[CompileCounts]:
    """Count graphs, graph breaks and recompiles; the numbers are there when the block ends.

    Dynamo's caches are emptied first (``torch._dynamo.reset()``), so the block counts from nothing.
    """
    reset_compile_statistics()
    counts = CompileCounts()
    yield counts
    counts.graphs, counts.graph_breaks, counts.recompiles = compile_statistics()


def graph_diff(
    model: Callable[..., Any],
    *args: Any,
    cache: object,
    phase: str = "predict",
    context: int = 0,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> str:
    """The unified diff from a model's plain graph to that of a phase, less headers and line numbers.

    ``phase`` is ``"compute"``, ``"predict"``, ``"predict:spatial"``, ... or ``"canonical"``.
    """
    explanation: Explanation = explain(model, *args, cache=cache, options=options, **kwargs)
    lines = explanation.diff(phase, context=context).splitlines()[2:]
    return "\n".join(line for line in lines if not line.startswith("@@"))


def assert_graph_diff(
    model: Callable[..., Any],
    *args: Any,
    cache: object,
    golden: str,
    phase: str = "predict",
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Raise AssertionError, showing both, unless ``graph_diff`` prints ``golden`` (outer blank lines ignored)."""
    actual = graph_diff(model, *args, cache=cache, phase=phase, options=options, **kwargs)
    if actual.strip() != golden.strip():
        raise AssertionError(f"the graph diff of phase {phase!r} is\n{actual.strip()}\n\nexpected\n{golden.strip()}")
