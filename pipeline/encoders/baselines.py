"""Baselines without weights: the pixels themselves, and a transformer that was never trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from wmcache.pipeline.encoders.base import LAST, Backbone, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.vit import TimmVit
from wmcache.pipeline.encoders.weights import refuse_weights

PIXELS = EncoderSpec(
    name="pixels",
    summary="the pixels of a small frame, a baseline",
    image_size=32,
    patch=8,
    token_dim=192,
    layer="pixels",
    dtype="float32",
)
RANDOM = EncoderSpec(
    name="random-vit",
    summary="a ViT-Ti/16 that was never trained, a baseline",
    image_size=64,
    patch=16,
    token_dim=192,
    source="random, seed 0",
)
RANDOM_LAYERS = replace(
    RANDOM,
    name="random-vit-layers",
    summary="its tokens of three depths, for adapters on them",
    token_dim=576,
    layer="block 2+block 6+norm",
    token_selection="layers",
    grid=(1, 17),
)


class _Pixels(Backbone):
    """Patches as they are, each [patch, patch, 3] in this order."""

    def __init__(self, patch: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.dims, self.described, self.grid = {LAST: 3 * patch**2}, {LAST: "pixels"}, grid

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        return dict.fromkeys(layers, patches)


@register(PIXELS)
def load_pixels(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Make the backbone."""
    refuse_weights(spec, weights)
    backbone = _Pixels(spec.patch, spec.patch_grid(image_size))
    return Loaded(backbone, Select(backbone, spec.token_selection), spec.source)


@register(RANDOM)
@register(RANDOM_LAYERS)
def load_random(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Make the network, with the same bits on every machine."""
    import timm

    refuse_weights(spec, weights)
    with torch.random.fork_rng(devices=[]):
        vit = timm.create_model("vit_tiny_patch16_224", img_size=image_size, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(vit.named_parameters()):
        if name.endswith("bias"):
            nn.init.zeros_(value)
        elif value.ndim > 1:
            # Matrices keep the variance of their input. Processors round normal draws differently, which would change the hash.
            deviation = 0.02 if name in ("cls_token", "pos_embed") else 1 / math.sqrt(value[0].numel())
            drawn = torch.rand(value.shape, generator=generator) - 0.5
            value.data.copy_(drawn * (deviation * math.sqrt(12)))
    backbone = TimmVit(vit)
    return Loaded(backbone, Select(backbone, spec.token_selection), spec.source)
