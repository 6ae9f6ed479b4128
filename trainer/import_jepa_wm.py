"""Makes runs of JEPA-WM's PointMaze checkpoints (arXiv 2512.24497; app/vjepa_wm/train.py and hubconf.py in its repository).

jepa-latest.pth.tar     epoch, and state dicts: predictor, proprio_encoder, action_encoder unless it is in the predictor, opt, scaler
*.yaml                  the settings of its training (configs/vjepa_wm), or of an evaluation (configs/evals), with `model` or `model_kwargs`

Published are `jepa_wm_pointmaze`, whose predictor is AdaLN, and `dino_wm_pointmaze`, DINO-WM trained again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from einops import rearrange
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError, command
from wmcache.common.files import sha256_of
from wmcache.common.paths import AnyPath, absolute
from wmcache.trainer.import_dino_wm import (
    entry,
    load_imported,
    read_yaml,
    require_settings,
    whole_number,
    write_run,
)
from wmcache.trainer.models import build
from wmcache.trainer.models.dino_wm import DinoWmOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.pickled_modules import AGAIN, load_modules, shown
from wmcache.trainer.train import data_shape

HINT = "it is a file of the repository's configs/"
PATCH, NORMALISATION = 14, "data_aug.normalize"
# The checkpoint's settings have no mean and deviation; its hubconf.py has these (app/plan_common/datasets).
STATISTICS: dict[str, tuple[float, ...]] = {
    "action_mean": (7.821338658686727e-05, 0.0006003659800626338),
    "action_std": (0.5769129991531372, 0.577587902545929),
    "proprio_mean": (1.8130563497543335, 1.9377127885818481, -0.0039275349117815495, -0.019777977839112282),
    "proprio_std": (1.0055010318756104, 0.9630089402198792, 1.6802769899368286, 1.9319307804107666),
}
REQUIRED: dict[str, Any] = {
    "data.datasets": ["PointMaze"],
    "data.custom.action_skip": 1,
    "data.custom.state_skip": 1,
    "data.custom.num_pred": 1,
    "data.custom.normalize_action": True,
    "model.tubelet_size_enc": 1,
    "model.proprio_encoding": "feature",
    "model.visual_encoder.enc_type": "dino",
    "model.visual_encoder.enc_version": "dinov2_vits14",
    "model.action_encoder.act_mlp": False,
    "model.proprio_encoder.proprio_tokens": 0,
    "model.proprio_encoder.prop_mlp": False,
    "model.proprio_encoder.proprio_encoder_inpred": False,
    "model.predictor.tubelet_size": 1,
    "model.wm_encoding.batchify_video": True,
    "model.wm_encoding.normalize_reps": False,
}
"""Settings that `DinoWm`, the encoder `dinov2` and the statistics implement."""
REQUIRED_OF: dict[str, dict[str, Any]] = {
    "AdaLN": {
        "model.action_conditioning": "token",
        "model.action_encoder.action_encoder_inpred": True,
        "model.predictor.use_SiLU": False,
        "model.predictor.use_rope": True,
        "model.attn.local_window_h": -1,
        "model.attn.local_window_w": -1,
    },
    "dino_wm": {"model.action_conditioning": "feature", "model.action_encoder.action_encoder_inpred": False},
}
"""Those of the predictor."""

# Name in a block of the state dict, and in a `Block`.
ADALN_BLOCK = {
    "norm1": "norm_attention",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "norm2": "norm_mlp",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
    "adaLN_modulation.1": "modulate",
}
DINO_BLOCK = {
    "0.norm": "norm_attention",
    "0.to_qkv": "qkv",
    "0.to_out.0": "out",
    "1.net.0": "norm_mlp",
    "1.net.1": "mlp.0",
    "1.net.4": "mlp.3",
}
TRAINED_WITH: dict[str, Any] = {
    "batch": 128,
    "warmup": 0.0,
    "decay": 0.0,
    "beta2": 0.999,
    "weight_decay": 1e-7,
    "clip": 1.0,
}
Weights = dict[str, Tensor]


class Imported(NamedTuple):
    """What was imported: its epoch, its predictor, and the number of its parameters."""

    epoch: int
    predictor: str
    parameters: int


class _Settings(NamedTuple):
    predictor: str
    history: int
    frameskip: int
    side: int
    image_size: int
    depth: int
    heads: int
    rollouts: int
    normalisation: Any


def import_jepa_wm(file: Path, settings: Path, cache: AnyPath, out: Path, *, overwrite: bool = False) -> Imported:
    """Make a run of a checkpoint as wmtrain would write it; wmplan and wmtrain --resume continue from it.

    Args:
        settings: YAML file of the training or of an evaluation.
        cache: a store of PointMaze's frames, encoded by DINOv2 as the settings describe it.
        out: the run's folder, written as a whole or not at all; `overwrite` replaces another run.
    """
    config = _read_settings(settings)
    store = TokenStore.open(cache)
    _check_store(store, cache, config)
    weights, options, epoch = _Reader(file, config).read()
    sizes: dict[str, Any] = {"history": config.history, "frameskip": config.frameskip, "steps": 0}
    training = TrainOptions(model_options=asdict(options), **sizes, **TRAINED_WITH)
    shape, dim = data_shape(store, training), store.card.token_dim
    statistics = {name: torch.tensor(values) for name, values in STATISTICS.items()}
    statistics |= {name: statistics[name].repeat(config.frameskip) for name in ("action_mean", "action_std")}
    statistics |= {"tokens_mean": torch.zeros(dim), "tokens_std": torch.ones(dim)}
    if shape.proprio_dim != len(statistics["proprio_mean"]):
        raise UserError(f"{cache} has {shape.proprio_dim} values of proprio, not x, y and their velocities")
    model = build("dino-wm", shape, asdict(options), statistics).eval()
    load_imported(model, weights, file, cache)
    source = {"format": "jepa-wm", "file": str(file.absolute()), "sha256": sha256_of(file), "epoch": epoch}
    about = {**asdict(training), "cache": absolute(cache), "shape": asdict(shape), "imported": source}
    write_run(out, about, store, model, training, overwrite=overwrite)
    return Imported(epoch, config.predictor, sum(value.numel() for value in model.parameters()))


def _read_settings(file: Path) -> _Settings:
    config = read_yaml(file, HINT)
    if (evaluated := entry(config, "model_kwargs")) is not None:
        config = {**evaluated, "model": entry(evaluated, "pretrain_kwargs")} if isinstance(evaluated, dict) else None
    require_settings(config, REQUIRED, file)
    kind = entry(config, "model.predictor.pred_type")
    if not isinstance(kind, str) or kind not in REQUIRED_OF:
        raise UserError(
            f"{file}: model.predictor.pred_type is {shown(kind)}; only {' or '.join(REQUIRED_OF)} can be imported"
        )
    require_settings(config, REQUIRED_OF[kind], file)
    number = partial(whole_number, config, file=file, hint=HINT)
    number("model.num_frames_pred", number("data.custom.num_hist", 1, 1024), 1024)
    if kind == "AdaLN":  # without a window there is no mask, so that frames see those after them
        number("model.attn.local_window_time", 1, 1024)
    return _Settings(
        predictor=kind,
        history=number("data.custom.num_hist", 1, 1024),
        frameskip=number("data.custom.frameskip", 1, 1024),
        side=number("model.grid_size", 1, 1024),
        image_size=number("data.img_size", PATCH, 8192),
        depth=number("model.predictor.pred_depth", 1, 1024),
        heads=number("model.predictor.pred_num_heads", 1, 1024),
        rollouts=number("model.rollout_cfg.rollout_steps", 1, 1024),
        normalisation=entry(config, NORMALISATION),
    )


def _check_store(store: TokenStore, cache: AnyPath, config: _Settings) -> None:
    """Raise UserError where the tokens are not from the encoder of the settings."""
    size = config.image_size
    found = {**vars(store.identity), "token_grid": store.card.token_grid}
    found["normalisation"] = [list(values) for values in store.identity.normalisation]
    # Frames of that size are not resized at all.
    direct = f"bilinear antialias {size}"
    wanted = {
        **{"encoder": "dinov2", "layer": "norm", "token_selection": "patch", "image_size": size},
        "resize": direct if found["resize"] == direct else f"{direct}>{size}",
        "normalisation": config.normalisation,
        "token_grid": (config.side, config.side),
    }
    different = [f"{name} {found[name]}, not {value}" for name, value in wanted.items() if found[name] != value]
    if different:
        words = ("--encoder", "dinov2", "--image-size", str(size), "--normalisation", "imagenet")
        hint = f"for jepa_wm_pointmaze make a store with: {command('wmcache', 'extract', *words)}"
        raise UserError(f"{cache} has {'; '.join(different)}; {hint}")


class _Reader:
    """Reads the weights of a checkpoint by their names in `DinoWm`; all of them are accounted for."""

    def __init__(self, file: Path, config: _Settings) -> None:
        """Read a model as its settings describe it."""
        self.file, self.config = file, config

    def read(self) -> tuple[Weights, DinoWmOptions, int]:
        """Return the weights, the model's options, and the epoch."""
        root = load_modules(self.file, lambda name: name.startswith(("torch.", "numpy.")))
        if not isinstance(root, dict) or type(epoch := root.get("epoch")) is not int:
            self._refuse("it is not a dict of state dicts with an epoch")
        predictor, proprio = self._part(root, "predictor"), self._part(root, "proprio_encoder", needed=False)
        found = self._embedding(proprio, "embed_proprio")
        size = found["embed_proprio.bias"].numel() if found else 0
        action = self._part(root, "action_encoder", needed=self.config.predictor == "dino_wm")
        if self.config.predictor == "dino_wm":
            weights, own = self._dino_wm(predictor, action)
        elif action:
            self._refuse("it has an action_encoder, which its settings have in the predictor")
        else:
            weights, own = self._adaln(predictor, size)
        options = DinoWmOptions(
            proprio="embedding" if size else "none",
            predict="frame",
            standardise=False,
            depth=self.config.depth,
            heads=self.config.heads,
            mlp=weights["blocks.0.mlp.0.bias"].numel(),
            proprio_embedding=size,
            rollout_loss=float(self.config.rollouts > 1),
            **own,
        )
        return {**found, **weights}, options, epoch

    def _adaln(self, predictor: Weights, proprio: int) -> tuple[Weights, dict[str, Any]]:
        """Read `VisionTransformerAdaLN`: projections of the patches alone become some of patches and proprio with an identity."""
        names = {"predictor_norm": "norm", "action_encoder": "embed_action"}
        ends = {"predictor_embed": "project_in", "predictor_proj": "project_out"}
        blocks = {f"predictor_blocks.{n}": f"blocks.{n}" for n in range(self.config.depth)}
        names |= {f"{at}.{name}": f"{to}.{own}" for at, to in blocks.items() for name, own in ADALN_BLOCK.items()}
        weights = self._named(predictor, names | ends)
        for end in ends.values():
            weight, bias = weights[f"{end}.weight"], weights[f"{end}.bias"]
            joined = torch.zeros(len(weight) + proprio, weight.shape[1] + proprio)
            joined[: len(weight), : weight.shape[1]] = weight
            joined[len(weight) :, weight.shape[1] :] = torch.eye(proprio)
            weights[f"{end}.weight"] = joined
            weights[f"{end}.bias"] = torch.cat([bias, torch.zeros(proprio)])
        width = weights["norm.bias"].numel()
        if width % self.config.heads:
            self._refuse(f"{self.config.heads} heads do not divide a width of {width}")
        weights["position"] = torch.zeros(self.config.side**2, width)
        own = {"condition": "adaln", "position": "rope-3d", "dropout": 0.0}
        return weights, {**own, "width": width, "head_dim": width // self.config.heads}

    def _dino_wm(self, predictor: Weights, action: Weights) -> tuple[Weights, dict[str, Any]]:
        """Read `ViTPredictor`, as in DINO-WM: its mask is that between frames, and positions of frames beyond the history are not used."""
        blocks = {f"transformer.layers.{n}": f"blocks.{n}" for n in range(self.config.depth)}
        names = {"transformer.norm": "norm"}
        names |= {f"{at}.{name}": f"{to}.{own}" for at, to in blocks.items() for name, own in DINO_BLOCK.items()}
        tokens = self.config.side**2
        position = predictor.pop("pos_embedding", None)
        if position is None or position.ndim != 3 or position.shape[1] % tokens:
            self._refuse("its pos_embedding is not one of whole frames")
        frames = rearrange(position, "1 (t n) d -> t n d", n=tokens)
        for at in blocks:
            mask = predictor.pop(f"{at}.0.bias", None)
            frame = torch.arange(len(frames) * tokens) // tokens
            if mask is not None and not torch.equal(mask[0, 0].bool(), frame[:, None] >= frame):
                self._refuse(f"{at}.0.bias is not a mask that is causal between frames")
        embedding = self._embedding(action, "embed_action")
        weights = {**self._named(predictor, names, unbiased="qkv"), **embedding}
        weights["position"] = frames[: self.config.history].contiguous()
        size = len(weights["blocks.0.qkv.weight"]) // (3 * self.config.heads)
        own = {"condition": "concat", "position": "learned", "dropout": 0.1, "width": 0, "head_dim": size}
        return weights, {**own, "embedding": embedding["embed_action.bias"].numel()}

    def _part(self, root: Mapping[Any, Any], name: str, *, needed: bool = True) -> Weights:
        """Return a state dict without the prefix that DistributedDataParallel adds."""
        found = root.get(name)
        if found is None and not needed:
            return {}
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            self._refuse(f"its {name} is not a state dict")
        if not all(value.isfinite().all() for value in found.values()):
            self._refuse(f"its {name} has values that are not finite")
        return {str(key).replace("module.", ""): value for key, value in found.items()}

    def _embedding(self, part: Weights, name: str) -> Weights:
        """Read a `ProprioceptiveEmbedding`: a convolution of one frame, which is a linear layer."""
        if not part:
            return {}
        weights = self._named(part, {"patch_embed": name})
        weight = weights[f"{name}.weight"]
        if weight.ndim != 3 or weight.shape[2] != 1:
            self._refuse(f"{name} sees more than one frame at once (tubelet_size)")
        return {**weights, f"{name}.weight": weight[..., 0].contiguous()}

    def _named(self, part: Weights, modules: Mapping[str, str], *, unbiased: str = "nothing") -> Weights:
        """Return weights and biases of these modules by their new names; every tensor of the part has to be one of them."""
        names = {
            f"{module}.{kind}": f"{name}.{kind}"
            for module, name in modules.items()
            for kind in ("weight", "bias")
            if kind == "weight" or not name.endswith(unbiased)
        }
        if different := sorted(set(part) ^ set(names)):
            self._refuse(f"{different[0][:160]} is {'missing' if different[0] in names else 'not in the reference'}")
        return {name: part[path].float() for path, name in names.items()}

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.file} cannot be imported: {reason}; compare --config, or {AGAIN}")
