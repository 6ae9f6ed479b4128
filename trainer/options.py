"""All settings of a training run, and of the training of a decoder or an actor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from wmcache.common.options import Natural, Positive, Share, ShareBelowOne, Weight, option

Precision = Literal["auto", "float32", "bfloat16"]
Rate = Annotated[float, Ge(1e-12)]
NEWER = ("perturb_tokens", "perturb_proprio", "perturb_actions")
"""Options that earlier versions had not; at their defaults they are not part of what a study's run is known by."""


@dataclass(frozen=True)
class TrainOptions:
    """All settings of a run; saved as `config.json`."""

    model: str = option("dino-wm", "World model or policy: {names}.", group="Run")
    model_options: dict[str, Any] = field(default_factory=dict)
    stage: str = option("all", "Stage to train, of a model that has several; each has --steps: all, {names}.")
    start: str | None = option(
        None,
        "Run to begin from: its weights, or for a model with stages its last finished stage.  [default: --out]",
        flag="--from",
    )
    history: Positive = option(3, "Context frames.", group="Data")
    frameskip: Positive = option(5, "Env steps between frames of a window.")
    steps: Positive = option(10_000, "Optimiser steps.", group="Training")
    epochs: Positive | None = option(None, "Passes over all windows, instead of --steps.")
    batch: Positive = option(64, "Windows in each micro-batch, of all devices together.", flag="--batch-size")
    accumulate: Positive = option(1, "Micro-batches in each step.")
    learning_rate: Rate = option(5e-4, "Learning rate of the constant phase.", flag="--lr")
    warmup: Share = option(0.05, "Share of the steps in which the learning rate rises.")
    decay: Share = option(0.3, "Share of the steps in which the learning rate falls to 0.")
    beta2: ShareBelowOne = option(0.95, "Second beta of AdamW.")
    weight_decay: Weight = option(1e-2, "Weight decay of matrices.")
    decay_all: bool = option(
        False,
        "Apply weight decay to vectors too (DINO-WM), or to matrices only.",
        flag="--decay-all/--decay-matrices",
    )
    clip: Weight = option(1.0, "Largest norm of the gradient; 0: no clipping.")
    pool: Positive = option(1, "Side of the squares of the token grid that are averaged at first; 1: none.")
    pool_until: Share = option(0.5, "Share of the steps on that coarser grid.")
    perturb_tokens: Weight = option(
        0.0,
        "Adversarial training: largest change of the tokens that the model sees, in standard deviations of each channel; 0: none.",
    )
    perturb_proprio: Weight = option(0.0, "Largest change of the proprio that it sees, in its deviations.")
    perturb_actions: Weight = option(0.0, "Largest change of the actions that it sees, in standard deviations.")
    dtype: Precision = option("auto", "Compute precision.", group="Devices")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.")
    residence: Literal["auto", "device", "ram", "disk"] = option(
        "auto", "Where tokens are kept while training; auto measures free memory."
    )
    seed: Natural = option(0, "Seed of weights, dropout and order.", group="Training")
    split_seed: Natural = option(42, "Seed of the split into train and val episodes.", group="Data")
    episodes_fraction: Annotated[float, Gt(0), Le(1)] = option(
        1.0, "Share of the train episodes; smaller ones are parts of larger ones.", flag="--fraction"
    )
    compile: bool = option(False, "Use torch.compile.", flag="--compile", group="Devices")
    log_every: Positive = option(20, "Steps between two lines of the log.", group="Logging")
    validate_every: Positive = option(500, "Steps between two validations.")
    checkpoint_every: Positive = option(500, "Steps between two checkpoints.")

    @property
    def perturbed(self) -> dict[str, float]:
        """Radii above 0, by the name of what is perturbed in a batch."""
        radii = {"tokens": self.perturb_tokens, "proprio": self.perturb_proprio, "action": self.perturb_actions}
        return {name: radius for name, radius in radii.items() if radius}


