"""DINO-WM's checkpoints -> runs of ours (arXiv 2411.04983; train.py, models/vit.py, models/proprio.py in its repository).

    hydra.yaml                  the settings of its training
    checkpoints/model_*.pth     a dict of whole pickled modules: predictor, action_encoder, proprio_encoder, decoder, and their optimisers

The model of the preset `dino-wm` is the reference's, so the weights move over as they are. What a checkpoint does not hold comes from a
store: the statistics that actions and proprio are standardised by, and the identity of the encoder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from einops import rearrange
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError, command
from wmcache.common.files import sha256_of, temporary_for
from wmcache.common.jsonfiles import write_json
from wmcache.common.locks import exclusive
from wmcache.common.paths import AnyPath, absolute
from wmcache.engine.checkpoint import Progress, checkpoints, save_checkpoint
from wmcache.trainer.models import DataShape, WorldModel, build
from wmcache.trainer.models.dino_wm import DinoWmOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.pickled_modules import AGAIN, Archive, Record, StoredTensor, shown
from wmcache.trainer.runs import read_config
from wmcache.trainer.train import data_shape, make_optimiser, statistics_of

LINEAR, NORM = "torch.nn.modules.linear.Linear", "torch.nn.modules.normalization.LayerNorm"
DROPOUT, CONV = "torch.nn.modules.dropout.Dropout", "torch.nn.modules.conv.Conv1d"
SOFTMAX, GELU = "torch.nn.modules.activation.Softmax", "torch.nn.modules.activation.GELU"
SEQUENTIAL, LIST = "torch.nn.modules.container.Sequential", "torch.nn.modules.container.ModuleList"
PREDICTOR, EMBEDDING = "models.vit.ViTPredictor", "models.proprio.ProprioceptiveEmbedding"
LAYERS = "predictor.transformer.layers"

PREDICTOR_KINDS = {
    "predictor": PREDICTOR,
    "predictor.dropout": DROPOUT,
    "predictor.transformer": "models.vit.Transformer",
    "predictor.transformer.norm": NORM,
    LAYERS: LIST,
}
BLOCK_KINDS = {
    "": LIST,
    ".0": "models.vit.Attention",
    ".0.norm": NORM,
    ".0.attend": SOFTMAX,
    ".0.dropout": DROPOUT,
    ".0.to_qkv": LINEAR,
    ".0.to_out": SEQUENTIAL,
    ".0.to_out.0": LINEAR,
    ".0.to_out.1": DROPOUT,
    ".1": "models.vit.FeedForward",
    ".1.net": SEQUENTIAL,
    ".1.net.0": NORM,
    ".1.net.1": LINEAR,
    ".1.net.2": GELU,
    ".1.net.3": DROPOUT,
    ".1.net.4": LINEAR,
    ".1.net.5": DROPOUT,
}
"""Paths below the predictor, and below each of its layers -> classes."""
PREDICTOR_WEIGHTS = {
    "predictor.pos_embedding": "position",
    "predictor.transformer.norm.weight": "norm.weight",
    "predictor.transformer.norm.bias": "norm.bias",
}
BLOCK_WEIGHTS = {
    "0.norm.weight": "norm_attention.weight",
    "0.norm.bias": "norm_attention.bias",
    "0.to_qkv.weight": "qkv.weight",
    "0.to_out.0.weight": "out.weight",
    "0.to_out.0.bias": "out.bias",
    "1.net.0.weight": "norm_mlp.weight",
    "1.net.0.bias": "norm_mlp.bias",
    "1.net.1.weight": "mlp.0.weight",
    "1.net.1.bias": "mlp.0.bias",
    "1.net.4.weight": "mlp.3.weight",
    "1.net.4.bias": "mlp.3.bias",
}
"""The reference's names -> ours. Both cut the rows of to_qkv into q, k, v first, and each of these into heads."""
SETTINGS: dict[str, dict[str, Any]] = {
    NORM: {"eps": 1e-5},
    GELU: {"approximate": "none"},
    SOFTMAX: {"dim": -1},
    CONV: {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1},
}
"""What our layers do, and theirs have to."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
EXACT = (torch.float32, torch.float16, torch.bfloat16)
MOST_MODULES = 2000

KNOWN_PREFIXES = (
    "torch.nn.modules.",
    "torch.optim.",
    "accelerate.",
    "models.vit.",
    "models.proprio.",
    "models.vqvae.",
    "models.decoder.",
    "models.dino.",
    "dinov2.",
)
KNOWN_NAMES = {
    *("__builtin__.set", "__builtin__.dict", "builtins.set", "builtins.dict"),
    *("torch.device", "torch.Size", "torch.float32", "torch.float16", "torch.bfloat16"),
    "functools.partial",
}
"""What the modules and the optimisers of a checkpoint are made of. Nothing of it is ever imported: see `pickled_modules`."""

PARTS = ("predictor", "action_encoder", "proprio_encoder")
UNUSED = {"epoch", "encoder", "decoder"} | {
    f"{part}_optimizer" for part in ("encoder", "predictor", "action_encoder", "proprio_encoder", "decoder")
}

MOST_YAML_BYTES = 1_000_000
REQUIRED: dict[str, Any] = {
    "env.name": "point_maze",
    "num_pred": 1,
    "has_predictor": True,
    "num_action_repeat": 1,
    "num_proprio_repeat": 1,
    "model.train_encoder": False,
    "encoder._target_": "models.dino.DinoV2Encoder",
    "encoder.name": "dinov2_vits14",
    "encoder.feature_key": "x_norm_patchtokens",
    "predictor._target_": PREDICTOR,
    "action_encoder._target_": EMBEDDING,
    "proprio_encoder._target_": EMBEDDING,
}
"""Settings that our model, our encoder and the statistics of a store stand for, and no others."""

ROUTE = 224
"""Side that our DINOv2 resizes frames to before its own, as the reference's `img_size`."""
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        epoch: of the reference's training.
        parameters: of the model.
        standardised: whether it was trained on standardised actions and proprio.
    """

    epoch: int
    parameters: int
    standardised: bool


@dataclass(frozen=True)
class _Settings:
    """What hydra.yaml says of the model."""

    history: int
    frameskip: int
    concat_dim: int
    image_size: int
    standardised: bool
    rollouts: int | None


def import_dino_wm(
    folder: Path, cache: AnyPath, out: Path, *, checkpoint: str = "latest", overwrite: bool = False
) -> Imported:
    """Make a run of a DINO-WM checkpoint, as wmtrain would have left it; wmplan and wmtrain --resume take it from there.

    Args:
        folder: with hydra.yaml and checkpoints/.
        cache: a store of the frames that the model was trained on, encoded by DINOv2 as the reference does.
        out: the run's folder, which is there whole or not at all.
        checkpoint: `latest`, or the number of an epoch.
        overwrite: replace another run.

    Raises:
        UserError: files that are missing, damaged, or hold what no DINO-WM checkpoint needs; settings that our model cannot express;
            a store that the model cannot work on; a folder that is another run.
    """
    settings = _read_settings(folder / "hydra.yaml")
    store = TokenStore.open(cache)
    _check_store(store, cache, settings, folder / "hydra.yaml")
    file = folder / "checkpoints" / f"model_{checkpoint}.pth"
    with Archive(file) as archive:
        root = archive.load(_is_known)
        weights, options, epoch = _Reader(archive, settings).read(root)
    training = TrainOptions(
        model_options=asdict(options),
        history=settings.history,
        frameskip=settings.frameskip,
        steps=0,
        batch=32,
        warmup=0.0,
        decay=0.0,
        beta2=0.999,
        decay_all=True,
        clip=0.0,
        dtype="float32",
    )
    shape = data_shape(store, training)
    statistics = statistics_of(store, settings.frameskip)
    if not settings.standardised:
        for name, value in statistics.items():
            if not name.startswith("tokens"):
                value.fill_(float(name.endswith("std")))
    model = _make_model(file, cache, shape, asdict(options), statistics, weights)
    source = {"format": "dino-wm", "file": str(file.absolute()), "sha256": sha256_of(file), "epoch": epoch}
    config = {**asdict(training), "cache": absolute(cache), "shape": asdict(shape), "imported": source}
    _write(out, config, store, model, training, overwrite=overwrite)
    return Imported(epoch, sum(value.numel() for value in model.parameters()), settings.standardised)


def _is_known(name: str) -> bool:
    return name in KNOWN_NAMES or name.startswith(KNOWN_PREFIXES)


def _read_settings(file: Path) -> _Settings:
    hint = "it is what train.py of DINO-WM writes beside checkpoints/"
    try:
        if file.stat().st_size > MOST_YAML_BYTES:
            raise UserError(f"{file} is too large to be settings; {hint}")
        config = yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; {hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:160]}); {hint}") from error

    def get(name: str, default: Any = None) -> Any:
        value = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def number(name: str, least: int, most: int, default: int | None = None) -> int:
        value = get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{file}: {name} is {shown(value)}, not a whole number from {least} to {most}; {hint}")
        return value

    for name, needed in REQUIRED.items():
        if (value := get(name)) != needed or type(value) is not type(needed):
            raise UserError(f"{file}: {name} is {shown(value)}; only checkpoints with {needed!r} can be imported")
    standardised = get("env.dataset.normalize_action", get("normalize_action"))
    if type(standardised) is not bool:
        raise UserError(f"{file}: normalize_action is {shown(standardised)}, not true or false; {hint}")
    return _Settings(
        history=number("num_hist", 1, 1024),
        frameskip=number("frameskip", 1, 1024),
        concat_dim=number("concat_dim", 0, 1),
        image_size=number("img_size", 16, 8192),
        standardised=standardised,
        rollouts=None if get("env.dataset.n_rollout") is None else number("env.dataset.n_rollout", 1, 2**31),
    )


def _check_store(store: TokenStore, cache: AnyPath, settings: _Settings, file: Path) -> None:
    """Refuse tokens that are not what the reference's encoder gives (models/visual_world_model.py)."""
    side = settings.image_size // 16
    identity = store.identity
    wanted = {
        "encoder": "dinov2",
        "layer": "norm",
        "token_selection": "patch",
        "image_size": 14 * side,
        "resize": f"bilinear antialias {settings.image_size}>{14 * side}",
        "normalisation": HALF,
    }
    different = [
        f"{name} {getattr(identity, name)}, not {value}"
        for name, value in wanted.items()
        if getattr(identity, name) != value
    ]
    if store.card.token_grid != (side, side):
        different.append(f"a grid of {store.card.token_grid} tokens, not {(side, side)}")
    if different:
        hint = "only checkpoints with img_size 224 see what our encoder sees"
        if settings.image_size == ROUTE:
            hint = f"make a store as the checkpoint's with: {command('wmcache', 'extract', '--encoder', 'dinov2')}"
        raise UserError(f"{cache} has {'; '.join(different)}; {hint}")
    episodes = int(store.episode.max()) + 1
    if settings.standardised and settings.rollouts not in (None, episodes):
        raise UserError(
            f"{file}: env.dataset.n_rollout is {settings.rollouts}, but {cache} has {episodes} episodes, so that actions would be "
            "standardised by another mean; extract a dataset of just those episodes"
        )


