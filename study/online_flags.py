"""Settings of online training that are flags of its command; it imports nothing large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from wmcache.common.options import Natural, Positive, Share, option
from wmcache.pipeline.options import CollectOptions
from wmcache.trainer.options import TrainOptions

ENCODER = "vae"
EPISODES = 10
"""Of each evaluation."""


@dataclass(frozen=True)
class OnlineCollect(CollectOptions):
    """How all parts are collected; `policy` is that of the prefill, and `episodes` are not used: a part has env steps."""

    env: str = option(CollectOptions.env, group="Collection")
    length: Annotated[int, Ge(2)] = option(201)
    image_size: Annotated[int, Ge(8), Le(2048)] = option(64)


@dataclass(frozen=True)
class OnlineTrain(TrainOptions):
    """How the world model is trained, at a constant learning rate; the ratio sets the steps."""

    model: str = option("rssm", "World model: {names}.", group="Training")
    frameskip: Positive = option(2, group="Training")
    warmup: Share = option(0.0)
    decay: Share = option(0.0)


@dataclass(frozen=True)
class OnlineFlags:
    """How long, how much in each part, and how much training."""

    steps: Positive = option(
        20_000, "Env steps to collect in all, at least; a higher number goes on after the last part.", group="Online"
    )
    prefill: Positive = option(2000, "Env steps that a behaviour policy collects before the first training.")
    every: Positive = option(2000, "Env steps that the actor collects between two trainings, in whole episodes.")
    train_ratio: Annotated[float, Gt(0)] = option(
        0.25,
        "Updates of the model, and of the actor, for each env step. DreamerV3's ratio counts replayed steps: this times batch and "
        "sequence.",
    )
    evaluate_every: Positive = option(1, "Parts between two evaluations; the last part is evaluated too.")
    seed: Natural = option(0, "Seed of all that is drawn.")
