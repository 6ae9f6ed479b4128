"""DINOv2 patch tokens (arXiv 2304.07193), as DINO-WM uses them: ViT-S/14, 196 px, the final norm's 14 x 14 patch tokens of 384.

DINO-WM resizes to 224, normalises with 0.5 / 0.5 and resizes to 196 (models/visual_world_model.py); the official normalisation is
ImageNet's, `--normalisation imagenet`. The network and its position interpolation are timm's.
"""

from __future__ import annotations

from pathlib import Path

import timm
from safetensors import SafetensorError
from torch import Tensor, nn
from wmcache.cache.errors import UserError
from wmcache.pipeline.encoders.base import EncoderSpec, Loaded
from wmcache.pipeline.encoders.hub import download_weights

TIMM_NAME = "vit_small_patch14_dinov2.lvd142m"

SPEC = EncoderSpec(
    name="dinov2",
    summary="DINOv2 ViT-S/14 patch tokens, DINO-WM's representation",
    image_size=196,
    via=(224,),
    patch=14,
    token_dim=384,
    normalisation="half",
    layer="norm",
    token_selection="patch",
    source=f"timm/{TIMM_NAME}",
    licence="Apache-2.0",
)


class PatchTokens(nn.Module):
    """A timm ViT reduced to its patch tokens, without class and register tokens."""

    def __init__(self, vit: nn.Module) -> None:
        """Args: `vit` a timm VisionTransformer."""
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, D]."""
        tokens: Tensor = self.vit.forward_features(images)  # type: ignore[operator]
        prefix: int = self.vit.num_prefix_tokens  # type: ignore[assignment]
        return tokens[:, prefix:]


def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """The network with weights from the hub, or from a safetensors file of timm's or the official names, at any image size."""
    return Loaded(PatchTokens(load_timm(TIMM_NAME, spec, image_size, weights)), "file" if weights else spec.source)


def load_timm(timm_name: str, spec: EncoderSpec, image_size: int, weights: Path | None) -> nn.Module:
    """A timm model; position embeddings are interpolated to `image_size` by timm.

    Raises:
        UserError: the hub cannot be reached, or the file does not fit.
    """
    file = weights or download_weights(spec.source, spec.name)
    try:
        model: nn.Module = timm.create_model(
            timm_name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=image_size, num_classes=0
        )
    except (RuntimeError, SafetensorError, KeyError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{file} does not hold the weights of {timm_name} ({reason}); save them from timm's state_dict()"
        ) from error
    return model
