"""Networks of timm and transformers with weights from files and folders that a user gives; everything in these is checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.common.reading import reading
from wmcache.pipeline.encoders.base import EncoderSpec
from wmcache.pipeline.encoders.vit import HfVit, ModelSize, TimmVit
from wmcache.pipeline.encoders.weights import read_tensors, tensor_names, weights_file

CONFIG = "config.json"
RESAVE = "save the folder again with save_pretrained, or pass the .safetensors file itself"
NOT_ARITHMETIC = {
    *("image_size", "initializer_range", "vision_use_head"),
    *("stage_names", "out_features", "out_indices", "apply_layernorm", "reshape_hidden_states"),
}
"""Settings of transformers that change no token. The image size is that of the position table, which is a weight."""


@dataclass(frozen=True)
class HfFamily:
    """A family in transformers.

    Attributes:
        model, config: names of its classes.
        model_types: names of it in a folder's config; that of a larger model contains the vision tower as a part.
        class_token: whether the first token is a class token.
        arguments: of every call.
        overrides: settings for every config, whatever a folder contains.
        unused: prefixes of the names of weights that are not needed.
    """

    model: str
    config: str
    model_types: tuple[str, ...]
    class_token: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def load(self, spec: EncoderSpec, size: ModelSize, image_size: int, path: Path) -> HfVit:
        """Load a model from a file with the hub's names, for the config of that size; or from a folder with its own config.

        Raises:
            UserError: the folder is of another family, the image size does not fit its patch, or a weight is missing, unknown or of
                another shape.
        """
        import transformers

        with _quiet():
            usual = getattr(transformers, self.config)(**size.settings)
            config = self._read_config(path) if path.is_dir() else usual
            settings = hf_settings(config, usual)
            for name, value in {"return_dict": True, **self.overrides}.items():
                setattr(config, name, value)
            grid = patches_a_side(spec, image_size, config.patch_size, path)
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
        _require_fit(
            spec,
            path,
            missing=set(report["missing_keys"]),
            unknown=set(report["unexpected_keys"]),
            of_another_shape={key for key, *_ in report["mismatched_keys"]},
            unread=set(report["error_msgs"]),
        )
        backbone = HfVit(network, grid, class_token=self.class_token, arguments=self.arguments)
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
            return getattr(transformers, self.config).from_pretrained(folder, local_files_only=True)


def load_timm(timm_name: str, spec: EncoderSpec, image_size: int, path: Path) -> TimmVit:
    """Load a timm model with weights of timm's or the official names; timm interpolates positions to `image_size`.

    Args:
        timm_name: architecture of a file; the config of a folder saved by timm names its own.

    Raises:
        UserError: the weights do not fit, or the folder is of another family.
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
    patches_a_side(spec, image_size, model.patch_embed.patch_size[0], path)
    backbone = TimmVit(model)
    backbone.config = timm_settings(path, timm_name)
    return backbone


def patches_a_side(spec: EncoderSpec, image_size: int, patch: object, where: Path) -> int:
    """Return the patches a side of a network whose own config gives the patch.

    Raises:
        UserError: the image size is no multiple of the patch, or the patch is not square.
    """
    if not isinstance(patch, int) or patch <= 0:
        raise UserError(f"{where} has patches of {patch}, not square ones; pass other weights of {spec.name}")
    return replace(spec, patch=patch).patch_grid(image_size)[0]


def hf_settings(config: Any, usual: Any) -> str:
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
    """As `hf_settings`, for a folder saved by timm, whose config names an architecture and its arguments; empty for a file."""
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


def _require_fit(spec: EncoderSpec, path: Path, **faults: set[str]) -> None:
    """Raise UserError if any weight is missing, unknown, of another shape or unread; the keyword becomes the description."""
    if named := [f"{kind.replace('_', ' ')}: {_first_few(names)}" for kind, names in faults.items() if names]:
        raise UserError(f"{path} does not fit {spec.name} ({'; '.join(named)}); pass weights of {spec.source}")


def require_same(spec: EncoderSpec, path: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError if the tensors of a file are not exactly those that a network has."""
    other_shape = {name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape}
    missing, unknown = set(wanted.keys() - given.keys()), set(given.keys() - wanted.keys())
    _require_fit(spec, path, missing=missing, unknown=unknown, of_another_shape=other_shape)


def refuse_registers(spec: EncoderSpec, path: Path) -> None:
    """Raise UserError for weights with register tokens, of a family that is released with and without them."""
    last = {name.rpartition(".")[2]: name for name in tensor_names(path, spec.name)}
    if found := last.get("reg_token") or last.get("register_tokens"):
        raise UserError(f"{path} has register tokens ({found}), unlike {spec.name}; pass weights of {spec.source}")


def _first_few(names: set[str]) -> str:
    few, more = sorted(names)[:2], len(names) - 2
    return ", ".join(few) + (f" and {more} more" if more > 0 else "")


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