class _Reader:
    """Weights by our names, out of modules of which every part is accounted for."""

    def __init__(self, archive: Archive, settings: _Settings) -> None:
        self.archive, self.settings = archive, settings

    def read(self, root: object) -> tuple[dict[str, Tensor], DinoWmOptions, int]:
        """The weights, the options of the model that they fit, and the epoch."""
        if not isinstance(root, dict):
            raise self._refusal("it holds no dict of modules")
        if unknown := [str(name)[:80] for name in root if name not in (*PARTS, *UNUSED)]:
            raise self._refusal(f"it holds {', '.join(unknown[:5])}, which train.py of DINO-WM does not save")
        if missing := [name for name in (*PARTS, "epoch") if name not in root]:
            raise self._refusal(f"it lacks {', '.join(missing)}")
        if type(epoch := root["epoch"]) is not int:
            raise self._refusal("its epoch is no number")
        embedding: dict[str, int] = {}
        weights: dict[str, Tensor] = {}
        for part, name in (("action_encoder", "embed_action"), ("proprio_encoder", "embed_proprio")):
            weights |= self._embedding(root[part], part, name)
            embedding[part] = weights[f"{name}.bias"].numel()
        if len(set(embedding.values())) != 1:
            both = " and ".join(f"{part} makes {size}" for part, size in embedding.items())
            raise self._refusal(f"{both} dimensions, where our model has one number for both")
        sizes, blocks = self._predictor(root["predictor"])
        options = DinoWmOptions(
            combine="features" if self.settings.concat_dim else "tokens",
            proprio="embedding",
            predict="frame",
            standardise=False,
            width=0,
            embedding=embedding["action_encoder"],
            **sizes,
        )
        return weights | blocks, options, epoch

    def _predictor(self, record: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The sizes of the transformer, and its weights."""
        modules, tensors = self._flatten(record, "predictor")
        layers = f"{LAYERS}."
        numbers = range(len([name for name in modules if name.startswith(layers) and "." not in name[len(layers) :]]))
        self._check_kinds(
            modules,
            PREDICTOR_KINDS
            | {f"{LAYERS}.{number}{part}": kind for number in numbers for part, kind in BLOCK_KINDS.items()},
        )
        weights = self._weights(
            tensors,
            PREDICTOR_WEIGHTS
            | {
                f"{LAYERS}.{number}.{theirs}": f"blocks.{number}.{ours}"
                for number in numbers
                for theirs, ours in BLOCK_WEIGHTS.items()
            },
        )
        side, history = self.settings.image_size // 16, self.settings.history
        tokens, position = side * side + 2 * (not self.settings.concat_dim), weights["position"]
        if position.ndim != 3 or position.shape[:2] != (1, history * tokens):
            raise self._refusal(
                f"predictor.pos_embedding is {tuple(position.shape)}, where hydra.yaml makes it (1, {history * tokens}, ...)"
            )
        weights["position"] = rearrange(position, "1 (h n) d -> h n d", h=history).contiguous()
        heads = {
            self._heads(modules[f"{LAYERS}.{number}.0"].state, weights[f"blocks.{number}.qkv.weight"], tokens)
            for number in numbers
        }
        dropouts = [
            module.state.get("p")
            for name, module in modules.items()
            if module.kind == DROPOUT and name.startswith(layers)
        ]
        if modules["predictor.dropout"].state.get("p") != 0:
            raise self._refusal("the predictor's embeddings have dropout (emb_dropout), which our model has not")
        if len(heads) != 1 or any(value != dropouts[0] for value in dropouts):
            raise self._refusal("the predictor has no blocks, or blocks of different heads or dropouts")
        if not isinstance(dropouts[0], int | float) or not 0 <= dropouts[0] < 1:
            raise self._refusal(f"the predictor's dropout is {shown(dropouts[0])}")
        ((count, size),) = heads
        sizes: dict[str, Any] = {"depth": len(numbers), "heads": count, "head_dim": size, "dropout": dropouts[0]}
        return {**sizes, "mlp": weights["blocks.0.mlp.0.bias"].numel()}, weights

    def _heads(self, attention: dict[str, Any], qkv: Tensor, tokens: int) -> tuple[int, int]:
        """Number and size of the heads, which no weight tells; refuses another scale or another mask than ours."""
        heads = attention.get("heads")
        if type(heads) is not int or heads < 1 or qkv.ndim != 2 or not len(qkv) or len(qkv) % (3 * heads):
            raise self._refusal(f"the predictor has {shown(heads)} heads, which do not divide its to_qkv")
        size = len(qkv) // (3 * heads)
        if attention.get("scale") != size**-0.5:
            raise self._refusal(f"the predictor scales by {shown(attention.get('scale'))}, not by {size}**-0.5")
        mask, side = attention.get("bias"), self.settings.history * tokens
        if not isinstance(mask, StoredTensor) or mask.shape != (1, 1, side, side) or not self._is_causal(mask, tokens):
            raise self._refusal("the predictor's mask (Attention.bias) is not causal from frame to frame")
        return heads, size

    def _is_causal(self, mask: StoredTensor, tokens: int) -> bool:
        frame = torch.arange(mask.shape[-1]) // tokens
        return torch.equal(self.archive.read(mask)[0, 0].bool(), frame[:, None] >= frame)

    def _embedding(self, record: object, part: str, name: str) -> dict[str, Tensor]:
        modules, tensors = self._flatten(record, part)
        self._check_kinds(modules, {part: EMBEDDING, f"{part}.patch_embed": CONV})
        weights = self._weights(
            tensors,
            {f"{part}.patch_embed.weight": f"{name}.weight", f"{part}.patch_embed.bias": f"{name}.bias"},
        )
        if weights[f"{name}.weight"].ndim != 3 or weights[f"{name}.weight"].shape[2] != 1:
            raise self._refusal(f"{part} looks at more than one frame at once (tubelet_size)")
        weights[f"{name}.weight"] = weights[f"{name}.weight"][..., 0].contiguous()
        return weights

    def _flatten(self, root: object, where: str) -> tuple[dict[str, Record], dict[str, StoredTensor]]:
        """All modules and all parameters below a module, by their paths."""
        modules: dict[str, Record] = {}
        tensors: dict[str, StoredTensor] = {}
        waiting = [(where, root)]
        while waiting:
            path, record = waiting.pop()
            # Modules of a damaged file may hold themselves.
            if len(modules) >= MOST_MODULES:
                raise self._refusal(f"{where} has more than {MOST_MODULES} modules")
            if not isinstance(record, Record) or not isinstance(record.state, dict):
                raise self._refusal(f"{path[:160]} is no module")
            modules[path] = record
            for group in ("_parameters", "_buffers", "_modules", *HOOKS):
                entries = record.state.get(group, {})
                if not isinstance(entries, dict) or any(type(name) is not str or len(name) > 64 for name in entries):
                    raise self._refusal(f"{path[:160]}.{group} is no dict")
                if entries and group in HOOKS:
                    raise self._refusal(f"{path[:160]} has hooks, which change what it computes")
                for name, value in entries.items():
                    below = f"{path}.{name}"
                    if group == "_modules":
                        waiting.append((below, value))
                    elif isinstance(value, StoredTensor):
                        tensors[below] = value
                    elif value is not None:
                        raise self._refusal(f"{below[:160]} is no tensor")
        return modules, tensors

    def _check_kinds(self, modules: Mapping[str, Record], kinds: Mapping[str, str]) -> None:
        """Refuse, by name, modules that are not there, not of the class that they should be, too many, or set to something else."""
        for name in sorted({*modules, *kinds}, key=lambda name: (name.count("."), name)):
            found = modules[name].kind if name in modules else "missing"
            if found != (wanted := kinds.get(name, "not in the reference")):
                raise self._refusal(
                    f"{name[:160]} is {found}, not {wanted}" if name in kinds else f"{name[:160]} ({found}) is {wanted}"
                )
            for setting, needed in SETTINGS.get(found, {}).items():
                if (value := modules[name].state.get(setting, needed)) != needed:
                    raise self._refusal(f"{name}.{setting} is {shown(value)}, not {needed!r}")

    def _weights(self, tensors: Mapping[str, StoredTensor], names: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors by our names, float32; refuses, by name, those that are missing, too many, of another type, or not finite."""
        if different := sorted(set(tensors) ^ set(names)):
            raise self._refusal(
                f"{different[0][:160]} is {'missing' if different[0] in names else 'not in the reference'}"
            )
        weights = {}
        for theirs, ours in names.items():
            if (dtype := tensors[theirs].storage.dtype) not in EXACT:
                raise self._refusal(f"{theirs} is {dtype}, which float32 cannot hold")
            weights[ours] = self.archive.read(tensors[theirs]).float()
            if not torch.isfinite(weights[ours]).all():
                raise self._refusal(f"{theirs} holds values that are not finite")
        return weights

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.archive.path} cannot be imported: {reason}; {AGAIN}")


