"""DINOv2 (arXiv 2304.07193), as DINO-WM uses it: ViT-S/14, 196 px, the final norm's 14 x 14 patch tokens of 384.

DINO-WM resizes to 224, normalises with 0.5 / 0.5 and resizes to 196 (models/visual_world_model.py); the official normalisation is
ImageNet's, `--normalisation imagenet`. The network and its position interpolation are timm's, or transformers' for a folder of theirs.
"""

from __future__ import annotations

from pathlib import Path

from wmcache.common.jsonfiles import read_json
from wmcache.pipeline.encoders.base import Backbone, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.vit import (
    CONFIG,
    RESAVE,
    HfFamily,
    ModelSize,
    load_hf,
    load_timm,
    refuse_registers,
    variants,
)
from wmcache.pipeline.encoders.weights import find_weights

SIZES = (
    ModelSize(
        "",
        "DINOv2 ViT-S/14",
        12,
        384,
        "timm/vit_small_patch14_dinov2.lvd142m",
        "4610ca143709d58a633b6397a74412c2c3842454",
    ),
    ModelSize(
        "base",
        "DINOv2 ViT-B/14",
        12,
        768,
        "timm/vit_base_patch14_dinov2.lvd142m",
        "4685c99dabffe5affac90bd99dbffd25801ae58d",
    ),
    ModelSize(
        "large",
        "DINOv2 ViT-L/14",
        24,
        1024,
        "timm/vit_large_patch14_dinov2.lvd142m",
        "4741e1cafbf45415e77074bb0cb42dba76c8684a",
    ),
)
SPEC = EncoderSpec(
    name="dinov2",
    summary="DINOv2 ViT-S/14, patch tokens: DINO-WM's representation",
    image_size=196,
    via=(224,),
    patch=14,
    token_dim=384,
    normalisation="half",
    layer="norm",
    token_selection="patch",
    source=SIZES[0].source,
    licence="Apache-2.0",
    revision=SIZES[0].revision,
)
HF = HfFamily("Dinov2Model", "Dinov2Config", ("dinov2",))


def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """The network with weights from the hub, from a file of timm's or the official names, or from a folder of timm's or transformers'."""
    path, source = find_weights(spec, weights)
    size = next(size for size in SIZES if size.source == spec.source)
    backbone: Backbone
    written = read_json(path / CONFIG, RESAVE) if path.is_dir() else {}
    # A folder of timm's names its architecture, which says how many registers there are.
    if "architecture" not in written and written.get("model_type") in (None, "dinov2_with_registers"):
        refuse_registers(spec, path)
    if path.is_dir() and "architecture" not in written:
        backbone = load_hf(HF, size, spec, image_size, path)
    else:
        backbone = load_timm(size.source.removeprefix("timm/"), spec, image_size, path)
    return Loaded(backbone, Select(backbone, spec.token_selection), source)


for _size in SIZES:
    for _spec in variants(SPEC, _size, prefix=1):
        register(SPEC if _spec.name == SPEC.name else _spec)(load)
