"""JEPA-WM's predictor, written from its description with one channel and one pair of tokens at a time, and saved as its train.py does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIDE, DIM, WIDTH, PROPRIO, HEADS, DEPTH, HISTORY = 2, 12, 26, 4, 2, 2, 3
TOKENS = SIDE * SIDE


def turned(head: Tensor, places: tuple[int, int, int]) -> Tensor:
    """A query or key of one token after its turn by time, row and column; the last channels stay."""
    size = 2 * (len(head) // 3 // 2)
    out = head.clone()
    for axis, place in enumerate(places):
        for i in range(size):
            at = axis * size + i
            angle = place * 10_000 ** (-(i % (size // 2)) / (size // 2))
            other = -head[at + 1] if i % 2 == 0 else head[at - 1]
            out[at] = head[at] * math.cos(angle) + other * math.sin(angle)
    return out


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[L, width], frame by frame."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        places = [(n // TOKENS, n % TOKENS // SIDE, n % SIDE) for n in range(len(x))]
        rows = []
        for n in range(len(x)):
            seen = range((n // TOKENS + 1) * TOKENS)
            heads = []
            for h in range(HEADS):
                query = turned(q[n, h], places[n])
                scores = torch.stack([query @ turned(k[m, h], places[m]) for m in seen]) / math.sqrt(len(query))
                heads.append(scores.softmax(0) @ v[: len(seen), h])
            rows.append(torch.cat(heads))
        out: Tensor = self.proj(torch.stack(rows))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        out: Tensor = self.fc2(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
        return out


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x: [L, width]. z: [L, width], the action of each token's frame."""
        a, b, c, d, e, f = self.adaLN_modulation(z).chunk(6, -1)
        x = x + c * self.attn(self.norm1(x) * (1 + b) + a)
        return x + f * self.mlp(self.norm2(x) * (1 + e) + d)


class Predictor(nn.Module):
    def __init__(self, actions: int, proprio: int = PROPRIO) -> None:
        super().__init__()
        width = WIDTH + proprio
        self.predictor_embed, self.predictor_proj = nn.Linear(DIM, WIDTH), nn.Linear(WIDTH, DIM)
        self.action_encoder, self.predictor_norm = nn.Linear(actions, width), nn.LayerNorm(width, eps=1e-6)
        self.predictor_blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))

    def forward(self, tokens: Tensor, proprio: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """[T, N, D], [T, N, Q], [T, A] -> the next frame of the last one, [N, D] and [N, Q]."""
        x = torch.cat([self.predictor_embed(tokens), proprio], -1).flatten(0, 1)
        z = self.action_encoder(action).repeat_interleave(TOKENS, 0)
        for block in self.predictor_blocks:
            x = block(x, z)
        x = self.predictor_norm(x)[-TOKENS:]
        return self.predictor_proj(x[:, :WIDTH]), x[:, WIDTH:]


def make_predictor(actions: int, proprio: int = PROPRIO) -> tuple[Predictor, nn.Module | None]:
    """A predictor, and the encoder of proprio, with random weights."""
    torch.manual_seed(0)
    parts = Predictor(actions, proprio), nn.Conv1d(4, proprio, 1) if proprio else None
    for part in filter(None, parts):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.3)
    return parts


@torch.inference_mode()
def imagine(
    predictor: Any, encoder: Any, tokens: Tensor, proprio: Tensor, action: Tensor, context: int
) -> tuple[Tensor, Tensor]:
    """Roll out one episode from n frames [n, N, D], standardised proprio [n, 4] and actions [n - 1 + T, A]: latents [T, N, D] and proprio
    features [T, N, Q]."""
    seen = encoder(proprio.T).T if encoder else proprio[:, :0]
    frames, features = list(tokens), [one.expand(TOKENS, -1) for one in seen]
    for end in range(len(tokens), len(action) + 1):
        first = max(0, end - context)
        window = slice(first, end)
        following = predictor(torch.stack(frames[window]), torch.stack(features[window]), action[window])
        frames.append(following[0])
        features.append(following[1])
    return torch.stack(frames[len(tokens) :]), torch.stack(features[len(tokens) :])


def save(file: Path, predictor: Any, **encoders: Any) -> Path:
    """A checkpoint with the state of an optimiser, as DistributedDataParallel names it."""
    part = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(part.parameters())
    part(torch.ones(2)).sum().backward()
    optimiser.step()
    parts = {"predictor": predictor, **encoders}
    states = {name: {f"module.{key}": value for key, value in state.items()} for name, state in parts.items() if state}
    root = {**states, "opt": optimiser.state_dict(), "scaler": {"scale": 65536.0}, "epoch": 50}
    root["predictor"] = type(part.state_dict())(root["predictor"])
    root["predictor"]._metadata = {"": {"version": 1}}
    torch.save(root, file)
    return file


def make_settings(kind: str = "AdaLN", proprio: int = PROPRIO) -> dict[str, Any]:
    adaln = kind == "AdaLN"
    return {
        "app": "vjepa_wm",
        "data": {
            "datasets": ["PointMaze"],
            "img_size": 14 * SIDE,
            "custom": {
                **{"frameskip": 5, "action_skip": 1, "state_skip": 1, "normalize_action": True},
                **{"num_hist": HISTORY, "num_pred": 1},
            },
        },
        "data_aug": {"normalize": [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]},
        "model": {
            **{"grid_size": SIDE, "tubelet_size_enc": 1, "proprio_encoding": "feature", "num_frames_pred": 4},
            "action_conditioning": "token" if adaln else "feature",
            "visual_encoder": {"enc_type": "dino", "enc_version": "dinov2_vits14", "embed_dim": DIM},
            "action_encoder": {"act_mlp": False, "action_encoder_inpred": adaln},
            "proprio_encoder": {
                **{"proprio_tokens": 0, "proprio_emb_dim": proprio},
                **{"prop_mlp": False, "proprio_encoder_inpred": False},
            },
            "predictor": {
                **{"tubelet_size": 1, "pred_num_heads": HEADS, "pred_depth": DEPTH},
                **{"pred_type": kind, "use_SiLU": False, "use_rope": True},
            },
            "wm_encoding": {"batchify_video": True, "dup_image": False, "normalize_reps": False},
            "rollout_cfg": {"rollout_steps": 2 if adaln else 1},
            "attn": {"local_window_time": 3, "local_window_h": -1, "local_window_w": -1},
        },
    }
