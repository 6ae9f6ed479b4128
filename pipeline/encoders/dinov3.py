"""DINOv3 (arXiv 2508.10104): ViT-S/16, -B/16 and -L/16, 224 px, the final norm's 14 x 14 patch tokens.

Preprocessing is the published one: resized as floats, bilinear with antialiasing, ImageNet's normalisation. Positions are rotary, so any
multiple of 16 px works. The network is that of transformers; its weights are gated.
"""

from __future__ import annotations

from wmcache.pipeline.encoders.base import EncoderSpec
from wmcache.pipeline.encoders.vit import HfFamily, ModelSize, register_family

REGISTERS = 4


def _size(suffix: str, letter: str, revision: str, *, depth: int, dim: int, heads: int) -> ModelSize:
    settings = {
        "num_hidden_layers": depth,
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_attention_heads": heads,
        "num_register_tokens": REGISTERS,
    }
    source = f"facebook/dinov3-vit{letter}16-pretrain-lvd1689m"
    return ModelSize(suffix, f"DINOv3 ViT-{letter.upper()}/16", depth, dim, source, revision, settings)


SIZES = (
    _size("", "s", "114c1379950215c8b35dfcd4e90a5c251dde0d32", depth=12, dim=384, heads=6),
    _size("base", "b", "5931719e67bbdb9737e363e781fb0c67687896bc", depth=12, dim=768, heads=12),
    _size("large", "l", "ea8dc2863c51be0a264bab82070e3e8836b02d51", depth=24, dim=1024, heads=16),
)
SPEC = EncoderSpec(
    name="dinov3",
    summary="DINOv3 ViT-S/16, patch tokens",
    image_size=224,
    patch=16,
    token_dim=384,
    normalisation="imagenet",
    source=SIZES[0].source,
    licence="DINOv3",
    revision=SIZES[0].revision,
    accept=f"https://huggingface.co/{SIZES[0].source}",
)
HF = HfFamily("DINOv3ViTModel", "DINOv3ViTConfig", ("dinov3_vit",))
register_family(SPEC, SIZES, prefix=1 + REGISTERS, load=HF.load)
