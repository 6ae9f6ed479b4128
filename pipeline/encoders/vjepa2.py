"""V-JEPA 2 (arXiv 2506.09985): ViT-L/16 over tubelets of two frames, 256 px, the final norm's 16 x 16 tokens of 1024.

A single frame is repeated to fill a tubelet, as in V-JEPA 2-AC; an encoder with a lag receives an earlier frame and this one. There is no
class token. Frames are resized whole; the published processor crops their margins. The network is that of transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.common.reading import reading
from wmcache.pipeline.encoders.base import LAST, Backbone, EncoderSpec
from wmcache.pipeline.encoders.libraries import CONFIG, RESAVE, hf_settings, patches_a_side, require_same
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.vit import ModelSize, Vit, load_variant, register_family
from wmcache.pipeline.encoders.weights import read_tensors

TUBELET = 2
UNUSED = ("predictor.", "vjepa2.predictor.", "pooler.", "classifier.")
"""Prefixes of weights beside the encoder; the last three are those of a VJEPA2ForVideoClassification."""

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

    def __init__(self, encoder: Any, grid: int) -> None:
        super().__init__(encoder.config.num_hidden_layers, encoder.config.hidden_size, (grid, grid), prefix=0)
        self.encoder = encoder

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        clips = images if images.ndim == 5 else images[:, None].expand(-1, TUBELET, -1, -1, -1)
        hidden: Tensor = self.encoder.embeddings(clips)
        found = {}
        # Block by block: the model's own output_hidden_states would keep all 24 in memory.
        for number, block in enumerate(self.encoder.layer, 1):
            hidden, _ = block(hidden)
            found.update({layer: hidden for layer in layers if self.blocks.get(layer) == number})
        return {layer: self.encoder.layernorm(hidden) if layer == LAST else found[layer] for layer in layers}


def load(spec: EncoderSpec, size: ModelSize, image_size: int, path: Path) -> Backbone:  # noqa: ARG001 (`LoadBackbone`)
    """Load the encoder from a file of the hub's names, or from a folder of transformers; predictor and classifier are left out."""
    encoder, grid = make_encoder(spec, image_size, path)
    tensors = read_tensors(path, spec.name, without=UNUSED)
    given = {name.removeprefix("vjepa2.").removeprefix("encoder."): value.float() for name, value in tensors.items()}
    require_same(spec, path, given, encoder.state_dict())
    encoder.load_state_dict(given, assign=True)
    backbone = _Vjepa2(encoder, grid)
    backbone.config = hf_settings(encoder.config, type(encoder.config)(crop_size=image_size))
    return backbone


def make_encoder(spec: EncoderSpec, image_size: int, path: Path) -> tuple[Any, int]:
    """Make a VJEPA2Encoder without weights, of a folder's config or the published one, and its patches a side.

    The network derives its rotary positions from the config's crop size, so this must equal the image size.

    Raises:
        UserError: the folder is of another model, or not for tubelets of two frames of this size.
    """
    from transformers import VJEPA2Config, VJEPA2Model

    written: dict[str, Any] = {}
    if path.is_dir():
        written = read_json(path / CONFIG, RESAVE)
        if (kind := written.get("model_type")) != VJEPA2Config.model_type:
            raise UserError(f"{path} contains a {kind}, not a {VJEPA2Config.model_type}; pass weights of that kind")
    if (tubelet := written.get("tubelet_size", TUBELET)) != TUBELET:
        raise UserError(f"{path} has tubelets of {tubelet} frames, not {TUBELET}; pass weights of {spec.source}")
    grid = patches_a_side(spec, image_size, written.get("patch_size", spec.patch), path)
    with reading(path / CONFIG, f"{path / CONFIG} is damaged", RESAVE), torch.device("meta"):
        return VJEPA2Model(VJEPA2Config.from_dict({**written, "crop_size": image_size})).encoder, grid


register_family(SPEC, (SIZE,), prefix=0, load=load)
register(PAIR)(functools.partial(load_variant, SIZE, load))
