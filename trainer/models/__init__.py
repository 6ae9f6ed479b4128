"""World models and policies: a file or a folder for each, registered by `@MODELS.register("name")`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from wmcache.cache.windows import Windows
from wmcache.common.device import autocast
from wmcache.common.options import parse_options
from wmcache.common.registry import Registry
from wmcache.trainer.models.trainable import DataShape as DataShape
from wmcache.trainer.models.trainable import Trainable as Trainable

VALIDATION_WINDOWS, BATCH = 256, 64
Frames = tuple[Tensor, Tensor]
"""Latents and embeddings of proprio."""


class WorldModel(Trainable):
    """An action-conditioned predictor of latents. `loss` and `rollout` have no default."""

    @property
    def blind(self) -> bool:
        """See `Trainable.blind`."""
        no_proprio = torch.zeros(1, 1, self.shape.proprio_dim, device=next(self.parameters()).device)
        return not self.encode_proprio(no_proprio).numel()

    def validate(self, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
        """Measure the model on held-out windows of one observed frame and some that follow; they have the model's `extras`.

        Default: `skill_k` for each model step k, see `skills`. A figure that is not defined is None.
        """
        found = skills(*rollout_errors(self, windows, device, dtype))
        return {f"skill_{k}": value for k, value in enumerate(found, start=1)}

    def encode_proprio(self, proprio: Tensor) -> Tensor:
        """Embed proprio as `rollout` predicts it, [B, T, P] -> [B, T, Q]. Q is 0 for a model that sees no proprio, the default."""
        return proprio[..., :0]

    @abstractmethod
    def rollout(self, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int | None = None) -> Frames:
        """Imagine what actions lead to.

        Args:
            tokens: [B, n, N, D], n >= 1 observed frames. proprio: [B, n, P] of those frames.
            actions: [B, n - 1 + t, f * A]; action k leads from frame k to frame k + 1. Or [B, S, n - 1 + t, f * A], S futures of each
                observed sequence, whose first n - 1 actions, the past, are the same.
            context: frames, observed or imagined, that a step sees; None means the model's history.

        Returns:
            Latents [B, t, N, D] and proprio embeddings [B, t, Q] of the t frames after the observed ones; [B, S, t, …] for S futures.
        """


@torch.inference_mode()
def rollout_errors(
    model: WorldModel, windows: Windows, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the MSE of rollouts from one observed frame, and of copying that frame, float64 [model steps] each, in the store's units."""
    model.eval()
    steps = windows.predict
    error, copying = torch.zeros(2, steps, dtype=torch.float64)
    chosen = np.random.default_rng(0).permutation(len(windows))[:VALIDATION_WINDOWS]
    for part in np.array_split(chosen, max(1, len(chosen) // BATCH)):
        data = {name: torch.from_numpy(value).to(device) for name, value in windows.batch(part).items()}
        tokens = data["tokens"].float()
        with autocast(device, dtype):
            imagined, _ = model.rollout(tokens[:, :1], data["proprio"][:, :1], data["action"][:, :steps])
        error += (imagined - tokens[:, 1:]).square().mean((0, 2, 3)).double().cpu() * len(part)
        copying += (tokens[:, :1] - tokens[:, 1:]).square().mean((0, 2, 3)).double().cpu() * len(part)
    return error / len(chosen), copying / len(chosen)


def skills(error: Tensor, copying: Tensor) -> list[float | None]:
    """Compute 1 - MSE of the rollout / MSE of copying the observed frame for each model step: 1 is perfect, 0 useless.

    None where the frames do not change, or the rollout is not finite.
    """
    values = (1 - error / copying).tolist()
    return [value if math.isfinite(value) else None for value in values]


@runtime_checkable
class Localizes(Protocol):
    """A world model that predicts which patches change, so that a picture can show it."""

    @property
    def labels_from_pixels(self) -> bool:
        """Whether what has changed is measured on frames: then a batch needs their change maps, `changes` [B, T, N, 4]."""

    def change_masks(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mark patches for each step of a batch, bool [B, T - 1, N]: those that `changes`, are `computed` and are `likely to change`."""


MODELS: Registry[type[Trainable]] = Registry("model", package=__name__, group="wmcache.models")


def read_options(name: str, options: Mapping[str, Any]) -> Any:
    """Make a model's options from some of their values; raises UserError for an unknown model or option, or values that do not fit."""
    return parse_options(MODELS.get(name).Options, dict(options), f"world model {name}")


def build(name: str, shape: DataShape, options: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Trainable:
    """Make a new model, see `Trainable`; raises UserError for an unknown name or option, or sizes that do not fit."""
    return MODELS.get(name)(shape, read_options(name, options), statistics)
