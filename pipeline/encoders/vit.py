"""Vision transformers as backbones, timm's and transformers': patch tokens, the tokens before them, and intermediate blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE, SELECTIONS, Backbone, EncoderSpec
from wmcache.pipeline.encoders.weights import read_tensors, tensor_names, weights_file

CONFIG = "config.json"
RESAVE = "save the folder again with save_pretrained, or pass the .safetensors file itself"
NOT_ARITHMETIC = {
    *("image_size", "initializer_range", "vision_use_head"),
    *("stage_names", "out_features", "out_indices", "apply_layernorm", "reshape_hidden_states"),
}
"""Settings of transformers that change no token; an image's size is of the table of positions, which is a weight, or is set."""


def early_block(depth: int) -> int:
    """Which block, counted from 1, `EARLY` is the output of: the second of 12."""
    return max(1, depth // 6)


def middle_block(depth: int) -> int:
    """Which block, counted from 1, `MIDDLE` is the output of: the sixth of 12."""
    return max(1, depth // 2)


class Vit(Backbone):
    """What vision transformers share: `LAST` is after the final norm, `EARLY` and `MIDDLE` are outputs of blocks, without a norm."""

    def __init__(self, depth: int, dim: int, grid: tuple[int, int], prefix: int) -> None:
        """Args: `depth` its blocks, `dim` their channels, `grid` rows and columns of patches, `prefix` tokens before these."""
        super().__init__()
        self.blocks = {EARLY: early_block(depth), MIDDLE: middle_block(depth)}
        self.dims = dict.fromkeys((EARLY, MIDDLE, LAST), dim)
        self.described = {**{name: f"block {number}" for name, number in self.blocks.items()}, LAST: "norm"}
        self.grid, self.prefix = grid, prefix


class TimmVit(Vit):
    """A timm VisionTransformer or Eva."""

    def __init__(self, vit: nn.Module) -> None:
        """Args: `vit` as timm makes it."""
        found: Any = vit
        super().__init__(
            len(found.blocks), found.embed_dim, tuple(found.patch_embed.grid_size), found.num_prefix_tokens
        )
        self.vit = found

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        blocks = [layer for layer in layers if layer != LAST]
        if not blocks:
            return {LAST: self.vit.forward_features(images)}
        last, found = self.vit.forward_intermediates(
            images,
            indices=[self.blocks[layer] - 1 for layer in blocks],
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
        )
        # One for each block, ascending; the two of a shallow network may be the same one.
        numbers = sorted({self.blocks[layer] for layer in blocks})
        features = dict(zip(numbers, (join_prefix(patches, prefix) for patches, prefix in found), strict=True))
        return {layer: last if layer == LAST else features[self.blocks[layer]] for layer in layers}


class HfVit(Vit):
    """A vision transformer of transformers that returns its hidden states."""

    def __init__(self, network: nn.Module, grid: int, *, class_token: bool, arguments: Mapping[str, Any]) -> None:
        """Args: `network` with its config, `grid` patches a side, `class_token` whether it has one, `arguments` of its calls."""
        config: Any = network.config
        prefix = class_token + getattr(config, "num_register_tokens", 0)
        super().__init__(config.num_hidden_layers, config.hidden_size, (grid, grid), prefix)
        self.network, self.arguments = network, dict(arguments)

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        deep = any(layer != LAST for layer in layers)
        found = self.network(pixel_values=images, output_hidden_states=deep, **self.arguments)
        # The first hidden state is what goes into the first block.
        return {
            layer: found.last_hidden_state if layer == LAST else found.hidden_states[self.blocks[layer]]
            for layer in layers
        }


def join_prefix(patches: Tensor, prefix: Tensor) -> Tensor:
    """[B, N, D] and [B, P, D] -> [B, P + N, D]."""
    return torch.cat([prefix, patches], 1)


@dataclass(frozen=True)
class ModelSize:
    """One size of a family.

    Attributes:
        suffix: of its encoders' names; empty for the family's default.
        title: for people.
        depth, dim: its blocks and their channels.
        source, revision: where its weights come from.
        settings: what its config says differently from the library's defaults.
    """

    suffix: str
    title: str
    depth: int
    dim: int
    source: str
    revision: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def variants(family: EncoderSpec, size: ModelSize, prefix: int) -> list[EncoderSpec]:
    """The encoders of one size, one for each selection of its tokens.

    Args:
        family: the patch tokens of the family's default size.
        size: which.
        prefix: tokens before the patches; without any there is no class token to select.

    Returns:
        Named `<family>[-<size>][-<selection>]`, the patch tokens first.
    """
    rows, columns = family.patch_grid(family.image_size)
    blocks = f"block {early_block(size.depth)}+block {middle_block(size.depth)}+norm"
    all_tokens = (1, prefix + rows * columns) if prefix else (rows, columns)
    shapes: dict[str, tuple[tuple[int, int], int, str]] = {
        "patch": ((rows, columns), size.dim, "norm"),
        "cls": ((1, 1), size.dim, "norm"),
        "pooled": ((1, 1), size.dim, "norm"),
        "layers": (all_tokens, 3 * size.dim, blocks),
    }
    return [
        replace(
            family,
            name="-".join([family.name, *filter(None, [size.suffix, "" if selection == "patch" else selection])]),
            summary=f"{size.title}, {SELECTIONS[selection]}",
            token_dim=dim,
            layer=layer,
            token_selection=selection,
            source=size.source,
            revision=size.revision,
            accept=f"https://huggingface.co/{size.source}" if family.accept else "",
            grid=None if grid == (rows, columns) else grid,
        )
        for selection, (grid, dim, layer) in shapes.items()
        if prefix or selection != "cls"
    ]


def patches_a_side(spec: EncoderSpec, image_size: int, patch: object, where: Path) -> int:
    """Of a network whose own config has the patch.

    Raises:
        UserError: the image size is no multiple of it, or it is not square.
    """
    if not isinstance(patch, int) or patch <= 0:
        raise UserError(
            f"{where} has patches of {patch}, and only square ones are read; pass other weights of {spec.name}"
        )
    return replace(spec, patch=patch).patch_grid(image_size)[0]


def hf_settings(config: Any, usual: Any) -> str:
    """What of a network's arithmetic a config of transformers says differently from the usual one: canonical JSON, or nothing.

    Tensors do not tell heads, activations or epsilons, so that encoders of equal weights would pass for each other.
    """
    from transformers import PretrainedConfig

    theirs, known, of_all = config.to_dict(), usual.to_dict(), PretrainedConfig().to_dict()
    different = {
        name: theirs.get(name)
        for name, value in known.items()
        if theirs.get(name) != value
        and name not in {*of_all, *NOT_ARITHMETIC}
        and not name.startswith("pred_")
        and "drop" not in name
    }
    return json.dumps(different, sort_keys=True, default=str) if different else ""


def timm_settings(path: Path, usual: str) -> str:
    """As `hf_settings`, of a folder as timm saves it, whose config tells an architecture and its arguments; nothing for a file."""
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


def load_timm(timm_name: str, spec: EncoderSpec, image_size: int, path: Path) -> TimmVit:
    """A timm model with weights of timm's or the official names; position embeddings are interpolated to `image_size` by timm.

    Args:
        timm_name: the architecture that a file is of.
        spec: of what is loaded. image_size: a multiple of the model's patch.
        path: a file; or a folder as timm saves it, whose config then names the architecture.

    Raises:
        UserError: the weights do not fit, or the folder is of another family.
    """
    import timm

    name = timm_name
    if path.is_dir():
        architecture = read_json(path / CONFIG, RESAVE).get("architecture")
        if spec.name.partition("-")[0] not in str(architecture):
            raise UserError(f"{path} holds a timm {architecture}, not {spec.name}; pass weights of {spec.source}")
        name = f"local-dir:{path}"
    file = weights_file(path)
    # With as many classes as are asked for, timm loads strictly: it drops no head, and leaves nothing random.
    exact = {"file": str(file), "source": "", "num_classes": 0}
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=exact, img_size=image_size, num_classes=0
        )
    except Exception as error:  # (whatever the library makes of a stranger's config)
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{file} does not hold the weights of {timm_name} ({reason}); save them from timm's state_dict()"
        ) from error
    patches_a_side(spec, image_size, model.patch_embed.patch_size[0], path)  # type: ignore[union-attr, index]
    backbone = TimmVit(model)
    backbone.config = timm_settings(path, timm_name)
    return backbone


