"""Config objects of diffusers and cache-dit are read field by field."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import pytest

import cachepass
from cachepass.config import parse_cache
from cachepass.forecast import DMD, Taylor


class CacheType(enum.Enum):
    DBCache = "DBCache"
    NONE = "NONE"


@dataclasses.dataclass
class DBCacheConfig:
    """As cache-dit's: a field that ours has not, and a few of those that both have."""

    cache_type: CacheType = CacheType.DBCache
    Fn_compute_blocks: int = 8
    residual_diff_threshold: float = 0.08
    notes: list[str] = dataclasses.field(default_factory=list)
    steps_computation_mask: list[int] | None = None


def test_fields_that_are_missing_there_have_our_defaults():
    read = parse_cache(DBCacheConfig(Fn_compute_blocks=2, steps_computation_mask=[1, 0, 1]))
    assert read == cachepass.DBCacheConfig(Fn_compute_blocks=2, steps_computation_mask=(1, 0, 1))


@pytest.mark.parametrize(("fields", "where"), [
    ({"cache_type": CacheType.NONE}, "DBCacheConfig.cache_type"),
    ({"notes": ["x"]}, "DBCacheConfig.notes"),
])  # fmt: skip
def test_fields_that_are_missing_here_must_have_their_defaults(fields: dict[str, Any], where: str):
    with pytest.raises(cachepass.ConfigError, match="has no equivalent here") as caught:
        parse_cache(DBCacheConfig(**fields))
    assert where in str(caught.value)


@pytest.mark.parametrize(("name", "fields"), [
    ("FirstBlockCacheConfig", {"threshold": 0.2}),
    ("SeaCacheConfig", {"threshold": 0.1, "residual_order": 0}),
    ("TaylorSeerCacheConfig", {"max_order": 2}),
])  # fmt: skip
def test_those_of_diffusers(name: str, fields: dict[str, Any]):
    hooks = pytest.importorskip("diffusers.hooks")
    assert parse_cache(getattr(hooks, name)(**fields)) == getattr(cachepass, name)(**fields)


def test_mag_cache_of_diffusers_stretches_its_ratios_itself():
    hooks = pytest.importorskip("diffusers.hooks")
    read = parse_cache(hooks.MagCacheConfig(mag_ratios=[1.0, 0.5, 0.25], num_inference_steps=5))
    assert isinstance(read, cachepass.MagCacheConfig)
    assert read.mag_ratios == (1.0, 1.0, 0.5, 0.25, 0.25)
    assert parse_cache(hooks.MagCacheConfig(calibrate=True)) == cachepass.MagCacheConfig(calibrate=True)


def test_that_of_cache_dit():
    cache_dit = pytest.importorskip("cache_dit")
    given = cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, force_refresh_step_hint=9)
    expected = cachepass.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, force_refresh_step_hint=9)
    assert parse_cache(given) == expected


def test_calibrators_of_cache_dit():
    cache_dit = pytest.importorskip("cache_dit")
    taylor = cachepass.DBCacheConfig(calibrator=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2))
    assert taylor.calibrator == Taylor(2, since=3)
    assert cachepass.DBCacheConfig(calibrator=cache_dit.DMDCalibratorConfig()).calibrator == DMD()
    with pytest.raises(cachepass.ConfigError, match="neither a forecast nor a calibrator"):
        cachepass.DBCacheConfig(calibrator=cache_dit.FoCaCalibratorConfig())
