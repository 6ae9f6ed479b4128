"""Vision transformers of timm and transformers as backbones, with weights from files and folders that a user gives.

Everything in these files and folders is checked. A family registers its encoders by `register_family`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.common.reading import reading
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE, SELECTIONS, Backbone, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.hub import find_weights
from wmcache.pipeline.encoders.registry import register
from wmcache.pipeline.encoders.weights import read_tensors, weights_file

CONFIG = "config.json"
RESAVE = "save the folder again with save_pretrained, or pass the .safetensors file itself"
NOT_ARITHMETIC = {
    *("image_size", "crop_size", "initializer_range", "vision_use_head"),
    *("stage_names", "out_features", "out_indices", "apply_layernorm", "reshape_hidden_states"),
}
"""Settings of transformers that change no token. The image size is that of the position table, which is a weight."""


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
        indices = [number - 1 for number in numbers]
        last, found = self.vit.forward_intermediates(
            images, indices=indices, return_prefix_tokens=True, norm=False, output_fmt="NLC"
        )
        features = dict(zip(numbers, (torch.cat([prefix, patches], 1) for patches, prefix in found), strict=True))
        return {layer: last if layer == LAST else features[self.blocks[layer]] for layer in layers}


class HfVit(Vit):
    """A vision transformer of transformers that returns its hidden states."""

    def __init__(self, network: Any, grid: int, *, class_token: bool = True, **arguments: Any) -> None:
        """Wrap a network of `grid` patches a side; `arguments` are passed to every call."""
        config = network.config
        prefix = class_token + getattr(config, "num_register_tokens", 0)
        super().__init__(config.num_hidden_layers, config.hidden_size, (grid, grid), prefix)
        self.network, self.arguments = network, arguments

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
        family: the patch tokens of the default size; `accept` is the site of each size's page.
        prefix: number of tokens before the patches; without any no class token can be selected.
    """
    rows, columns = family.token_grid
    for size in sizes:
        loader = functools.partial(load_variant, size, load)  # one for all: `wmcache derive` compares it
        blocks = "+".join([*(f"block {number}" for number in _blocks(size.depth).values()), "norm"])
        all_tokens = (1, prefix + rows * columns) if prefix else None
        accept = family.accept and f"{family.accept}/{size.source}"
        of_size = replace(family, token_dim=size.dim, source=size.source, revision=size.revision, accept=accept)
        changes: dict[str, dict[str, Any]] = {
            "patch": {},
            "cls": {"grid": (1, 1)},
            "pooled": {"grid": (1, 1)},
            "layers": {"grid": all_tokens, "token_dim": 3 * size.dim, "layer": blocks},
        }
        for selection in changes if prefix else changes.keys() - {"cls"}:
            name = "-".join(filter(None, [family.name, size.suffix, "" if selection == "patch" else selection]))
            summary = family.summary if name == family.name else f"{size.title}, {SELECTIONS[selection]}"
            spec = replace(of_size, name=name, summary=summary, token_selection=selection, **changes[selection])
            register(spec)(loader)


def load_variant(
    size: ModelSize, load: LoadBackbone, spec: EncoderSpec, image_size: int, weights: Path | None
) -> Loaded:
    """Load one encoder of a family; raises UserError without a network, or for a file or folder that does not fit."""
    path, source = find_weights(spec, weights)
    backbone = load(spec, size, image_size, path)
    return Loaded(backbone, Select(backbone, spec.token_selection), source)