def recorded(options: TrainOptions) -> dict[str, Any]:
    """Return the options that a study's run is known by: not those at their defaults that are newer than others."""
    usual = TrainOptions()
    return {
        name: value for name, value in asdict(options).items() if name not in NEWER or value != getattr(usual, name)
    }


@dataclass(frozen=True)
class DecoderOptions:
    """All settings of a decoder; saved as `config.json`. The learning rate is Adam's, constant (DINO-WM, conf/train.yaml)."""

    decoder: str = option(
        "auto",
        "Network: auto, which takes one that suits the token grid, {names}.",
        group="Decoder",
    )
    decoder_options: dict[str, Any] = field(default_factory=dict)
    steps: Positive = option(10_000, "Optimiser steps; a higher number continues a finished decoder.", group="Training")
    batch: Positive = option(32, "Frames in each step.", flag="--batch-size")
    learning_rate: Rate = option(3e-4, "Learning rate.", flag="--lr")
    max_frames: Positive = option(20_000, "Frames to train on, a random sample that is held in memory.")
    dtype: Precision = option("auto", "Compute precision.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.")
    seed: Natural = option(0, "Seed of weights, sample and order.")
    split_seed: Natural = option(42, "Seed of the split into train and val episodes.")
    log_every: Positive = option(20, "Steps between two lines of the log.")
    checkpoint_every: Positive = option(500, "Steps between two checkpoints.")
    lpips: bool = option(True, "Try to compute LPIPS; its network is fetched once, 244 MB.")


@dataclass(frozen=True)
class ActorOptions:
    """All settings of an actor; saved in `config.json`. Defaults are DreamerV3's (arXiv 2301.04104), except sizes and the learning rate."""

    steps: Positive = option(3000, "Optimiser steps; a higher number continues a finished actor.", group="Training")
    batch: Positive = option(
        64, "Windows in each step; imagination starts from each of their frames.", flag="--batch-size"
    )
    observed: Positive = option(4, "Frames of a window.")
    horizon: Positive = option(15, "Imagined model steps.")
    discount_steps: Annotated[float, Gt(1)] = option(
        333.0, "Model steps over which rewards count: the discount is 1 - 1 / this."
    )
    trace: Share = option(0.95, "Lambda of the returns.", flag="--lambda")
    gradient: Literal["reinforce", "dynamics"] = option(
        "reinforce", "Gradients of the actor: REINFORCE, or through the world model (DreamerV2, DisWM)."
    )
    entropy: Weight | None = option(
        None, "Weight of the actor's entropy.  [default: 3e-4, with --gradient dynamics 1e-4]"
    )
    temperature: Weight | None = option(None, "Temperature of what the world model draws.  [default: 1 where it draws]")
    hindsight: Share = option(
        0.5, "Share of the goals that are later frames of the same episode; the others are any frames."
    )
    learning_rate: Rate = option(3e-4, "Learning rate.", flag="--lr")
    clip: Weight = option(100.0, "Largest norm of the gradient; 0: no clipping.")
    inputs: str | None = option(
        None,
        "What the actor sees, separated by commas: latent, hidden, cell, goal.  [default: latent,hidden; where no reward is known also "
        "goal]",
        group="Actor",
    )
    units: Positive = option(256, "Units of each hidden layer.")
    layers: Positive = option(3, "Hidden layers.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.", group="Run")
    seed: Natural = option(0, "Seed of weights, order and what is drawn.")
    log_every: Positive = option(20, "Steps between two lines of the log.")
    validate_every: Positive = option(500, "Steps between two validations.")
    checkpoint_every: Positive = option(500, "Steps between two checkpoints.")

    @property
    def entropy_weight(self) -> float:
        """Weight of the entropy, that of the gradient's source where none is given."""
        usual = 1e-4 if self.gradient == "dynamics" else 3e-4
        return usual if self.entropy is None else self.entropy
