"""Equal to the peers' own implementations, step by step over two runs: the same decisions, 1e-5 relative in fp32.

On models of several kinds (``residuals.KINDS``), and with ``CACHEPASS_ZOO=1`` on all of the zoo where the peer works.
Where diffusers' first-block hook does not, the definition written out (``residuals.reference``) is the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from peers import WITHOUT, db_cache, first_block_cache, mag_cache, sea_cache
from residuals import MODELS, Peer, mixed, reference, reuse
from zoo import ALL, build, first_tensor, is_one_graph, relative_error, timestep_scale, trajectory

import cachepass
from cachepass import DBCacheConfig, FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig
from cachepass.forecast import Taylor

STEPS, LAYERS = 9, 4
WAN = "WanTransformer3DModel"
RATIOS = [1.0, 1.1, 0.95, 1.05, 1.02, 0.9, 0.97, 1.03, 0.93]
MASK = [1, 1, 0, 0, 1, 0, 1, 0, 0]


def assert_parity(name: str, peer: Peer, config: object) -> float:
    compiled = torch_compile(name, config)
    largest = 0.0
    for _ in range(2):
        peer.reset()
        for step, (_, call) in enumerate(trajectory(name, STEPS)):
            error = relative_error(first_tensor(compiled(**call)), peer(**call))
            largest = max(largest, error)
            assert error < 1e-5, f"step {step}: {error:.1e}, computed {peer.computed}"
        marks = cachepass.summary(compiled).last_runs["default"]["blocks"]
        assert [mark == "#" for mark in marks] == peer.computed
    assert 0 < sum(peer.computed) < STEPS
    return largest


def torch_compile(name: str, config: object):
    import torch

    return torch.compile(
        build(name, layers=LAYERS),
        backend="cached_inductor",
        fullgraph=is_one_graph(name),
        options={
            "cache": config,
            "lowering": "eager",
            "num_inference_steps": STEPS,
            "timestep_scale": timestep_scale(name),
        },
    )


def with_peer(method: str, few: Sequence[str] = MODELS) -> list[str]:
    """Models that the method's peer runs."""
    return [name for name in (MODELS if ALL else few) if name not in WITHOUT[method]]


@pytest.mark.parametrize("name", with_peer("reference", few=MODELS[4:]))
def test_first_block_cache(name, sweep):
    """diffusers' hook; by definition where it fails."""
    threshold = mixed(name, first=1, steps=STEPS, layers=LAYERS).threshold
    if name not in WITHOUT["first block"]:
        peer = first_block_cache(name, threshold, layers=LAYERS)
    else:
        peer = reference(
            name,
            first=1,
            last=0,
            layers=LAYERS,
            forecast=reuse,
            decide=lambda _, distance: distance is None or distance > threshold,
        )
    config = FirstBlockCacheConfig(threshold=threshold)
    if name.startswith("HunyuanVideo15"):  # a graph break in every block
        with pytest.raises(cachepass.PartialGraphError, match="in one graph"):
            assert_parity(name, peer, config)
        return
    sweep("first block", assert_parity(name, peer, config))


@pytest.mark.parametrize("name", with_peer("mag", few=("Flux2Transformer2DModel", WAN)))
def test_mag_cache(name, sweep):
    fields = {
        "threshold": 0.3,
        "max_skip_steps": 2,
        "retention_ratio": 0.2,
        "num_inference_steps": STEPS,
        "mag_ratios": RATIOS,
    }
    sweep("mag", assert_parity(name, mag_cache(name, layers=LAYERS, **fields), MagCacheConfig(**fields)))


@pytest.mark.parametrize("name", with_peer("sea", few=("CogVideoXTransformer3DModel", WAN)))
def test_sea_cache(name, sweep):
    order = int(name != WAN)
    fields = {"threshold": 0.5, "residual_order": order}
    peer = sea_cache(name, steps=STEPS, layers=LAYERS, **fields)
    sweep(f"sea {order}", assert_parity(name, peer, SeaCacheConfig(**fields)))


IN_ONE_GRAPH = [name for name in with_peer("db") if not name.startswith("HunyuanVideo15")]  # it breaks in every block


@pytest.mark.parametrize(("name", "first", "last", "order"), [
    *((name, 1, 0, None) for name in IN_ONE_GRAPH if ALL or name == "SD3Transformer2DModel"),
    *((name, 2, 1, 2) for name in IN_ONE_GRAPH if ALL or name in ("FluxTransformer2DModel", "HunyuanDiT2DModel")),
])  # fmt: skip
def test_db_cache(name, first, last, order, sweep):
    pytest.importorskip("cache_dit")
    threshold = mixed(name, first=first, steps=STEPS, layers=LAYERS).threshold
    fields = {
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": last,
        "residual_diff_threshold": threshold,
        "max_warmup_steps": 1,
    }
    peer = db_cache(name, fields, order, layers=LAYERS)
    calibrator = None if order is None else Taylor(order, since=3)
    sweep(f"db {first} {last} {order}", assert_parity(name, peer, DBCacheConfig(**fields, calibrator=calibrator)))


@pytest.mark.parametrize("fields", [
    {"max_warmup_steps": 4, "warmup_interval": 2, "residual_diff_threshold": 0.9},
    {"max_warmup_steps": 1, "max_cached_steps": 3, "residual_diff_threshold": 0.9},
    {"max_warmup_steps": 1, "max_continuous_cached_steps": 2, "residual_diff_threshold": 0.9},
    {"max_warmup_steps": 1, "max_accumulated_residual_diff_threshold": 0.25, "residual_diff_threshold": 0.9},
    {"max_warmup_steps": 1, "residual_diff_threshold": 1.0, "max_continuous_cached_steps": 3},
    {"max_warmup_steps": 1, "steps_computation_mask": MASK, "residual_diff_threshold": 0.2},
    {"max_warmup_steps": 1, "steps_computation_mask": MASK, "steps_computation_policy": "static"},
    {"max_warmup_steps": 2, "residual_diff_threshold": 0.9, "force_refresh_step_hint": 4},
    {"max_warmup_steps": 1, "residual_diff_threshold": 0.9, "force_refresh_step_hint": 3,
     "force_refresh_step_policy": "repeat"},
])  # fmt: skip
def test_db_caches_other_fields(fields):
    pytest.importorskip("cache_dit")
    name, fields = WAN, {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, **fields}
    assert_parity(name, db_cache(name, fields, None, layers=LAYERS), DBCacheConfig(**fields))


def test_mag_ratios_are_those_that_diffusers_measures():
    name = WAN
    peer = mag_cache(name, layers=LAYERS, calibrate=True, num_inference_steps=STEPS)
    compiled = torch_compile(name, MagCacheConfig(calibrate=True))
    for _, call in trajectory(name, STEPS):
        peer(**call)
        compiled(**call)
    assert cachepass.mag_ratios(compiled) == pytest.approx(peer.ratios, rel=1e-5)
