"""Presets of wmtrain: values of its flags under one name. An option on the command line wins over the preset's."""

from __future__ import annotations

from typing import Any

# What conf/train.yaml of DINO-WM and of DDP-WM (14aa459) have in common.
REFERENCE: dict[str, Any] = {
    "proprio": "embedding",
    "predict": "frame",
    "standardise": False,
    "width": 0,
    "depth": 6,
    "heads": 16,
    "head-dim": 64,
    "mlp": 2048,
    "dropout": 0.1,
    "embedding": 10,
    "history": 3,
    "frameskip": 5,
    "warmup": 0.0,
    "decay": 0.0,
    "beta2": 0.999,
    "weight-decay": 1e-2,
    "decay-all": True,
    "clip": 0.0,
    "dtype": "float32",
}
# The M of World Models (arXiv 1803.10122), as its code has it (hardmaru/WorldModelsExperiments). Here each piece of an episode
# begins with an empty memory, the rate is constant, and the norm of the gradient is clipped.
WORLD_MODELS: dict[str, Any] = {
    "model": "mdn-rnn",
    "proprio": "none",
    "predict": "frame",
    "mixture": "dimension",
    "mixtures": 5,
    "sequences": "episodes",
    "latents": "drawn",
    "history": 1,
    "frameskip": 1,
    "batch-size": 100,
    "lr": 1e-3,
    "warmup": 0.0,
    "decay": 0.0,
    "beta2": 0.999,
    "weight-decay": 0.0,
    "clip": 1.0,
    "dtype": "float32",
}
PRESETS: dict[str, dict[str, Any]] = {
    # The paper's table 12 has a learning rate of 5e-5 for the predictor.
    "dino-wm": {
        **REFERENCE,
        "model": "dino-wm",
        "combine": "features",
        "condition": "concat",
        "position": "learned",
        "rollout-loss": 0.0,
        "noise": 0.0,
        "batch-size": 32,
        "epochs": 100,
        "lr": 5e-4,
    },
    # The best choices of the JEPA-WM study (arXiv 2512.24497) on its mazes; the other options keep their defaults.
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
    # Sizes of conf/predictor/ddp_predictor.yaml; K is its least.
    "ddp-wm": {
        **REFERENCE,
        "model": "ddp-wm",
        "foreground": 32,
        "locator-width": 192,
        "locator-depth": 6,
        "locator-heads": 3,
        "locator-mlp": 768,
        "fusion-heads": 4,
        "correction-heads": 4,
        "labels": "pixels",
        "batch-size": 64,
        "epochs": 10,
        "lr": 7e-4,
    },
    # Sizes of the authors' code (rsl_rl_rwm): Adam, on sequences of env steps. Reduce --batch-size on a CPU.
    "rwm": {
        "model": "rwm",
        "hidden": 256,
        "layers": 2,
        "head": 128,
        "ensemble": 1,
        "observed-steps": 32,
        "forecast": 8,
        "vary": False,
        "step-weight": 1.0,
        "frameskip": 1,
        "batch-size": 5000,
        "lr": 1e-3,
        "warmup": 0.0,
        "decay": 0.0,
        "beta2": 0.999,
        "weight-decay": 0.0,
        "clip": 1.0,
    },
    "world-models-car": {**WORLD_MODELS, "hidden": 256, "sequence": 1000, "temperature": 1.0, "steps": 4000},
    # Steps are not in the paper: its code trains 400 epochs, of 10 000 episodes.
    "world-models-doom": {
        **WORLD_MODELS,
        "hidden": 512,
        "sequence": 500,
        "end-weight": 10.0,
        "temperature": 1.15,
        "epochs": 400,
    },
}
