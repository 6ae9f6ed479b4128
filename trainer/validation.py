"""Validation of world models by open-loop rollouts on held-out windows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wmcache.cache.windows import Windows
from wmcache.common.device import autocast

if TYPE_CHECKING:
    from wmcache.trainer.models.base import WorldModel

VALIDATION_WINDOWS = 256
BATCH = 64


@torch.inference_mode()
def rollout_errors(
    model: WorldModel, windows: Windows, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the MSE of rollouts from one observed frame, and of copying that frame, float64 [model steps] each, in the store's units."""
    model.eval()
    steps = windows.predict
    error, copying = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
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
