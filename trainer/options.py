"""All settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from wmcache.common.errors import UserError

FLAGS = {"learning_rate": "lr", "weight_decay": "weight-decay"}


@dataclass(frozen=True)
class TrainOptions:
    """All settings of a run; saved as `config.json`.

    Attributes:
        model: name in `trainer.models.MODELS`. model_options: fields of its options dataclass.
        stage: of a model that is trained in stages, or `all` of them one after another; each has `steps` and a schedule of its own.
        start: a run whose finished stage the first one goes on from, where it is not the run itself.
        history: context frames. frameskip: env steps between frames.
        steps: optimiser steps. epochs: passes over all windows, which `steps` is computed from where given.
        batch: windows in each micro-batch, of all processes together. accumulate: micro-batches in each step.
        learning_rate: of the constant phase. warmup, decay: shares of the steps before and after it (warmup-constant-decay).
        beta2: of AdamW. weight_decay: of matrices; of vectors too where `decay_all`. clip: of the gradient's norm; 0 is none.
        pool, pool_until: side of the squares of the token grid that are averaged in that first share of the steps: training is cheap on the
            coarse grid, and what was learned there carries over.
        dtype: `auto`, `float32` or `bfloat16`. device: `auto`, `cpu`, `cuda`, …
        residence: where tokens are kept, `auto`, `device`, `ram` or `disk`.
        seed: of weights, dropout and order. split_seed: of the split into train and val episodes.
        episodes_fraction: share of the train episodes to train on; a smaller share is a part of every larger one.
        compile: use torch.compile.
        log_every, validate_every, checkpoint_every: steps.
    """

    model: str = "dino-wm"
    model_options: dict[str, Any] = field(default_factory=dict)
    stage: str = "all"
    start: str | None = None
    history: int = 3
    frameskip: int = 5
    steps: int = 10_000
    epochs: int | None = None
    batch: int = 64
    accumulate: int = 1
    learning_rate: float = 5e-4
    warmup: float = 0.05
    decay: float = 0.3
    beta2: float = 0.95
    weight_decay: float = 1e-2
    decay_all: bool = False
    clip: float = 1.0
    pool: int = 1
    pool_until: float = 0.5
    dtype: str = "auto"
    device: str = "auto"
    residence: str = "auto"
    seed: int = 0
    split_seed: int = 42
    episodes_fraction: float = 1.0
    compile: bool = False
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500


def check_options(options: TrainOptions) -> None:
    """Refuse, as a UserError, numbers that no run can be made of."""
    for name, least in (("learning_rate", 1e-12), ("clip", 0.0), ("weight_decay", 0.0)):
        if not least <= getattr(options, name) < math.inf:
            raise UserError(
                f"--{FLAGS.get(name, name)} is {getattr(options, name)}; it must be a number of at least {least:g}"
            )
    if not 0 < options.episodes_fraction <= 1:
        raise UserError(f"--fraction is {options.episodes_fraction}; it must be above 0 and at most 1")
