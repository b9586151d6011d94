"""What all tests share: Dynamo's caches emptied between tests, quiet diffusers, no gradients; the sweep's table."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from covering import covering
from hypothesis import HealthCheck, settings
from zoo import ALL

# Workers inherit these: memory that tracing frees is kept for the next test, which took an eighth of the time.
os.environ |= {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}
os.environ["MALLOC_ARENA_MAX"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads would only wait for each other
    torch.set_num_threads(1)
settings.register_profile("cachepass", suppress_health_check=[HealthCheck.too_slow])  # machines differ in speed
settings.load_profile("cachepass")
gc.set_threshold(50_000, 20, 50)  # tracing makes many objects; collecting among them took a twentieth of the time


def pytest_collection_modifyitems(config, items):
    """Leave out what no ``covering`` mark asks for."""
    cases, marks = {}, {}
    for item in items:
        if (mark := item.get_closest_marker("covering")) and not ALL:
            test = item.parent, item.originalname
            cases.setdefault(test, {})[item] = {name: repr(value) for name, value in item.callspec.params.items()}
            marks[test] = mark
    kept = {item for test, mark in marks.items() for item in covering(cases[test], *mark.args, **mark.kwargs)}
    left_out = {item for test in cases for item in cases[test]} - kept
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish():
    """What was imported stays; no collection needs to look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # what torch never lets go of; looking at it again and again took a tenth of the time


@pytest.fixture(autouse=True, scope="session")
def _quiet_diffusers():
    import diffusers

    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture
def sweep(record_property, request):
    """``sweep(method, error)``: what the line of the model (the test's ``name``) says of a method."""
    return lambda method, error: record_property("sweep", [request.node.callspec.params["name"], method, error])


def pytest_terminal_summary(terminalreporter):
    """One line per model: the largest relative error of each method against its oracle."""
    lines: dict[str, dict[str, float]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "sweep":
                model, method, error = value
                lines.setdefault(model, {})[method] = error
    if lines:
        terminalreporter.section("parity with the oracles, largest relative error", sep="-")
        for model, errors in sorted(lines.items()):
            cells = (f"{method} {error:.0e}" for method, error in sorted(errors.items()))
            terminalreporter.write_line(f"{model}: {', '.join(cells)}")
