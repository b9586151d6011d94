"""The oracles of adaptive caching against each other: who runs which model, and that they agree, step by step.

The reference by definition knows nothing of how the peers do it; with a peer's rule as its ``decide`` and ``forecast``
it is that peer, on every model that both run.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peers import (
    WITHOUT,
    NoPeer,
    db_cache,
    first_block_cache,
    mag_cache,
    mixed,
    mixed_threshold,
    reference,
    reuse,
    sea_cache,
)
from residuals import MODELS
from zoo import ALL, relative_error, trajectory

STEPS = 9
LAYERS = 4  # of each list of blocks: some in front of, among and behind the middle ones
MAG: dict[str, Any] = {"threshold": 0.1, "max_skip_steps": 2, "num_inference_steps": STEPS,
                       "mag_ratios": [1.0, 1.05, 0.99, 0.98, 1.02, 0.97, 1.0, 0.96, 1.01]}  # fmt: skip
SEA: dict[str, Any] = {"threshold": 0.5, "steps": STEPS}

KINDS = ["CogVideoXTransformer3DModel", "DiTTransformer2DModel", "FluxTransformer2DModel", "HunyuanDiT2DModel",
         "HunyuanVideoTransformer3DModel", "Lumina2Transformer2DModel", "SD3Transformer2DModel:SD35",
         "WanTransformer3DModel"]  # fmt: skip


def able(method):
    return [name for name in MODELS if name not in WITHOUT[method] and (ALL or name in KINDS[:3])]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Mochi's autocast, on a CPU
        yield


def make(method, name):
    if method == "db":
        pytest.importorskip("cache_dit")
    if method == "mag":
        return mag_cache(name, layers=LAYERS, **MAG)
    if method == "sea":
        return sea_cache(name, layers=LAYERS, **SEA)
    threshold = 0.1 if name in WITHOUT["reference"] else mixed_threshold(name, steps=STEPS, layers=LAYERS)
    if method == "first block":
        return first_block_cache(name, threshold, layers=LAYERS)
    if method == "db":
        return db_cache(name, {"residual_diff_threshold": threshold}, layers=LAYERS)
    return reference(name, first=1, last=0, decide=above(threshold), layers=LAYERS)


def above(threshold):
    return lambda _, distance: distance is None or distance > threshold


def run(peer, name):
    """The outputs of one run, its decisions and its distances."""
    peer.reset()
    outputs = [peer(**call) for _, call in trajectory(name, STEPS)]
    return outputs, peer.computed, peer.distances


def assert_equal(name, ours, run_of_theirs):
    """Step by step: both the decisions and what they were taken from."""
    (a, computed, distances), (b, expected, measured) = run(ours, name), run_of_theirs
    assert computed == expected
    assert True in computed[1:] and False in computed
    assert max(relative_error(x, y) for x, y in zip(a, b, strict=True)) < 1e-5
    for x, y in zip(distances, measured, strict=True):
        assert x is None or y is None or abs(x - y) < 1e-5 * y


@pytest.mark.parametrize("method", WITHOUT)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_or_says_why_not(name, method):
    if name in WITHOUT[method]:
        with pytest.raises(NoPeer, match=r"\w+"):
            make(method, name)
        return
    peer = make(method, name)
    outputs, computed, distances = run(peer, name)
    again, *same = run(peer, name)
    assert len(computed) == STEPS and computed[0] and False in computed
    assert same == [computed, distances]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    if method == "reference":
        found = mixed(name, steps=STEPS, layers=LAYERS)
        assert found.margin > 0.02
        assert tuple(computed) == found.computed


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_one_block_is_no_middle(layers):
    name = "LTXVideoTransformer3DModel"
    if layers is None:
        with pytest.raises(NoPeer, match="of 1 blocks none is left"):
            first_block_cache(name, 0.1)
    else:
        assert first_block_cache(name, 0.1, layers=layers)


@pytest.mark.parametrize("name", able("first block"))
def test_reference_is_first_block_cache(name):
    assert_equal(name, make("reference", name), run(make("first block", name), name))


def taylor(order):
    """cache-dit's: differences over the gap, formed by computed steps after the first three only."""

    def forecast(history, step):
        factors: list[torch.Tensor] = []
        last = 0
        for at, value in history:
            new = [value]
            for previous in factors[:order] if at > 2 else []:
                new.append((new[-1] - previous) / (at - last))
            factors, last = new, at
        total, scale = torch.zeros_like(factors[0]), 1.0
        for power, factor in enumerate(factors):
            scale = scale * (step - last) / power if power else 1.0
            total = total + scale * factor
        return total

    return forecast


# One per kind of block: what it takes and returns, one list or two.
CASES = [(name, 1, 0, None) for name in able("db")]
CASES += [(name, first, last, order) for name in KINDS[:3] for first, last, order in [(1, 0, 1), (2, 1, 2)]]


@pytest.mark.parametrize(("name", "first", "last", "order"), CASES)
def test_reference_is_db_cache(name, first, last, order):
    pytest.importorskip("cache_dit")
    threshold = mixed_threshold(name, first=first, steps=STEPS, layers=LAYERS)
    fields = {"Fn_compute_blocks": first, "Bn_compute_blocks": last, "residual_diff_threshold": threshold}
    ours = reference(
        name,
        first=first,
        last=last,
        decide=above(threshold),
        layers=LAYERS,
        forecast=reuse if order is None else taylor(order),
    )
    assert_equal(name, ours, run(db_cache(name, fields, order, layers=LAYERS), name))


@pytest.mark.parametrize("name", able("mag"))
def test_reference_is_mag_cache(name):
    """MagCache forecasts the image only; what comes behind the blocks does not read the text."""
    theirs = run(make("mag", name), name)
    ours = reference(name, first=0, last=0, decide=lambda step, _: theirs[1][step], layers=LAYERS)
    assert_equal(name, ours, theirs)


@pytest.mark.parametrize("name", able("sea"))
def test_reference_is_sea_cache(name):
    theirs = run(make("sea", name), name)

    def line(history, step):
        if len(history) < 2:
            return history[-1][1]
        (before, a), (last, b) = history[-2:]
        return b + (b - a) * (step - last) / (last - before)

    ours = reference(name, first=0, last=0, decide=lambda step, _: theirs[1][step], forecast=line, layers=LAYERS)
    assert_equal(name, ours, theirs)


def test_mag_cache_calibrates():
    peer = mag_cache("WanTransformer3DModel", calibrate=True, num_inference_steps=STEPS)
    _, computed, _ = run(peer, "WanTransformer3DModel")
    assert all(computed)
    assert len(peer.ratios) == STEPS and peer.ratios[0] == 1.0


def test_cache_dit_begins_its_next_run_a_step_late():
    """By itself it predicts the first step of the second run from the first run: parity needs ``reset``."""
    pytest.importorskip("cache_dit")
    name = "WanTransformer3DModel"
    peer = db_cache(name, {"residual_diff_threshold": 0.9, "num_inference_steps": STEPS})
    for _ in range(2):
        for _, call in trajectory(name, STEPS):
            peer(**call)
    assert [step for step, computed in enumerate(peer.computed) if computed] == [0, STEPS + 1]
