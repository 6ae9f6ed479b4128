"""Adversarial training (arXiv 2512.09929, Adversarial World Modeling): a model learns from frames that were changed to raise its loss.

One signed step from a random start (arXiv 2001.03994), as in the authors' code. That perturbs the embeddings of proprio and action, each
patch's by itself, and its radii are shares of one deviation of each batch. Here what is perturbed is in the cache: tokens, proprio and
actions, with radii in deviations of each channel over the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.trainer.models import MODELS
from wmcache.trainer.models.trainable import SHIFT
from wmcache.trainer.options import TrainOptions

STEP = 1.25
"""Length of the signed step, in radii; the result is clamped to the radius."""
Batch = Mapping[str, Tensor]


def check_shifts(options: TrainOptions) -> None:
    """Raise UserError where options perturb what a model sees whose loss cannot do that."""
    if options.perturbed and not MODELS.get(options.model).shifts:
        able = ", ".join(name for name in MODELS if MODELS.get(name).shifts)
        flags = "--perturb-tokens, --perturb-proprio and --perturb-actions"
        raise UserError(f"{flags} need a model whose loss knows them, which {options.model} is not; choose {able}")


def radii_of(shares: Mapping[str, float], statistics: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the radius of each channel of what is perturbed, in the store's units.

    Args:
        shares: radii above 0 in deviations, by the name in a batch: tokens, proprio, action.
        statistics: with `<name>_std` of each.
    """
    return {name: share * statistics[f"{name}_std"].to(device) for name, share in shares.items()}


def perturb(loss: Callable[[Batch], Mapping[str, Tensor]], batch: Batch, radii: Mapping[str, Tensor]) -> Batch:
    """Add the shifts within `radii` to a batch that raise a model's loss, see `Trainable.loss`; gradients of weights stay untouched."""
    shifts = {
        name: radius * (2 * torch.rand_like(batch[name], dtype=torch.float32) - 1) for name, radius in radii.items()
    }
    for shift in shifts.values():
        shift.requires_grad_()
    found = loss({**batch, **{SHIFT + name: shift for name, shift in shifts.items()}})["loss"]
    gradients = torch.autograd.grad(found, [*shifts.values()], allow_unused=True)  # a model need not see proprio
    moved = {}
    for (name, shift), gradient in zip(shifts.items(), gradients, strict=True):
        radius, start = radii[name], shift.detach()
        ahead = start if gradient is None else start + STEP * radius * gradient.sign()
        moved[SHIFT + name] = torch.minimum(torch.maximum(ahead, -radius), radius)
    return {**batch, **moved}
