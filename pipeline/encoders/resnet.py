"""ResNet-18 (arXiv 1512.03385) trained on ImageNet, torchvision's first weights: its last map, or the mean of that, one token of 512.

Frames are resized whole to 224 px; the published transform crops their margins. The network is timm's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from wmcache.common.errors import UserError, reason
from wmcache.common.jsonfiles import read_json
from wmcache.common.reading import reading
from wmcache.pipeline.encoders.base import LAST, Backbone, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.hub import find_weights
from wmcache.pipeline.encoders.libraries import CONFIG, RESAVE, timm_settings
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.weights import read_tensors

ARCHITECTURE = "resnet18"

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
SPEC = replace(
    MAP,
    name="resnet18",
    summary="ResNet-18's pooled features, one token, supervised on ImageNet",
    token_selection="pooled",
    grid=(1, 1),
)


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
    backbone = load_backbone(spec, image_size, path, read_tensors(path, spec.name, without=("fc.",)))
    return Loaded(backbone, Select(backbone, spec.token_selection), source)


def load_backbone(spec: EncoderSpec, image_size: int, path: Path, tensors: Mapping[str, Tensor]) -> Backbone:
    """Make a ResNet with all of its weights but the classifier's; raises UserError if they do not fit."""
    resnet = _make_resnet(path)
    # The number of batches behind a statistic changes no token and not every file contains it: it is no part of the identity.
    kept = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    try:
        resnet.load_state_dict(kept)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit {spec.name} ({reason(error, 200)}); pass weights of {spec.source}"
        ) from error
    backbone = _ResNet(resnet, image_size)
    backbone.config = timm_settings(path, ARCHITECTURE)
    return backbone


def _make_resnet(path: Path) -> Any:
    """Make a timm ResNet without classifier and weights: of the architecture in a timm folder, a ResNet-18 for a file."""
    import timm
    from timm.models.resnet import ResNet

    if not path.is_dir():
        return timm.create_model(ARCHITECTURE, num_classes=0)
    architecture = read_json(path / CONFIG, RESAVE).get("architecture")
    if not isinstance(architecture, str):
        raise UserError(f"{path / CONFIG} names no timm architecture; save the folder with timm.models.save_for_hf")
    with reading(path / CONFIG, f"{path / CONFIG} is damaged", RESAVE):
        resnet = timm.create_model(f"local-dir:{path}", num_classes=0)
    if not isinstance(resnet, ResNet):
        raise UserError(f"{path} contains a timm {architecture}, not a ResNet; pass weights of that kind")
    return resnet