def _make_model(
    file: Path,
    cache: AnyPath,
    shape: DataShape,
    options: Mapping[str, Any],
    statistics: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> WorldModel:
    """The model with the weights; raises UserError where they do not fit the store."""
    with torch.device("meta"):
        sizes = {
            name: tuple(value.shape) for name, value in build("dino-wm", shape, options, statistics).named_parameters()
        }
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if different := sorted(name for name in {*sizes, *found} if sizes.get(name) != found.get(name)):
        name = different[0]
        raise UserError(
            f"{file} does not fit {cache}: {name} is {found.get(name)}, where the store and hydra.yaml make it {sizes.get(name)}; "
            "use a store of the frames that the model was trained on"
        )
    model = build("dino-wm", shape, options, statistics)
    model.load_state_dict(weights, strict=False)  # the rest are the statistics
    return model.eval()


def _write(
    out: Path, config: dict[str, Any], store: TokenStore, model: WorldModel, training: TrainOptions, *, overwrite: bool
) -> None:
    """Write the run beside its place, then move it there."""
    with exclusive(out.with_name(f".{out.name}.lock"), out, wait=False) as alone:
        if not alone:
            raise UserError(f"another program is at work on {out}; wait for it, or choose another --out")
        if out.exists() and any(out.iterdir()):
            if not ((out / "config.json").exists() and (out / "identity.json").exists()):
                raise UserError(f"{out} exists and is not a run of ours; choose another --out")
            if not overwrite and checkpoints(out) and read_config(out) == json.loads(json.dumps(config)):
                return
            if not overwrite:
                raise UserError(f"{out} is another run; choose another --out")
        optimiser = make_optimiser(model, training)
        for parameter in model.parameters():
            # As if it had not stepped yet, so that wmtrain --resume begins with the weights and nothing else.
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        temporary = temporary_for(out)
        try:
            save_checkpoint(temporary, Progress(), model, optimiser)
            write_json(temporary / "identity.json", {"identity": store.identity.to_json(), "card": asdict(store.card)})
            write_json(temporary / "config.json", config)
            (temporary / "metrics.jsonl").touch()
            if out.exists():
                shutil.rmtree(out)
            temporary.rename(out)
        except OSError as error:
            raise UserError(
                f"cannot write {out}: {error.strerror or error}; free space or choose another --out"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
