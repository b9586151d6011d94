"""Sample handwritten digits uncached and with each method; print what each one saves and what it costs.

Run by ``cachepass demo`` (all options: ``cachepass demo --help``). Classifier-free guidance, diffusers'
``FlowMatchEulerDiscreteScheduler``, one compiled model per method; every method gets the same noise and labels.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import HERE, guided_inputs, load_classifier, load_dit
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import cachepass

_FORECAST = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 5, "max_order": 1,
             "taylor_factors_dtype": torch.float32}  # fmt: skip

_FASTER = {"method": "fastercache", "tensor_format": "BCHW", "unconditional_batch_skip_range": 4,
           "unconditional_batch_timestep_skip_range": (-1, 900),
           "spatial_attention_timestep_skip_range": (-1, 900)}  # fmt: skip

#: One row each: what it is called, and ``options["cache"]`` (None: plain Inductor).
METHODS: dict[str, dict[str, Any] | str | None] = {
    "uncached": None,
    "TaylorSeer, attention and MLP": {**_FORECAST, "cache_identifiers": [r".*\.(attn1|ff)"]},
    "TaylorSeer, blocks": {**_FORECAST, "cache_identifiers": [r"transformer_blocks\.\d+"]},
    "PAB, attention": {"method": "pab", "spatial_attention_block_skip_range": 3,
                       "spatial_attention_timestep_skip_range": (100, 950)},
    "PAB, attention and MLP": {"method": "pab", "spatial_attention_block_skip_range": 3, "mlp_block_skip_range": 3,
                               "spatial_attention_timestep_skip_range": (100, 950),
                               "mlp_timestep_skip_range": (100, 950)},
    "FasterCache, branch": {**_FASTER, "spatial_attention_block_skip_range": None},
    "FasterCache, branch and attention": _FASTER,
    "tuned, 10 of 50": str(HERE / "tuned-10.json"),  # by tuned.py
    "tuned, 16 of 50": str(HERE / "tuned-16.json"),
}  # fmt: skip
ONE_EACH = ("uncached", "TaylorSeer, blocks", "PAB, attention and MLP", "FasterCache, branch and attention",
            "tuned, 10 of 50")  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """One method's run: images ``[n, 1, 28, 28]`` in [-1, 1], seconds, and what the cache did."""

    images: torch.Tensor
    seconds: float
    computed: int
    predicted: int
    cache_bytes: int
    planned_bytes: int


