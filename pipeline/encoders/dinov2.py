"""DINOv2 (arXiv 2304.07193), as DINO-WM uses it: ViT-S/14, 196 px, the final norm's 14 x 14 patch tokens of 384.

DINO-WM resizes to 224, normalises with 0.5 / 0.5 and resizes to 196 (models/visual_world_model.py). The official normalisation is
ImageNet's: `--normalisation imagenet`. The network and its position interpolation are timm's, or for a folder those of transformers.
"""

from __future__ import annotations

from pathlib import Path

from wmcache.common.jsonfiles import read_json
from wmcache.pipeline.encoders.base import Backbone, EncoderSpec
from wmcache.pipeline.encoders.vit import CONFIG, RESAVE, HfFamily, ModelSize, load_timm, register_family

SIZES = tuple(
    ModelSize(
        suffix, f"DINOv2 ViT-{name[0].upper()}/14", depth, dim, f"timm/vit_{name}_patch14_dinov2.lvd142m", revision
    )
    for suffix, name, depth, dim, revision in (
        ("", "small", 12, 384, "4610ca143709d58a633b6397a74412c2c3842454"),
        ("base", "base", 12, 768, "4685c99dabffe5affac90bd99dbffd25801ae58d"),
        ("large", "large", 24, 1024, "4741e1cafbf45415e77074bb0cb42dba76c8684a"),
    )
)
SPEC = EncoderSpec(
    name="dinov2",
    summary="DINOv2 ViT-S/14, patch tokens: DINO-WM's representation",
    image_size=196,
    via=(224,),
    patch=14,
    token_dim=384,
    licence="Apache-2.0",
)
HF = HfFamily("Dinov2Model", "Dinov2Config", ("dinov2",))


def load(spec: EncoderSpec, size: ModelSize, image_size: int, path: Path) -> Backbone:
    """Load the network from a file of timm's or the official names, or from a folder of timm or transformers."""
    if path.is_dir() and "architecture" not in read_json(path / CONFIG, RESAVE):
        return HF.load(spec, size, image_size, path)
    return load_timm(size.source.removeprefix("timm/"), spec, image_size, path)


register_family(SPEC, SIZES, prefix=1, load=load)
