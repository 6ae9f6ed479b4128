"""ResNet-18 (arXiv 1512.03385) trained on ImageNet, torchvision's first weights; and R3M (arXiv 2203.12601), trained on videos of people.

Tokens are the last map, or its mean, one token of 512. Frames are resized whole to 224 px; the published transforms crop their margins.
R3M divides pixels by 255 itself; here they are in [0, 1] before ImageNet's normalisation, which is the same. The network is timm's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.reading import reading
from wmcache.pipeline.encoders.base import LAST, Backbone, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.hub import find_weights
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.vit import CONFIG, RESAVE, timm_settings
from wmcache.pipeline.encoders.weights import read_tensors, without_batch_counts

ARCHITECTURE = "resnet18"
R3M_HEADS = ("module.lang_enc.", "module.lang_rew.", "lang_enc.", "lang_rew.")
R3M_CONVERT = (
    "import torch; from safetensors.torch import save_file; state = torch.load('model.pt', map_location='cpu', weights_only=True)['r3m']; "
    "save_file({k.removeprefix('module.convnet.'): v for k, v in state.items() if 'convnet.' in k}, 'r3m.safetensors')"
)
"""Converts the published file, a pickle, into one that can be read without running code."""

MAP = EncoderSpec(
    name="resnet18-map",
    summary="ResNet-18's last map, supervised on ImageNet",
    image_size=224,
    patch=32,
    token_dim=512,
    normalisation="imagenet",
    layer="layer4",
    source=f"timm/{ARCHITECTURE}.tv_in1k",
    revision="590dfdd48494d2316a8385e1ca7fbec3b9359b35",
    licence="BSD-3-Clause",
)
SUMMARY = "ResNet-18's pooled features, one token, supervised on ImageNet"
SPEC = replace(MAP, name="resnet18", summary=SUMMARY, token_selection="pooled", grid=(1, 1))
R3M_MAP = replace(
    MAP,
    name="r3m-map",
    summary="R3M ResNet-18's last map",
    source="github.com/facebookresearch/r3m, converted",
    revision="",
    licence="MIT",
)
R3M_SUMMARY = "R3M ResNet-18's pooled features, one token, trained on videos of people at work"
R3M = replace(R3M_MAP, name="r3m", summary=R3M_SUMMARY, token_selection="pooled", grid=(1, 1))


class _ResNet(Backbone):
    """A timm ResNet up to its last map, row-major; `image_size` is a multiple of its stride."""

    def __init__(self, resnet: Any, image_size: int) -> None:
        super().__init__()
        self.resnet = resnet
        last = resnet.feature_info[-1]
        self.dims = {LAST: resnet.num_features}
        self.described = {LAST: last["module"]}
        self.grid = (image_size // last["reduction"],) * 2

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(layers, self.resnet.forward_features(images).flatten(2).mT)


@register(MAP)
@register(SPEC)
def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Load the network from the hub, from a file of timm's (and torchvision's) names, or from timm's folder of any ResNet."""
    path, source = find_weights(spec, weights)
    return _load(spec, image_size, path, read_tensors(path, spec.name, without=("fc.",)), source)


@register(R3M)
@register(R3M_MAP)
def load_r3m(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Load the network from a safetensors file of the published names, with or without prefixes; language heads are ignored."""
    if weights is None:
        raise UserError(
            f"encoder {spec.name} is published only as a pickle, which may contain code; convert its model.pt once and pass "
            f'--weights r3m.safetensors: python -c "{R3M_CONVERT}"'
        )
    tensors = read_tensors(weights, spec.name, without=R3M_HEADS)
    body = {name.removeprefix("module.").removeprefix("convnet."): value for name, value in tensors.items()}
    return _load(spec, image_size, weights, body, "file")


def _load(spec: EncoderSpec, image_size: int, path: Path, tensors: Mapping[str, Tensor], source: str) -> Loaded:
    """Make a ResNet of a timm folder's architecture, a ResNet-18 for a file, with all of its weights but the classifier's."""
    import timm
    from timm.models.resnet import ResNet

    name = f"local-dir:{path}" if path.is_dir() else ARCHITECTURE
    with reading(path / CONFIG, f"{path / CONFIG} does not describe a timm network", RESAVE):
        resnet = timm.create_model(name, num_classes=0)
    if not isinstance(resnet, ResNet):
        raise UserError(f"{path} contains a timm {type(resnet).__name__}, not a ResNet; pass weights of {spec.source}")
    with reading(path, f"{path} does not fit {spec.name}", f"pass weights of {spec.source}"):
        resnet.load_state_dict(without_batch_counts(tensors))
    backbone = _ResNet(resnet, image_size)
    backbone.config = timm_settings(path, ARCHITECTURE)
    return Loaded(backbone, Select(backbone, spec.token_selection), source)