@dataclass(frozen=True)
class HfFamily:
    """A family in transformers.

    Attributes:
        model, config: names of its classes.
        model_types: names of it, or of a larger model that contains it, in a folder's config.
        wrap: (network, patches a side) -> backbone.
        overrides, required: settings for every config, and those that a folder's config must have.
        unused: prefixes of the names of weights that are not needed.
    """

    model: str
    config: str
    model_types: tuple[str, ...]
    wrap: Callable[[Any, int], Backbone] = HfVit
    overrides: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def load(self, spec: EncoderSpec, size: ModelSize, image_size: int, path: Path) -> Backbone:
        """Load a model from a file with the hub's names, for the config of that size; or from a folder with its own config.

        Raises:
            UserError: the folder is of another family, the image size does not fit its patch, or a weight is missing, unknown or of
                another shape.
        """
        import transformers

        with _quiet():
            usual = getattr(transformers, self.config)(**size.settings)
            config = self._read_config(path) if path.is_dir() else usual
            settings = _different_settings(config, usual)
            # V-JEPA 2 derives its rotary positions from the crop size; the other families do not read it.
            for name, value in {"return_dict": True, "crop_size": image_size, **self.overrides}.items():
                setattr(config, name, value)
            grid = _patches_a_side(spec, image_size, config.patch_size, path)
            tensors = read_tensors(path, spec.name, self.unused)
            with reading(path, f"{path} does not fit {spec.name}", f"pass weights of {spec.source}"):
                network, report = getattr(transformers, self.model).from_pretrained(
                    None,
                    config=config,
                    state_dict=tensors,
                    dtype=torch.float32,
                    attn_implementation="sdpa",
                    local_files_only=True,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        faults = {
            "missing": [name for name in report["missing_keys"] if not name.startswith(self.unused)],
            "unknown": report["unexpected_keys"],
            "of another shape": [name for name, *_ in report["mismatched_keys"]],
            "unread": report["error_msgs"],
        }
        if named := [f"{len(names)} {kind}: {', '.join(sorted(names)[:2])}" for kind, names in faults.items() if names]:
            raise UserError(f"{path} does not fit {spec.name} ({'; '.join(named)}); pass weights of {spec.source}")
        backbone = self.wrap(network, grid)
        backbone.config = settings
        return backbone

    def _read_config(self, folder: Path) -> Any:
        import transformers

        written = read_json(folder / CONFIG, RESAVE)
        kind = written.get("model_type", written.get("architecture"))
        if kind not in self.model_types:
            raise UserError(f"{folder} contains a {kind}, not a {self.model_types[0]}; pass weights of that kind")
        if "quantization_config" in written:
            raise UserError(f"{folder} contains quantised weights, which give other tokens; pass full precision")
        with reading(folder / CONFIG, f"{folder / CONFIG} is damaged", RESAVE):
            config = getattr(transformers, self.config).from_pretrained(folder, local_files_only=True)
        for name, value in self.required.items():
            if (found := getattr(config, name)) != value:
                raise UserError(f"{folder} has a {name} of {found}, not {value}; pass other weights")
        return config


def load_timm(timm_name: str, spec: EncoderSpec, image_size: int, path: Path) -> TimmVit:
    """Load a timm model with weights of timm's or the official names; timm interpolates positions to `image_size`.

    `timm_name` is the architecture of a file; a folder names its own. Raises UserError if that is of another family, or weights do not fit.
    """
    import timm

    name = timm_name
    if path.is_dir():
        architecture = read_json(path / CONFIG, RESAVE).get("architecture")
        if spec.name.partition("-")[0] not in str(architecture):
            raise UserError(f"{path} contains a timm {architecture}, not {spec.name}; pass weights of {spec.source}")
        name = f"local-dir:{path}"
    file = weights_file(path)
    # With num_classes as in the file, timm loads strictly: it drops no head and leaves no weight random.
    exact = {"file": str(file), "source": "", "num_classes": 0}
    with reading(file, f"{file} does not contain the weights of {timm_name}", "save them from timm's state_dict()"):
        model: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=exact, img_size=image_size, num_classes=0
        )
    _patches_a_side(spec, image_size, model.patch_embed.patch_size[0], path)
    backbone = TimmVit(model)
    backbone.config = timm_settings(path, timm_name)
    return backbone


def _patches_a_side(spec: EncoderSpec, image_size: int, patch: object, where: Path) -> int:
    """Return the patches a side of a network whose own config gives the patch."""
    if not isinstance(patch, int) or patch <= 0:
        raise UserError(f"{where} has patches of {patch}, not square ones; pass other weights of {spec.name}")
    return replace(spec, patch=patch).patch_grid(image_size)[0]


def _different_settings(config: Any, usual: Any) -> str:
    """Return the settings of the arithmetic that differ from the usual config of transformers: canonical JSON, or empty.

    Tensors do not show heads, activations or epsilons: without this, two encoders with equal weights would have one identity.
    """
    from transformers import PretrainedConfig

    found, ignored = config.to_dict(), {*PretrainedConfig().to_dict(), *NOT_ARITHMETIC}
    different = {
        name: found.get(name)
        for name, value in usual.to_dict().items()
        if found.get(name) != value and name not in ignored and not name.startswith("pred_") and "drop" not in name
    }
    return json.dumps(different, sort_keys=True, default=str) if different else ""


def timm_settings(path: Path, usual: str) -> str:
    """Return the same for a folder saved by timm, whose config names an architecture and its arguments; empty for a file."""
    if not path.is_dir():
        return ""
    written = read_json(path / CONFIG, RESAVE)
    architecture = str(written.get("architecture")).partition(".")[0]
    arguments = {
        name: value
        for name, value in (written.get("model_args") or {}).items()
        if name not in ("img_size", "num_classes") and "drop" not in name
    }
    if architecture == usual.partition(".")[0] and not arguments:
        return ""
    return json.dumps({"architecture": architecture, "model_args": arguments}, sort_keys=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports."""
    from transformers import utils

    logging: Any = utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
