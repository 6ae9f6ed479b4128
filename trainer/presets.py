"""Presets: what wmtrain is told by one name, by its flags. An option that is given beside `--preset` wins."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # conf/train.yaml of the reference; its paper's table 12 has a learning rate of 5e-5 for the predictor.
    "dino-wm": {
        "model": "dino-wm",
        "combine": "features",
        "condition": "concat",
        "proprio": "embedding",
        "predict": "frame",
        "position": "learned",
        "standardise": False,
        "width": 0,
        "depth": 6,
        "heads": 16,
        "head-dim": 64,
        "mlp": 2048,
        "dropout": 0.1,
        "embedding": 10,
        "rollout-loss": 0.0,
        "noise": 0.0,
        "history": 3,
        "frameskip": 5,
        "batch-size": 32,
        "epochs": 100,
        "lr": 5e-4,
        "warmup": 0.0,
        "decay": 0.0,
        "beta2": 0.999,
        "weight-decay": 1e-2,
        "decay-all": True,
        "clip": 0.0,
        "dtype": "float32",
    },
    # What the JEPA-WM study (arXiv 2512.24497) found best on its mazes, on top of ours.
    "jepa-wm": {
        "model": "dino-wm",
        "condition": "adaln",
        "position": "rope",
        "embedding": 16,
        "rollout-loss": 1.0,
        "depth": 6,
        "heads": 16,
        "head-dim": 64,
        "mlp": 2048,
    },
}
