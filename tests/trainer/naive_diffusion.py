"""Latent diffusion in a slow, independent way: the schedule in closed form, one sample and one token after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 100
Velocity = Callable[[Tensor, int], Tensor]


def kept(step: int) -> float:
    """Alpha-bar of the cosine schedule (arXiv 2102.09672, equation 17), whose betas are at most 0.999."""
    if step == STEPS - 1:
        return 0.001 * kept(step - 1)
    first, now = (math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, (step + 1) / STEPS))
    return now / first


def naive_dit(network: Any, parts: Sequence[Tensor], condition: Tensor, step: int) -> list[Tensor]:
    """The outputs of one sample: its tokens [n, channels] of each kind, without a batch."""
    rows = [layer(row) for layer, part in zip(network.project_in, parts, strict=True) for row in part]
    x = torch.stack([row + network.position[number] for number, row in enumerate(rows)])
    width, heads = x.shape[1], network.blocks[0].heads
    angles = [step * 10_000 ** (-k / (width // 2)) for k in range(width // 2)]
    waves = torch.tensor([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    known = network.embed_step(waves)
    if len(condition):
        known = known + network.embed_condition(condition)
    silu = known * torch.sigmoid(known)
    for block in network.blocks:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.modulate(silu).chunk(6)
        q, k, v = block.qkv(block.norm_attention(x) * (1 + scale) + shift).chunk(3, 1)
        size, found = width // heads, []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            weights = (q[:, own] @ k[:, own].T / size**0.5).softmax(1)
            found.append(weights @ v[:, own])
        x = x + gate * block.out(torch.cat(found, 1))
        hidden = F.gelu(block.mlp[0](block.norm_mlp(x) * (1 + scale_mlp) + shift_mlp))
        x = x + gate_mlp * block.mlp[3](hidden)
    shift, scale = network.modulate(silu).chunk(2)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    outputs = iter(x * (1 + scale) + shift)
    return [
        torch.stack([layer(next(outputs)) for _ in part])
        for layer, part in zip(network.project_out, parts, strict=True)
    ]


def naive_errors(clean: Tensor, noise: Tensor, step: int, velocity: Velocity) -> Tensor:
    """Squared errors of one sample's v-prediction (arXiv 2202.00512), times the min-SNR weight for it (arXiv 2303.09556)."""
    signal = kept(step)
    ratio = signal / (1 - signal)
    noisy = math.sqrt(signal) * clean + math.sqrt(1 - signal) * noise
    target = math.sqrt(signal) * noise - math.sqrt(1 - signal) * clean
    return min(ratio, 5.0) / (ratio + 1) * (velocity(noisy, step) - target) ** 2


def naive_sample(noise: Tensor, steps: int, velocity: Velocity) -> Tensor:
    """What DDIM makes of the noise of one sample, in so many steps from pure noise."""
    x = noise
    for number in range(steps):
        step = STEPS - 1 - number * (STEPS // steps)
        now, after = kept(step), kept(step - STEPS // steps) if number < steps - 1 else 1.0
        found = velocity(x, step)
        clean = math.sqrt(now) * x - math.sqrt(1 - now) * found
        rest = math.sqrt(now) * found + math.sqrt(1 - now) * x
        x = math.sqrt(after) * clean + math.sqrt(1 - after) * rest
    return x
