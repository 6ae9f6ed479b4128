"""SigLIP 2 (arXiv 2502.14786): the vision tower of ViT-B/16, 224 px, the final norm's 14 x 14 patch tokens of 768.

The tower has no class token: it pools by attention, which is left out. Preprocessing is the published one: bilinear, 0.5 / 0.5. The
network is the SiglipVisionModel of transformers, which interpolates its positions for other sizes.
"""

from __future__ import annotations

import functools

from wmcache.pipeline.encoders.base import EncoderSpec
from wmcache.pipeline.encoders.vit import HfFamily, HfVit, ModelSize, register_family

REVISION = "75de2d55ec2d0b4efc50b3e9ad70dba96a7b2fa2"
SIZE = ModelSize("", "SigLIP 2 ViT-B/16", 12, 768, "google/siglip2-base-patch16-224", REVISION)
SPEC = EncoderSpec(
    name="siglip2",
    summary="SigLIP 2 ViT-B/16, patch tokens",
    image_size=224,
    patch=16,
    token_dim=768,
    licence="Apache-2.0",
)
HF = HfFamily(
    "SiglipVisionModel",
    "SiglipVisionConfig",
    ("siglip_vision_model", "siglip"),
    wrap=functools.partial(HfVit, class_token=False, interpolate_pos_encoding=True),
    overrides={"vision_use_head": False},
    # The published file includes the text tower.
    unused=("text_model.", "logit_", "vision_model.head.", "head."),
)
register_family(SPEC, (SIZE,), prefix=0, load=HF.load)
