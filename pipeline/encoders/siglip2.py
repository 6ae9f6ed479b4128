"""SigLIP 2 (arXiv 2502.14786): the vision tower of ViT-B/16, 224 px, the final norm's 14 x 14 patch tokens of 768.

There is no class token: the tower pools by attention, which is left out. Preprocessing is the published one: bilinear, 0.5 / 0.5. The
network is transformers' SiglipVisionModel, which interpolates its positions for other sizes.
"""

from __future__ import annotations

from pathlib import Path

from wmcache.pipeline.encoders.base import EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.vit import HfFamily, ModelSize, load_hf, variants
from wmcache.pipeline.encoders.weights import find_weights

SIZE = ModelSize(
    "",
    "SigLIP 2 ViT-B/16",
    12,
    768,
    "google/siglip2-base-patch16-224",
    "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2",
)
SPEC = EncoderSpec(
    name="siglip2",
    summary="SigLIP 2 ViT-B/16, patch tokens",
    image_size=224,
    patch=16,
    token_dim=768,
    normalisation="half",
    layer="norm",
    token_selection="patch",
    source=SIZE.source,
    licence="Apache-2.0",
    revision=SIZE.revision,
)
HF = HfFamily(
    "SiglipVisionModel",
    "SiglipVisionConfig",
    ("siglip_vision_model", "siglip"),
    class_token=False,
    arguments={"interpolate_pos_encoding": True},
    overrides={"vision_use_head": False},
    # The published file holds the text tower too.
    unused=("text_model.", "logit_", "vision_model.head.", "head."),
)


def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """The network with weights from the hub, from a file of the hub's names, or from a folder of transformers'."""
    path, source = find_weights(spec, weights)
    backbone = load_hf(HF, SIZE, spec, image_size, path)
    return Loaded(backbone, Select(backbone, spec.token_selection), source)


for _spec in variants(SPEC, SIZE, prefix=0):
    register(_spec)(load)
