"""Train the demo's two models on 28x28 handwritten digits: a class-conditional DiT and a classifier that judges it.

    python examples/digits/train.py dit          # about 50 minutes on two CPU cores -> dit.safetensors
    python examples/digits/train.py classifier   # about 1 minute                    -> classifier.safetensors

The generator is diffusers' own ``DiTTransformer2DModel`` (10 layers, width 128, 49 tokens of 4x4 pixels), trained
with rectified flow (Liu et al., https://arxiv.org/abs/2209.03003; the loss and the logit-normal timesteps follow
Stable Diffusion 3, https://arxiv.org/abs/2403.03206). Labels are dropped for 10 % of the images, so the model can be
sampled with classifier-free guidance (https://arxiv.org/abs/2207.12598).

The last 1,000 digits are held out of both trainings. Weights are written in fp16 (half the size; they are read back
to fp32), the digits' source and licence are in README.md beside this file.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from models import NULL_LABEL, build_classifier, build_dit, load_dit
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).parent
HELD_OUT = 1000


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All digits: images ``[10000, 1, 28, 28]`` in [-1, 1] and labels ``[10000]`` in 0..9.

    In the file they are sorted by label; here they come in an order that is random and always the same.
    """
    data = np.load(HERE / "digits.npz")
    order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data["images"]).float().div(127.5).sub(1.0).unsqueeze(1)
    return images[order], torch.from_numpy(data["labels"]).long()[order]


def save_fp16(model: torch.nn.Module, name: str) -> None:
    save_file(
        {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}, HERE / name
    )
    click.echo(f"wrote {name}: {(HERE / name).stat().st_size / 1e6:.2f} MB")


def start_as_identity(model: torch.nn.Module) -> None:
    """adaLN-zero: gates, shifts, scales and the last projection start at zero."""
    for layer in [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_2]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


@click.group()
def main() -> None:
    torch.manual_seed(0)


@main.command()
@click.option("--steps", default=8000, show_default=True)
@click.option("--minutes", default=1000.0, show_default=True, help="Stop (with the schedule finished) near this time.")
@click.option("--batch", default=64, show_default=True)
@click.option("--peak-lr", default=8e-4, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the weights in dit.safetensors.")
def dit(steps: int, minutes: float, batch: int, peak_lr: float, resume: bool) -> None:
    """Train the class-conditional DiT; the exponential moving average of the weights is what is saved."""
    images, labels = load_digits()
    images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    model = load_dit().requires_grad_(True) if resume else build_dit()
    if not resume:
        start_as_identity(model)
    ema = copy.deepcopy(model).requires_grad_(False)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)

    start, progress, average = time.monotonic(), tqdm(range(steps), desc="dit"), math.nan
    for step in progress:
        # Time decides too, so that the learning rate always reaches its end however slow the machine is.
        done = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if done >= 1:
            break
        rate = peak_lr * min(1.0, (step + 1) / 200) * (0.5 * (1 + math.cos(math.pi * done)) * 0.98 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(len(images), (batch,))
        label = torch.where(torch.rand(batch) < 0.1, NULL_LABEL, labels[index])
        sigma = torch.sigmoid(torch.randn(batch))
        noise = torch.randn(batch, 1, 28, 28)
        s = sigma.view(-1, 1, 1, 1)
        velocity = compiled((1 - s) * images[index] + s * noise, timestep=sigma * 1000, class_labels=label).sample
        loss = F.mse_loss(velocity, noise - images[index])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        average = loss.item() if math.isnan(average) else 0.99 * average + 0.01 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{average:.4f}", lr=f"{rate:.1e}")
        if step % 500 == 499:
            save_fp16(ema, "dit.safetensors")
    save_fp16(ema, "dit.safetensors")


@main.command()
@click.option("--epochs", default=8, show_default=True)
def classifier(epochs: int) -> None:
    """Train the convolutional classifier and print its accuracy on the held-out digits."""
    images, labels = load_digits()
    model = build_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batches = math.ceil((len(images) - HELD_OUT) / 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * batches)
    model.train()
    for _ in tqdm(range(epochs), desc="classifier"):
        for index in torch.randperm(len(images) - HELD_OUT).split(128):
            shift = torch.randint(-2, 3, (2,)).tolist()
            batch = torch.roll(images[index], shift, dims=(2, 3))
            loss = F.cross_entropy(model(batch), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        hits = (model(images[-HELD_OUT:]).argmax(1) == labels[-HELD_OUT:]).float().mean().item()
    click.echo(f"held-out accuracy: {100 * hits:.1f} %")
    save_fp16(model, "classifier.safetensors")


if __name__ == "__main__":
    main()
