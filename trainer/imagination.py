"""The imagination of a world model, for an actor that learns in it: starts, goals, steps and rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Goals, Windows, batch_windows, goal_draws
from wmcache.common.device import choose_device
from wmcache.common.errors import UserError
from wmcache.trainer.dreaming import (
    GOAL,
    constant_reward,
    goal_distance,
    imagined_reward,
    input_sizes,
    load_dreams,
)
from wmcache.trainer.models import Belief, Dreams, Imagined, WorldModel
from wmcache.trainer.options import ActorOptions
from wmcache.trainer.runs import read_config

TEMPERATURE = 1.0
"""Where the model draws."""
SCALE_WINDOWS = 1024
ANY_GOAL, NOISE = 2, 3
"""Streams of a step's random numbers, beside that of `goal_draws`."""

Batch = Mapping[str, Any]
"""tokens [B, K, N, D], proprio [B, K, P], action [B, K, f * A] and with goals goal_tokens [B, N, D] and goal_proprio [B, P]; `seed`."""


@dataclass
class Imagination:
    """A world model in which an actor acts.

    Attributes:
        model, dreams: the same object.
        inputs: what the actor sees; size: how many numbers they are.
        each: see `constant_reward`.
        scale: the reward is minus the distance to the goal, divided by it.
    """

    model: WorldModel
    dreams: Dreams
    inputs: tuple[str, ...]
    size: int
    each: float | None
    frameskip: int
    device: torch.device
    scale: float = 1.0

    @property
    def has_goals(self) -> bool:
        """Whether the reward is minus the distance to a goal."""
        return GOAL in self.inputs

    def windows(self, store: TokenStore, observed: int, split: str, seed: int, fraction: float = 1.0) -> Windows:
        """Return the windows that imagination starts from; a later frame follows each where there are goals."""
        goals = Goals() if self.has_goals else None
        return store.windows(observed, 0, self.frameskip, split, seed=seed, fraction=fraction, goals=goals)

    @torch.no_grad()
    def observe(self, batch: Batch) -> tuple[list[Belief], dict[str, Tensor]]:
        """Return the belief of B windows after each of their frames, and their goals: `latents` [B, N, D] and `goal` [B, …]."""
        data = {name: value.to(self.device) for name, value in batch.items() if isinstance(value, Tensor)}
        blank = self.model.start(len(data["tokens"]))
        goals = {}
        if self.has_goals:
            latents = data["goal_tokens"].float()
            seen = self.model.observe(blank, latents, data["goal_proprio"], None)
            goals = {"latents": latents, GOAL: self.dreams.features(seen)["latent"]}
        belief, beliefs = blank, []
        frames = zip(data["tokens"].float().unbind(1), data["proprio"].unbind(1), strict=True)
        for t, (tokens, proprio) in enumerate(frames):
            belief = self.model.observe(belief, tokens, proprio, data["action"][:, t - 1] if t else None)
            beliefs.append(belief)
        return beliefs, goals

    def see(self, belief: Belief, goals: Mapping[str, Tensor]) -> Tensor:
        """Return what the actor sees, [S, size]."""
        features = {**self.dreams.features(belief), **goals}
        return torch.cat([features[name] for name in self.inputs], -1)

    def step(
        self, belief: Belief, actions: Tensor, goals: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> tuple[Belief, Tensor, Tensor]:
        """Imagine one model step of S episodes; returns the belief, the rewards [S], and the probabilities [S] that they go on.

        Args:
            actions: [S, f * A] in env units.
            generator: of what the model draws; None: imagine without noise.
        """
        belief, imagined = self.dreams.step(belief, actions, generator)
        if self.has_goals:
            reward = -goal_distance(self.model, imagined, goals["latents"], goals[GOAL]) / self.scale
        else:
            reward = imagined_reward(imagined, self.each, self.frameskip)
        known = imagined.continues
        return belief, reward, torch.ones_like(reward) if known is None else known[:, 0, 0]

    @torch.no_grad()
    def mean_distance(self, starts: Starts) -> float:
        """Return the mean distance of frames to goals of other windows; 1 without goals."""
        if not self.has_goals:
            return 1.0
        batch = starts.batch(0, SCALE_WINDOWS)
        _, goals = self.observe(batch)
        proprio = self.model.encode_proprio(batch["proprio"][:, -1:].to(self.device))[:, None]
        seen = Imagined(batch["tokens"][:, -1].to(self.device).float()[:, None, None], proprio)
        others = {name: value.roll(1, 0) for name, value in goals.items()}
        found = float(goal_distance(self.model, seen, others["latents"], others[GOAL]).mean())
        return found if found > 0 else 1.0


def open_imagination(run: Path, store: TokenStore, options: ActorOptions) -> Imagination:
    """Load the model of a run; raises UserError where no actor can be trained in it."""
    device = choose_device(options.device)
    model, dreams = load_dreams(run, device, options.temperature)
    if options.temperature is None and model.draws:
        model.temperature = TEMPERATURE
    knows = model.shape.has_reward or model.shape.has_end
    usual = ["latent", "hidden", *([] if knows else [GOAL])]
    inputs = tuple(usual if options.inputs is None else options.inputs.split(","))
    sizes = input_sizes(dreams, inputs)
    if GOAL not in inputs and not knows:
        raise UserError(
            f"--inputs {','.join(inputs)}: the data of {run} has neither reward nor ends, so an actor needs a goal; add it"
        )
    frameskip = int(read_config(run)["frameskip"])
    return Imagination(model, dreams, inputs, sum(sizes.values()), constant_reward(store), frameskip, device)


@dataclass(frozen=True)
class Starts:
    """Batches of windows and goals; batch k depends on k and the seed alone.

    Attributes:
        split, split_seed, fraction: of the frames that goals are drawn from.
    """

    store: TokenStore
    windows: Windows
    options: ActorOptions
    split: str
    split_seed: int
    fraction: float = 1.0

    def batch(self, step: int, size: int) -> Batch:
        """Read a batch of windows."""
        seed, windows = self.options.seed, self.windows
        frames = windows.frames(batch_windows(len(windows), seed, step, size))
        gathered, _ = windows.with_goals(frames, goal_draws(seed, step, size) if windows.goals else None)
        if windows.goals:
            rng = np.random.default_rng((seed, step, ANY_GOAL))
            others = rng.choice(self.store.frames_of(self.split, self.split_seed, self.fraction), size)
            gathered[:, -1] = np.where(rng.random(size) < self.options.hindsight, gathered[:, -1], others)
        tokens = self.store.gather(gathered.ravel())
        rows = {**windows.split(tokens.reshape(*gathered.shape, *tokens.shape[1:])), **windows.steps(frames)}
        if windows.goals:
            known = self.store.proprio
            rows["goal_proprio"] = rows["proprio"][:, 0, :0] if known is None else known[gathered[:, -1]]
        return {**{name: torch.from_numpy(value) for name, value in rows.items()}, "seed": (seed, step, NOISE)}