@dataclass(frozen=True)
class HfFamily:
    """How transformers has a family.

    Attributes:
        model, config: names of its classes.
        model_types: what a folder's config may call it; a config of more than the vision tower has that as a part.
        class_token: whether the first token is one.
        arguments: of every call.
        overrides: what every config says, whatever the folder's does.
        unused: beginnings of the names of weights in parts that are not needed.
    """

    model: str
    config: str
    model_types: tuple[str, ...]
    class_token: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def load_hf(family: HfFamily, size: ModelSize, spec: EncoderSpec, image_size: int, path: Path) -> HfVit:
    """A model of transformers.

    Args:
        family, size: which.
        spec: of what is loaded. image_size: of what it will see.
        path: a file of the hub's names, which is loaded into the config of that size; or a folder with a config of its own.

    Raises:
        UserError: the folder is of another family, the image size does not fit its patch, or a weight is missing, unknown or of another
            shape.
    """
    import transformers

    with quiet():
        usual = getattr(transformers, family.config)(**size.settings)
        config = read_config(family, path) if path.is_dir() else usual
        settings = hf_settings(config, usual)
        for name, value in {"return_dict": True, **family.overrides}.items():
            setattr(config, name, value)
        grid = patches_a_side(spec, image_size, config.patch_size, path)
        tensors = read_tensors(path, spec.name, family.unused)
        try:
            network, report = getattr(transformers, family.model).from_pretrained(
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
        except Exception as error:  # (whatever the library makes of a stranger's config)
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path} does not fit {spec.name} ({reason}); pass weights of {spec.source}") from error
    require_fit(
        spec,
        path,
        missing=set(report["missing_keys"]),
        unknown=set(report["unexpected_keys"]),
        of_another_shape={key for key, *_ in report["mismatched_keys"]},
        unread=set(report["error_msgs"]),
    )
    backbone = HfVit(network, grid, class_token=family.class_token, arguments=family.arguments)
    backbone.config = settings
    return backbone


