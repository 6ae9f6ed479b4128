"""Vision transformers as backbones, those of timm and of transformers, and the names of their sizes and selections."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE, SELECTIONS, Backbone, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.hub import find_weights
from wmcache.pipeline.encoders.registry import register


def _blocks(depth: int) -> dict[str, int]:
    """The blocks, counted from 1, whose outputs are features: the second and the sixth of 12."""
    return {EARLY: max(1, depth // 6), MIDDLE: max(1, depth // 2)}


class Vit(Backbone):
    """A vision transformer: `LAST` is the output of the final norm, `EARLY` and `MIDDLE` are outputs of blocks, without a norm."""

    def __init__(self, depth: int, dim: int, grid: tuple[int, int], prefix: int) -> None:
        """Describe a network of `depth` blocks of `dim` channels with `prefix` tokens before the patches."""
        super().__init__()
        self.blocks = _blocks(depth)
        self.dims = dict.fromkeys((EARLY, MIDDLE, LAST), dim)
        self.described = {**{name: f"block {number}" for name, number in self.blocks.items()}, LAST: "norm"}
        self.grid, self.prefix = grid, prefix


class TimmVit(Vit):
    """A timm VisionTransformer or Eva."""

    def __init__(self, vit: Any) -> None:
        """Wrap a model of `timm.create_model`."""
        super().__init__(len(vit.blocks), vit.embed_dim, tuple(vit.patch_embed.grid_size), vit.num_prefix_tokens)
        self.vit = vit

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        # timm returns each block once, ascending; both layers of a shallow network may be the same block.
        numbers = sorted({self.blocks[layer] for layer in layers if layer != LAST})
        if not numbers:
            return {LAST: self.vit.forward_features(images)}
        last, found = self.vit.forward_intermediates(
            images,
            indices=[number - 1 for number in numbers],
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
        )
        features = dict(zip(numbers, (torch.cat([prefix, patches], 1) for patches, prefix in found), strict=True))
        return {layer: last if layer == LAST else features[self.blocks[layer]] for layer in layers}


class HfVit(Vit):
    """A vision transformer of transformers that returns its hidden states."""

    def __init__(self, network: nn.Module, grid: int, *, class_token: bool, arguments: Mapping[str, Any]) -> None:
        """Wrap a network of `grid` patches a side; `arguments` are passed to every call."""
        config: Any = network.config
        prefix = class_token + getattr(config, "num_register_tokens", 0)
        super().__init__(config.num_hidden_layers, config.hidden_size, (grid, grid), prefix)
        self.network, self.arguments = network, dict(arguments)

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        deep = any(layer != LAST for layer in layers)
        found = self.network(pixel_values=images, output_hidden_states=deep, **self.arguments)
        # Hidden state 0 is the input of block 1.
        return {
            layer: found.last_hidden_state if layer == LAST else found.hidden_states[self.blocks[layer]]
            for layer in layers
        }


@dataclass(frozen=True)
class ModelSize:
    """One size of a family.

    Attributes:
        suffix: part of its encoders' names; empty for the family's default size.
        depth, dim: number of blocks and their channels.
        source, revision: where its weights come from.
        settings: of its config, where they differ from the library's defaults.
    """

    suffix: str
    title: str
    depth: int
    dim: int
    source: str
    revision: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


LoadBackbone = Callable[[EncoderSpec, ModelSize, int, Path], Backbone]
"""(spec, size, image size, file or folder of weights) -> backbone with these weights; raises UserError if they do not fit."""


def register_family(family: EncoderSpec, sizes: Sequence[ModelSize], prefix: int, load: LoadBackbone) -> None:
    """Register the encoders of a family, `<family>[-<size>][-<selection>]`.

    Args:
        family: the patch tokens of the default size.
        prefix: number of tokens before the patches; without any no class token can be selected.
    """
    rows, columns = family.token_grid
    for size in sizes:
        loader = functools.partial(
            load_variant, size, load
        )  # one for all, by which `wmcache derive` knows the backbone
        blocks = "+".join([*(f"block {number}" for number in _blocks(size.depth).values()), "norm"])
        all_tokens = (1, prefix + rows * columns) if prefix else None
        accept = f"https://huggingface.co/{size.source}" if family.accept else ""
        of_size = replace(family, token_dim=size.dim, source=size.source, revision=size.revision, accept=accept)
        changes: dict[str, dict[str, Any]] = {
            "patch": {},
            "cls": {"grid": (1, 1)},
            "pooled": {"grid": (1, 1)},
            "layers": {"grid": all_tokens, "token_dim": 3 * size.dim, "layer": blocks},
        }
        for selection in changes if prefix else changes.keys() - {"cls"}:
            parts = [family.name, size.suffix, "" if selection == "patch" else selection]
            spec = replace(
                of_size,
                name="-".join(filter(None, parts)),
                summary=f"{size.title}, {SELECTIONS[selection]}",
                token_selection=selection,
                **changes[selection],
            )
            register(family if spec.name == family.name else spec)(loader)


def load_variant(
    size: ModelSize, load: LoadBackbone, spec: EncoderSpec, image_size: int, weights: Path | None
) -> Loaded:
    """Load one encoder of a family; raises UserError without a network, or for a file or folder that does not fit."""
    path, source = find_weights(spec, weights)
    backbone = load(spec, size, image_size, path)
    return Loaded(backbone, Select(backbone, spec.token_selection), source)
