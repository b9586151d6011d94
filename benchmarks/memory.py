"""Cache bytes against diffusers' hooks, on a model of 24 blocks.

    python benchmarks/memory.py

Both run the same schedule for ten steps; diffusers' bytes are those that its hooks keep alive, ours those of all slots,
and both are what was allocated, not what was planned. The last columns keep dead slots (of cuts that no phase reads)
too, and compare all outputs bit by bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from report import Column, mebibytes, publish
from subjects import bytes_of_hooks

import cachepass
from cachepass.program import plan

STEPS = 10
ATTENTION, BLOCKS = r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.\d+"
TAYLOR = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
CASES: dict[str, dict[str, Any]] = {
    "TaylorSeer, blocks, order 1": {**TAYLOR, "method": "taylorseer", "cache_identifiers": [BLOCKS], "max_order": 1},
    "TaylorSeer, blocks, order 2": {**TAYLOR, "method": "taylorseer", "cache_identifiers": [BLOCKS], "max_order": 2},
    "TaylorSeer, attentions, order 1": {**TAYLOR, "method": "taylorseer", "cache_identifiers": [ATTENTION]},
    "PAB": {"method": "pab", "spatial_attention_block_skip_range": 2},
}
COLUMNS: tuple[Column, ...] = (
    ("method", "method", str), ("cachepass MiB", "bytes", mebibytes), ("diffusers MiB", "diffusers", mebibytes),
    ("cachepass / diffusers", "ratio", lambda v: f"{v:.3f}"), ("with dead slots MiB", "dead", mebibytes),
    ("outputs with and without", "equal", lambda v: "bit-equal" if v else "differ"),
)  # fmt: skip


def build(depth: int) -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        num_layers=depth,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return model.eval().requires_grad_(False)


def run(model: Callable[..., Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent, results = torch.randn(1, 4, 32, 32, generator=generator), []
    for step in range(STEPS):
        inputs = {
            "hidden_states": latent * (1 - 0.04 * step),
            "timestep": torch.tensor([700 - 60 * step]),
            "class_labels": torch.tensor([3]),
        }
        results.append(model(**inputs).sample)
    return results


def ours(depth: int, cache: dict[str, Any]) -> tuple[int, list[torch.Tensor]]:
    torch._dynamo.reset()
    compiled = torch.compile(
        build(depth),
        backend="cached_inductor",
        fullgraph=True,
        options={"cache": cache, "lowering": "eager", "num_inference_steps": STEPS},
    )
    results = run(compiled)
    return cachepass.summary(compiled).cache_bytes, results


def theirs(depth: int, cache: dict[str, Any]) -> int:
    import diffusers
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    fields = {key: value for key, value in cache.items() if key != "method"}
    model: Any = build(depth)
    if cache["method"] == "pab":
        now = iter(700 - 60 * step for step in range(STEPS) for _ in range(depth))
        diffusers.hooks.apply_pyramid_attention_broadcast(
            model, diffusers.PyramidAttentionBroadcastConfig(**fields, current_timestep_callback=lambda: next(now, 100))
        )
    else:
        diffusers.hooks.apply_taylorseer_cache(model, diffusers.TaylorSeerCacheConfig(**fields))
    _set_cache_context(model, CacheContext("benchmark"))
    run(model)
    return bytes_of_hooks(model)


@contextlib.contextmanager
def dead_slots_kept() -> Iterator[None]:
    """Every cut counts as read."""
    with mock.patch.object(plan, "_live_markers", lambda _graph, group_of, _groups: set(group_of)):
        yield


@click.command()
@click.option("--depth", default=24, show_default=True, help="Blocks.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(depth: int, out: Path | None) -> None:
    """Measure, print the markdown table; with --out, write the JSON."""
    rows = []
    with torch.no_grad():
        for name, cache in CASES.items():
            size, results = ours(depth, cache)
            with dead_slots_kept():
                dead, same = ours(depth, cache)
            diffusers = theirs(depth, cache)
            equal = all(torch.equal(a, b) for a, b in zip(results, same, strict=True))
            rows.append(
                {
                    "method": name,
                    "bytes": size,
                    "diffusers": diffusers,
                    "ratio": size / diffusers,
                    "dead": dead,
                    "equal": equal,
                }
            )
    results = {f"cache memory, {depth} blocks": rows}
    publish(results, COLUMNS, "cpu", "torch.float32", out)


if __name__ == "__main__":
    main()
