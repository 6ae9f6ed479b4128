"""What policies share that learn in the imagination of a world model and act on its belief: what they see, and their rewards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError, suggest
from wmcache.trainer.models import Belief, Dreams, Imagined, WorldModel, dreaming_models
from wmcache.trainer.runs import load_model, read_config, require_actions, weights_checksum

GOAL = "goal"
"""The input that is no feature of a belief: `latent` of the goal's frame."""


def load_dreams(run: Path, device: torch.device, temperature: float | None = None) -> tuple[WorldModel, Dreams]:
    """Load the model of a run, twice the same object; raises UserError where it cannot be stepped without frames.

    Args:
        temperature: of what the model draws; None: the run's.
    """
    model = load_model(run, device)
    if not isinstance(model, Dreams):
        raise UserError(
            f"{run} is of a model that cannot be stepped without frames, {read_config(run)['model']}; "
            f"train {dreaming_models()} instead"
        )
    require_actions(model, run)
    if missing := model.stage_before_planning(model.stage_name):
        raise UserError(f"not ready to imagine: {run}; train it with the same options and --stage {missing}")
    if temperature is not None:
        if not model.draws:
            raise UserError(f"--temperature {temperature}: the model of {run} draws nothing; leave it out")
        model.temperature = temperature
    return model, model


def input_sizes(model: Dreams, inputs: Sequence[str]) -> dict[str, int]:
    """Return how many numbers each input of a policy has; raises UserError for an unknown one."""
    sizes = {name: value.shape[1] for name, value in model.features(blank_belief(model)).items()}
    sizes[GOAL] = sizes["latent"]
    for number, name in enumerate(inputs):
        if name not in sizes or name in inputs[:number]:
            raise UserError(f"--inputs {','.join(inputs)}: {name!r} cannot be used; {suggest(name, list(sizes))}")
    return {name: sizes[name] for name in inputs}


def blank_belief(model: Dreams) -> Belief:
    """Return the belief of one episode after a frame of zeros, for the sizes of features."""
    assert isinstance(model, WorldModel)
    shape, device = model.shape, next(model.parameters()).device
    tokens = torch.zeros(1, shape.tokens, shape.token_dim, device=device)
    with torch.no_grad():
        return model.observe(model.start(1), tokens, torch.zeros(1, shape.proprio_dim, device=device), None)


def goal_distance(model: WorldModel, imagined: Imagined, goal_latents: Tensor, goal: Tensor) -> Tensor:
    """Compute the distance of frames, S = T = 1, to goals, [E]: of a model that imagines proprio alone that of proprio.

    Args:
        goal_latents: [E, N, D]. goal: `latent` of `Dreams.features`, [E, …].
    """
    if model.has_latents:
        return model.cost(imagined, goal_latents)[:, 0, 0]
    return (imagined.proprio[:, 0, 0] - goal).square().mean(-1)


def constant_reward(store: TokenStore) -> float | None:
    """Return the reward of every env step of a store: 1 where it has none but ends; None where rewards differ, or nothing is known."""
    if store.reward is None:
        return None if store.terminated is None else 1.0
    followed = store.reward[:-1][np.diff(store.episode) == 0]  # the last frame of an episode has no reward
    return float(followed[0]) if len(followed) and (followed == followed[0]).all() else None


def imagined_reward(imagined: Imagined, each: float | None, frameskip: int) -> Tensor:
    """Return the reward [E] of an imagined model step, S = T = 1: the model's, unless all rewards of the store are equal.

    Args:
        each: see `constant_reward`.
        frameskip: env steps of a model step.
    """
    if imagined.reward is not None and each is None:
        return imagined.reward[:, 0, 0]
    return imagined.latents.new_full((len(imagined.latents),), frameskip * (each or 0.0))


def require_model_of(folder: Path, trained_with: str, checksum: str, run: Path) -> None:
    """Raise UserError where a policy's folder names other weights of a world model than those of a run.

    Args:
        trained_with: the run that the policy was trained with. checksum: of its weights then.
    """
    if checksum != weights_checksum(run):
        raise UserError(
            f"{folder} was trained with another model than that of {run}, or before that was trained further; "
            f"name the run {os.path.relpath(trained_with)}, or train it again for this one"
        )