def _scheduler(steps: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def _inputs(latents: torch.Tensor, labels: torch.Tensor, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one call: the guidance batch."""
    batch, classes = guided_inputs(latents, labels)
    return {"hidden_states": batch, "timestep": timestep.expand(len(batch)), "class_labels": classes}


class Denoising:
    """``noise`` ``[n, 1, 28, 28]`` on its way to the digits ``labels`` ``[n]``, step by step."""

    def __init__(self, model: Any, noise: torch.Tensor, labels: torch.Tensor, steps: int, guidance: float) -> None:
        self.model, self.labels, self.guidance = model, labels, guidance
        self.scheduler, self.latents = _scheduler(steps), noise
        self._timesteps = iter(self.scheduler.timesteps)

    def step(self) -> None:
        t = next(self._timesteps)
        velocity = self.model(**_inputs(self.latents, self.labels, t)).sample
        uncond, cond = velocity.chunk(2)
        guided = uncond + self.guidance * (cond - uncond)
        self.latents = self.scheduler.step(guided, t, self.latents, return_dict=False)[0]

    @property
    def images(self) -> torch.Tensor:
        return self.latents.clamp(-1, 1)


def sample(
    model: Any, noise: torch.Tensor, labels: torch.Tensor, steps: int, guidance: float, advance: Any = lambda: None
) -> torch.Tensor:
    """Denoise ``noise`` ``[n, 1, 28, 28]`` into the digits ``labels`` ``[n]``."""
    denoising = Denoising(model, noise, labels, steps, guidance)
    for _ in range(steps):
        denoising.step()
        advance()
    return denoising.images


class Subject:
    """One row of the table: a compiled model, and its run."""

    def __init__(self, cache: dict[str, Any] | str | None, lowering: str, steps: int) -> None:
        self.cache, self.seconds = cache, 0.0
        if cache is None:
            backend = "eager" if lowering == "eager" else "inductor"
            self.compiled = torch.compile(load_dit(), fullgraph=True, backend=backend)
        else:
            options = {"cache": cache, "lowering": lowering, "progress": False, "num_inference_steps": steps}
            self.compiled = torch.compile(load_dit(), backend="cached_inductor", fullgraph=True, options=options)

    def prepare(self, noise: torch.Tensor, labels: torch.Tensor, steps: int, guidance: float) -> None:
        """Compile, and make a run of 8 steps that is not counted."""
        if self.cache is not None:
            timesteps = _scheduler(steps).timesteps
            inputs = _inputs(noise, labels, timesteps[0])
            cachepass.warmup(self.compiled, **inputs, timesteps=timesteps.tolist(), progress=False)
        sample(self.compiled, noise, labels, 8, guidance)
        if self.cache is not None:
            cachepass.reset(self.compiled)
        self._before = self._steps()
        self.run = Denoising(self.compiled, noise, labels, steps, guidance)

    def step(self) -> None:
        start = time.perf_counter()
        self.run.step()
        self.seconds += time.perf_counter() - start

    def sampled(self, steps: int) -> Sampled:
        if self.cache is None:
            return Sampled(self.run.images, self.seconds, steps, 0, 0, 0)
        found = cachepass.summary(self.compiled)
        total, predicted = (now - before for now, before in zip(self._steps(), self._before, strict=True))
        kept = found.cache_bytes, found.planned_bytes
        return Sampled(self.run.images, self.seconds, total - predicted, predicted, *kept)

    def _steps(self) -> tuple[int, int]:
        """Steps so far, and those of them that were predicted (by the group that was predicted most)."""
        found = None if self.cache is None else cachepass.summary(self.compiled)
        return (0, 0) if found is None else (found.steps, max(found.predicted.values(), default=0))


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the range of the images is 2."""
    error = (images - reference).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(4 / error))


def contact_sheet(rows: dict[str, torch.Tensor], path: Path, columns: int = 20) -> None:
    """One row of digits per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(columns * 0.55, len(rows) * 0.86))
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(torch.cat(list(images[:columns, 0]), dim=1).add(1).div(2), cmap="gray", vmin=0, vmax=1)
        axis.set_title(name, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    images: int,
    steps: int,
    guidance: float,
    lowering: str,
    out: Path,
    seed: int,
    names: Sequence[str] = ONE_EACH,
    *,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """The demo; returns the table's rows. ``quiet``: says nothing on the standard output."""
    console = Console(stderr=quiet)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, 1, 28, 28, generator=generator)
    labels = torch.arange(images) % 10
    classifier = load_classifier()
    subjects = {name: Subject(METHODS[name], lowering, steps) for name in names}
    columns = (TextColumn("{task.description:40s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # All rows are compiled of one model's code, and the limit of captures is per code.
    limit = torch._dynamo.config.patch(recompile_limit=8 * len(subjects))
    with torch.no_grad(), limit, Progress(*columns, console=console) as progress, warnings.catch_warnings():
        task = progress.add_task("compiling", total=len(subjects))
        for name, subject in subjects.items():
            progress.update(task, description=f"compiling {name}")
            subject.prepare(noise, labels, steps, guidance)
            progress.advance(task)
        task = progress.add_task("sampling, all in turn", total=steps)
        for step in range(steps):  # step by step in turn: what else the machine does meets all rows
            for subject in subjects.values():
                subject.step()
            progress.update(task, completed=step + 1)
    results = {name: subject.sampled(steps) for name, subject in subjects.items()}
    reference = results["uncached"]
    rows = []
    for name, result in results.items():
        hits = (classifier(result.images).argmax(1) == labels).float().mean().item()
        rows.append(
            {
                "method": name,
                "computed": result.computed,
                "predicted": result.predicted,
                "ms_per_image": 1000 * result.seconds / images,
                "speedup": reference.seconds / result.seconds,
                "psnr_db": psnr(result.images, reference.images),
                "accuracy_percent": 100 * hits,
                "cache_bytes": result.cache_bytes,
            }
        )
    _print(console, rows, images, steps)
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet({name: result.images for name, result in results.items()}, out / "digits.png")
    (out / "digits.json").write_text(json.dumps(rows, indent=1) + "\n")
    console.print(f"contact sheet: {out / 'digits.png'}, table: {out / 'digits.json'}")
    return rows


def _print(console: Console, rows: list[dict[str, Any]], images: int, steps: int) -> None:
    table = Table(
        title=f"{images} digits, {steps} steps, classifier-free guidance",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("method", min_width=16)
    # Two lines each, so that the table fits a terminal of 80 columns.
    for column in (
        "steps\ncomputed",
        "\npredicted",
        "ms per\nimage",
        "\nspeedup",
        "PSNR\ndB",
        "\naccuracy",
        "cache\nMiB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            str(row["computed"]),
            str(row["predicted"]),
            f"{row['ms_per_image']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['psnr_db']:.1f}",
            f"{row['accuracy_percent']:.1f} %",
            f"{row['cache_bytes'] / 2**20:.1f}",
        )
    console.print(table)
