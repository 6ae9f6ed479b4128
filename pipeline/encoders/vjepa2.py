"""V-JEPA 2 (arXiv 2506.09985): ViT-L/16 over tubelets of two frames, 256 px, the final norm's 16 x 16 tokens of 1024.

A single frame is repeated to fill a tubelet, as in V-JEPA 2-AC; an encoder with a lag receives an earlier frame and this one. There is no
class token. Frames are resized whole; the published processor crops their margins. The network is that of transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from wmcache.pipeline.encoders.base import LAST, EncoderSpec
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.vit import HfFamily, ModelSize, Vit, load_variant, register_family

TUBELET = 2

REVISION = "b3c1679b7c34d3255ef3547f27c7b226aefab26f"
SIZE = ModelSize("", "V-JEPA 2 ViT-L/16", 24, 1024, "facebook/vjepa2-vitl-fpc64-256", REVISION)
SPEC = EncoderSpec(
    name="vjepa2",
    summary="V-JEPA 2 ViT-L/16, patch tokens",
    image_size=256,
    patch=16,
    token_dim=1024,
    normalisation="imagenet",
    source=SIZE.source,
    licence="MIT",
    revision=SIZE.revision,
)
PAIR = replace(SPEC, name="vjepa2-pair", summary="V-JEPA 2 ViT-L/16, patch tokens of a frame and an earlier one", lag=5)


class _Vjepa2(Vit):
    """The encoder of a VJEPA2Model with `grid` patches a side."""

    def __init__(self, network: Any, grid: int) -> None:
        super().__init__(network.config.num_hidden_layers, network.config.hidden_size, (grid, grid), prefix=0)
        self.encoder = network.encoder

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        clips = images if images.ndim == 5 else images[:, None].expand(-1, TUBELET, -1, -1, -1)
        hidden: Tensor = self.encoder.embeddings(clips)
        found = {}
        # Block by block: the model's own output_hidden_states would keep all 24 in memory.
        for number, block in enumerate(self.encoder.layer, 1):
            hidden, _ = block(hidden)
            found.update({layer: hidden for layer in layers if self.blocks.get(layer) == number})
        return {layer: self.encoder.layernorm(hidden) if layer == LAST else found[layer] for layer in layers}


HF = HfFamily(
    "VJEPA2Model",
    "VJEPA2Config",
    ("vjepa2",),
    wrap=_Vjepa2,
    required={"tubelet_size": TUBELET},
    # The last three are those of a VJEPA2ForVideoClassification.
    unused=("predictor.", "vjepa2.predictor.", "pooler.", "classifier."),
)
register_family(SPEC, (SIZE,), prefix=0, load=HF.load)
register(PAIR)(functools.partial(load_variant, SIZE, HF.load))
