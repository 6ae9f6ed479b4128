"""R3M (arXiv 2203.12601): a ResNet-18 trained on videos of people at work, time-contrastively and with language; one token of 512.

The published network divides pixels by 255 itself; here they are in [0, 1] before ImageNet's normalisation, which is the same. Frames are
resized whole to 224 px; the published code crops the margins of other sizes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import resnet
from wmcache.pipeline.encoders.base import EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.weights import read_tensors

HEADS = ("module.lang_enc.", "module.lang_rew.", "lang_enc.", "lang_rew.")

CONVERT = (
    "import torch; from safetensors.torch import save_file; state = torch.load('model.pt', map_location='cpu', weights_only=True)['r3m']; "
    "save_file({k.removeprefix('module.convnet.'): v for k, v in state.items() if 'convnet.' in k}, 'r3m.safetensors')"
)
"""Converts the published file, a pickle, into one that can be read without running code."""

SOURCE = "github.com/facebookresearch/r3m, converted"
SUMMARY = "R3M ResNet-18's pooled features, one token, trained on videos of people at work"
SPEC = replace(resnet.SPEC, name="r3m", summary=SUMMARY, source=SOURCE, licence="MIT", revision="")
MAP = replace(SPEC, name="r3m-map", summary="R3M ResNet-18's last map", token_selection="patch", grid=None)


@register(SPEC)
@register(MAP)
def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Load the network from a safetensors file of the published names, with or without prefixes; language heads are ignored."""
    if weights is None:
        raise UserError(
            f"encoder {spec.name} is published only as a pickle, which may contain code; convert its model.pt once and pass "
            f'--weights r3m.safetensors: python -c "{CONVERT}"'
        )
    tensors = read_tensors(weights, spec.name, without=HEADS)
    body = {name.removeprefix("module.").removeprefix("convnet."): value for name, value in tensors.items()}
    backbone = resnet.load_backbone(spec, image_size, weights, body)
    return Loaded(backbone, Select(backbone, spec.token_selection), "file")
