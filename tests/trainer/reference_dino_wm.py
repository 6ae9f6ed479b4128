"""DINO-WM's model, written from its description with plain masked attention, and saved as its train.py saves it."""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from wmcache.cache import Identity, StoreCard, StoreWriter
from wmcache.common.errors import UserError
from wmcache.trainer.import_dino_wm import import_dino_wm

HISTORY, FRAMESKIP, HEADS, DEPTH = 3, 5, 2, 2
TINY: dict[str, Any] = {"side": 2, "dim": 12, "embedding": 6, "heads": HEADS, "head_dim": 8, "mlp": 20, "depth": DEPTH}
REAL: dict[str, Any] = {"side": 14, "dim": 384, "embedding": 10, "heads": 16, "head_dim": 64, "mlp": 2048, "depth": 6}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, mask: Tensor, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        self.norm = nn.LayerNorm(dim)
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim), nn.Dropout(dropout))
        self.bias = mask[None, None]

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        split = [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(self.norm(x)).chunk(3, -1)
        ]
        scores = split[0] @ split[1].mT * self.scale
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, -math.inf)
        mixed = self.dropout(self.attend(scores)) @ split[2]
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        inner = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        self.net = nn.Sequential(nn.LayerNorm(dim), *inner)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, make: Callable[[], list[nn.Module]]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(nn.ModuleList(make()) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer:  # type: ignore[attr-defined]
                x = x + part(x)
        out: Tensor = self.norm(x)
        return out


class ViTPredictor(nn.Module):
    def __init__(self, tokens: int, dim: int, depth: int, heads: int, head_dim: int, mlp: int, dropout: float) -> None:
        super().__init__()
        frame = torch.arange(HISTORY * tokens) // tokens
        mask = (frame[:, None] >= frame[None]).float()
        self.num_patches, self.num_frames, self.pool = tokens, HISTORY, "mean"
        self.pos_embedding = nn.Parameter(torch.randn(1, HISTORY * tokens, dim))
        self.dropout = nn.Dropout(0.0)
        self.transformer = Transformer(
            dim, depth, lambda: [Attention(dim, heads, head_dim, mask, dropout), FeedForward(dim, mlp, dropout)]
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.transformer(self.dropout(x + self.pos_embedding[:, : x.shape[1]]))
        return out


class ProprioceptiveEmbedding(nn.Module):
    def __init__(self, in_chans: int, emb_dim: int) -> None:
        super().__init__()
        self.num_frames, self.tubelet_size, self.in_chans, self.emb_dim = 16, 1, in_chans, emb_dim
        self.patch_embed = nn.Conv1d(in_chans, emb_dim, kernel_size=1, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.patch_embed(x.mT).mT
        return out


class VQVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(3, 3, 4, stride=2)
        self.norm = nn.BatchNorm2d(3)


class DinoVisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))


class AcceleratedOptimizer:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scaler, self.device_placement, self.device = None, True, torch.device("cpu")


WHERE = {
    "models.vit": (Attention, FeedForward, Transformer, ViTPredictor),
    "models.proprio": (ProprioceptiveEmbedding,),
    "models.vqvae": (VQVAE,),
    "dinov2.models.vision_transformer": (DinoVisionTransformer,),
    "accelerate.optimizer": (AcceleratedOptimizer,),
}


def save(value: Any, file: Path, **settings: Any) -> None:
    """Save as the reference's repository does; its modules exist only while something is saved."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, classes in WHERE.items():
            module = types.ModuleType(name)
            for end in range(1, name.count(".") + 2):
                patch.setitem(sys.modules, ".".join(name.split(".")[:end]), module)
            for cls in classes:
                patch.setattr(cls, "__module__", name)
                setattr(module, cls.__name__, cls)
        torch.save(value, file, **settings)


def make_parts(concat_dim: int, sizes: dict[str, Any] = TINY, dropout: float = 0.1) -> dict[str, Any]:
    torch.manual_seed(0)
    embedding = sizes["embedding"] if concat_dim else sizes["dim"]
    tokens = sizes["side"] ** 2 + (0 if concat_dim else 2)
    width = sizes["dim"] + 2 * embedding * concat_dim
    chosen = {name: sizes[name] for name in ("depth", "heads", "head_dim", "mlp")}
    parts: dict[str, Any] = {
        "epoch": 7,
        "predictor": ViTPredictor(tokens, width, **chosen, dropout=dropout),
        "action_encoder": ProprioceptiveEmbedding(10, embedding),
        "proprio_encoder": ProprioceptiveEmbedding(4, embedding),
    }
    if sizes is TINY:
        for part in list(parts.values())[1:]:
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.3)
    return parts


def target(name: str) -> dict[str, Any]:
    return {"_target_": f"models.{name}"}


def make_hydra(concat_dim: int = 1, sizes: dict[str, Any] = TINY) -> dict[str, Any]:
    return {
        "training": {"seed": 0, "epochs": 100, "batch_size": 32, "predictor_lr": 0.0005},
        "img_size": 16 * sizes["side"],
        "frameskip": FRAMESKIP,
        "concat_dim": concat_dim,
        "normalize_action": True,
        "action_emb_dim": 10,
        "num_action_repeat": 1,
        "proprio_emb_dim": 10,
        "num_proprio_repeat": 1,
        "num_hist": HISTORY,
        "num_pred": 1,
        "has_predictor": True,
        "model": {**target("visual_world_model.VWorldModel"), "train_encoder": False, "train_predictor": True},
        "env": {"name": "point_maze", "dataset": {"n_rollout": None, "normalize_action": True}},
        "encoder": {**target("dino.DinoV2Encoder"), "name": "dinov2_vits14", "feature_key": "x_norm_patchtokens"},
        "predictor": {**target("vit.ViTPredictor"), "depth": DEPTH, "heads": HEADS, "mlp_dim": 20},
        "action_encoder": target("proprio.ProprioceptiveEmbedding"),
        "proprio_encoder": target("proprio.ProprioceptiveEmbedding"),
    }


def encode(parts: dict[str, Any], concat_dim: int, tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
    """[B, T, N (+ 2), D (+ 2 E)] from tokens and standardised proprio and actions."""
    embedded = [parts[f"{name}_encoder"](value) for name, value in (("proprio", proprio), ("action", action))]
    if concat_dim == 0:
        return torch.cat([tokens, *(part[:, :, None] for part in embedded)], 2)
    return torch.cat([tokens, *(part[:, :, None].expand(-1, -1, tokens.shape[2], -1) for part in embedded)], 3)


def predict(parts: dict[str, Any], frames: Tensor) -> Tensor:
    out: Tensor = parts["predictor"](frames.flatten(1, 2)).unflatten(1, frames.shape[1:3])
    return out


def imagine(parts: dict[str, Any], concat_dim: int, tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
    """Roll out from the observed frames; the action slots of imagined frames are overwritten."""
    observed = tokens.shape[1]
    z = encode(parts, concat_dim, tokens, proprio, action[:, :observed])
    for t in range(observed, action.shape[1] + 1):
        new = predict(parts, z[:, -HISTORY:])[:, -1:]
        if t < action.shape[1]:
            embedded = parts["action_encoder"](action[:, t : t + 1])
            if concat_dim == 0:
                new[:, :, -1] = embedded
            else:
                new[..., -embedded.shape[-1] :] = embedded[:, :, None]
        z = torch.cat([z, new], 1)
    return z[:, observed:]


def write(folder: Path, parts: Any, hydra: dict[str, Any], **settings: Any) -> Path:
    save(parts, folder / "checkpoints" / "model_latest.pth", **settings)
    (folder / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    return folder


def make_store(path: Path, side: int, dim: int, **changes: Any) -> Path:
    """4 episodes of 30 frames, of noise, as DINOv2 would have made them."""
    episodes, length = 4, 30
    rng = np.random.default_rng(0)
    frames = episodes * length
    size, half = 14 * side, (0.5, 0.5, 0.5)
    weights, resize = "timm/vit_small_patch14_dinov2.lvd142m", f"bilinear antialias {16 * side}>{size}"
    identity = Identity("dinov2", weights, "0", "norm", "patch", size, resize, (half, half), "float32", "float16", "0")
    card = StoreCard({}, {}, (side, side), dim, frames=frames, frames_per_shard=frames)
    steps: dict[str, Any] = {
        "action": rng.uniform(-1, 1, (frames, 2)).astype(np.float32),
        "state": 3 + 2 * rng.normal(size=(frames, 4)),
        "episode": np.repeat(np.arange(episodes, dtype=np.int32), length),
        "step": np.tile(np.arange(length, dtype=np.int32), episodes),
    }
    writer = StoreWriter.create(path, card, replace(identity, **changes), steps)
    writer.write_shard(0, rng.normal(size=(frames, side * side, dim)).astype(np.float16))
    writer.finish()
    return path


def refuse(theirs: Path, cache: Path, tmp_path: Path, *names: str) -> None:
    """The import fails with one line that contains these names, and writes nothing."""
    with pytest.raises(UserError) as caught:
        import_dino_wm(theirs, cache, tmp_path / "run")
    text = str(caught.value)
    assert "\n" not in text
    assert [name for name in names if name not in text] == [], text
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "canary").exists()
