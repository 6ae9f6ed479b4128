"""Time-contrastive patch tokens: a small network trained on the dataset's own frames, so that no download is needed.

Frames a few steps apart are positives, all others negatives (TCN, arXiv 1704.06888; InfoNCE, arXiv 1807.03748), with logits equal
to minus the squared distance of all tokens. So the latent distance grows with the time that it takes to get from one frame to
another: what a planner that descends it needs. Pixels, untrained networks and plain autoencoders do not have that property here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from wmcache.cache.device import autocast, choose_dtype
from wmcache.cache.errors import UserError
from wmcache.pipeline.encoders.base import EncoderSpec, FitOptions, Loaded

SPEC = EncoderSpec(
    name="tcn",
    summary="small network trained time-contrastively on the dataset's own frames (wmcache fit)",
    image_size=64,
    patch=32,
    token_dim=32,
    normalisation="half",
    layer="head",
    token_selection="patch",
    source="wmcache fit --encoder tcn",
    licence="yours",
    dtype="float32",
)

WIDTH = 64
BACKGROUND_FRAMES = 1000


class TcnNetwork(nn.Module):
    """Three strided convolutions to one feature for each 16 x 16 patch, two transformer layers, a linear head."""

    def __init__(self, grid: int, patch: int, token_dim: int) -> None:
        """Args: `grid` the side of the token grid, `patch` a power of two from 8, `token_dim` the channels of each token."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH // 2, 8, stride=4, padding=2)]
        for channels in (WIDTH // 2, *(WIDTH,) * (int(math.log2(patch)) - 3)):
            layers += [nn.GELU(), nn.Conv2d(channels, WIDTH, 4, stride=2, padding=1)]
        self.stem = nn.Sequential(*layers)
        self.position = nn.Parameter(0.02 * torch.randn(1, grid * grid, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.mixer = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, token_dim))
        self.register_buffer("background", torch.zeros(3, grid * patch, grid * patch))
        self.register_buffer("contrast", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, D]."""
        features = rearrange(self.stem((images - self.background) / self.contrast), "b c h w -> b (h w) c")
        tokens: Tensor = self.head(self.mixer(features + self.position))
        return tokens

    def look_at(self, images: Tensor) -> None:
        """Learn what never moves from images [n, 3, S, S]: without it a ball of a few pixels is all that is left."""
        self.background.copy_(images.mean(0))
        self.contrast.copy_((images - self.background).std())

    background: Tensor
    contrast: Tensor


def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """The network with fitted weights.

    Raises:
        UserError: no file, or one that does not fit.
    """
    if weights is None:
        raise UserError(
            f"encoder {spec.name} has no fitted weights yet; make them with: wmcache fit --encoder {spec.name}"
        )
    grid, _ = spec.token_grid(image_size)
    network = TcnNetwork(grid, SPEC.patch, spec.token_dim)
    try:
        network.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--weights {weights} does not fit {spec.name} at {image_size} px ({reason}); fit it again"
        ) from error
    return Loaded(network, "file")


def fit(
    images: Tensor, episode: NDArray[np.integer], options: FitOptions, device: torch.device
) -> Iterator[tuple[float, nn.Module]]:
    """Train the network, yielding (loss, network) after each step.

    Args:
        images: uint8 [frames, 3, S, S], in order of episode and step.
        episode: [frames].
        options: see `FitOptions`.
        device: where to train.
    """
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    grid, _ = SPEC.token_grid(images.shape[-1])
    network = TcnNetwork(grid, SPEC.patch, SPEC.token_dim).to(device)
    some = torch.from_numpy(np.sort(rng.choice(len(images), min(len(images), BACKGROUND_FRAMES), replace=False)))
    network.look_at(images[some].to(device).float() / 127.5 - 1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.learning_rate, options.steps, pct_start=0.1)
    last = np.searchsorted(episode, episode, side="right") - 1
    candidates = np.flatnonzero(last > np.arange(len(last)))
    for _ in range(options.steps):
        first = rng.choice(candidates, options.batch)
        lag = rng.integers(1, options.max_lag + 1, options.batch)
        second = np.minimum(first + lag, last[first])
        pixels = images[torch.from_numpy(np.concatenate([first, second]))].to(device)
        with autocast(device, choose_dtype("auto", device)):
            tokens = network(pixels.float() / 127.5 - 1).flatten(1).float()
        loss = time_contrastive_loss(tokens[: options.batch], tokens[options.batch :], options.spread)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        yield loss.item(), network


def time_contrastive_loss(first: Tensor, second: Tensor, spread: float = 0.0) -> Tensor:
    """Symmetric InfoNCE with logits equal to minus the squared distance, and a reward for distance between all frames.

    InfoNCE alone is content once far frames are far enough, so latent distances saturate and the landscape has dead ends: of the
    U-maze's held-out frames, descent from 20 % got stuck. The second term unfolds what the first holds together locally (compare
    maximum variance unfolding, Weinberger and Saul 2006): 0 % got stuck.

    Args:
        first, second: [B, N * D]; row i of one is the positive of row i of the other, all other rows are its negatives.
        spread: weight of the mean distance.
    """
    # Not torch.cdist(…)²: the gradient of its square root is infinite where two rows are equal.
    squared = (first.square().sum(1)[:, None] + second.square().sum(1) - 2 * first @ second.T).clamp_min(0)
    target = torch.arange(len(first), device=first.device)
    contrast = (F.cross_entropy(-squared, target) + F.cross_entropy(-squared.T, target)) / 2
    return contrast - spread * (squared + 1e-2).sqrt().mean()
