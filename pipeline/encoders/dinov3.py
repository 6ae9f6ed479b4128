"""DINOv3 (arXiv 2508.10104): ViT-S/16, -B/16 and -L/16, 224 px, the final norm's 14 x 14 patch tokens.

Preprocessing is the published one: resized as floats, bilinear with antialiasing, ImageNet's normalisation. Positions are rotary, so any
multiple of 16 px works. The network is that of transformers; its weights are gated.
"""

from __future__ import annotations

from wmcache.pipeline.encoders.base import EncoderSpec
from wmcache.pipeline.encoders.vit import HfFamily, ModelSize, register_family

REGISTERS = 4


SIZES = tuple(
    ModelSize(
        suffix,
        f"DINOv3 ViT-{letter.upper()}/16",
        depth,
        dim,
        f"facebook/dinov3-vit{letter}16-pretrain-lvd1689m",
        revision,
        {
            "num_hidden_layers": depth,
            "hidden_size": dim,
            "intermediate_size": 4 * dim,
            "num_attention_heads": dim // 64,
            "num_register_tokens": REGISTERS,
        },
    )
    for suffix, letter, depth, dim, revision in (
        ("", "s", 12, 384, "114c1379950215c8b35dfcd4e90a5c251dde0d32"),
        ("base", "b", 12, 768, "5931719e67bbdb9737e363e781fb0c67687896bc"),
        ("large", "l", 24, 1024, "ea8dc2863c51be0a264bab82070e3e8836b02d51"),
    )
)
SPEC = EncoderSpec(
    name="dinov3",
    summary="DINOv3 ViT-S/16, patch tokens",
    image_size=224,
    patch=16,
    token_dim=384,
    normalisation="imagenet",
    licence="DINOv3",
    accept="https://huggingface.co",
)
HF = HfFamily("DINOv3ViTModel", "DINOv3ViTConfig", ("dinov3_vit",))
register_family(SPEC, SIZES, prefix=1 + REGISTERS, load=HF.load)
