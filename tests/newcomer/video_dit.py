"""What a newcomer brings: a text-to-video transformer of his own, and a sampling loop with two calls per step."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

STEPS, FRAMES, SIZE, WIDTH, HEADS, TEXT = 12, 2, 4, 32, 2, 16


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(context, 2 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q(x), *self.kv(context).chunk(2, -1))
        )
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(width, width), Attention(width, text)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(y, y)
        x = x + self.cross_attn(self.norm3(x), text)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class VideoDiT(nn.Module):
    """Videos ``[batch, 4, frames, height, width]``, timesteps ``[batch]`` from 1000, text ``[batch, tokens, 16]``."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList([Block(WIDTH, TEXT) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, video: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.patch(video)
        frames, height, width = x.shape[2:]
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=x.device) * 0.4)
        angles = timestep[:, None] * frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, text, time)
        x = self.head(self.norm(x)).unflatten(1, (frames, height, width)).unflatten(-1, (4, 2, 2))
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(3, 4).flatten(4, 5)


def make() -> VideoDiT:
    torch.manual_seed(0)
    return VideoDiT().eval().requires_grad_(False)


def prompt(seed: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, TEXT, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(model, text=None, said=contextlib.nullcontext, *, anew: bool = False) -> torch.Tensor:
    """Classifier-free guidance by two calls per step. ``said(name)`` is opened around each; ``anew``: the embeddings
    are made again in every step, as a careless loop does it."""
    text, empty = prompt(1) if text is None else text, torch.zeros(1, 5, TEXT)
    x = torch.randn(1, 4, FRAMES, SIZE, SIZE)
    for step in range(STEPS):
        timestep = torch.full((1,), 1000.0 * (1 - step / STEPS))
        given = (text.clone(), empty.clone()) if anew else (text, empty)
        with said("cond"):
            cond = model(x, timestep, given[0])
        with said("uncond"):
            uncond = model(x, timestep, given[1])
        x = x - (uncond + 3.0 * (cond - uncond)) / STEPS
    return x


def compared():
    """For ``cachepass compare``."""
    return make(), sample