def require_fit(spec: EncoderSpec, path: Path, **faults: set[str]) -> None:
    """Refuse, as a UserError that names them, weights that are missing, unknown, of another shape or unread."""
    if named := [f"{kind.replace('_', ' ')}: {first_few(names)}" for kind, names in faults.items() if names]:
        raise UserError(f"{path} does not fit {spec.name} ({'; '.join(named)}); pass weights of {spec.source}")


def refuse_registers(spec: EncoderSpec, path: Path) -> None:
    """Raise UserError where weights hold register tokens, of a family that has a release without and one with them."""
    last = {name.rpartition(".")[2]: name for name in tensor_names(path, spec.name)}
    if found := last.get("reg_token") or last.get("register_tokens"):
        raise UserError(
            f"{path} holds register tokens ({found}), and {spec.name} is the network without them; "
            f"pass weights of {spec.source}"
        )


def read_config(family: HfFamily, folder: Path) -> Any:
    """The config of a folder as `save_pretrained` writes it.

    Raises:
        UserError: it is missing, damaged, another model's, or for quantised weights.
    """
    import transformers

    written = read_json(folder / CONFIG, RESAVE)
    kind = written.get("model_type", written.get("architecture"))
    if kind not in family.model_types:
        raise UserError(f"{folder} holds a {kind}, not a {family.model_types[0]}; pass weights of that kind")
    if "quantization_config" in written:
        raise UserError(
            f"{folder} holds quantised weights, whose tokens would be others; pass weights in full precision"
        )
    try:
        return getattr(transformers, family.config).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # (whatever the library makes of a stranger's config)
        raise UserError(f"{folder / CONFIG} is damaged ({' '.join(str(error).split())[:160]}); {RESAVE}") from error


def first_few(names: set[str]) -> str:
    """Two of them, and how many more there are."""
    few, more = sorted(names)[:2], len(names) - 2
    return ", ".join(few) + (f" and {more} more" if more > 0 else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and reports: what is wrong is raised."""
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
