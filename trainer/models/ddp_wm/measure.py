"""What DDP-WM measures on data: how many patches change, and how well it finds them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from wmcache.cache.windows import Windows
from wmcache.common.device import autocast
from wmcache.trainer.models import Localizes, WorldModel

SAMPLED_WINDOWS, BATCH = 2048, 64
COVERED, SPARE = 0.99, 1.5
"""K patches are enough for those that change in this share of the steps, this many times over, because localization errs."""


def sample_windows(windows: Windows) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of some windows, always the same, in batches."""
    chosen = np.random.default_rng(0).permutation(len(windows))[:SAMPLED_WINDOWS]
    yield from np.array_split(chosen, max(1, len(chosen) // BATCH))


def foreground_size(changed: NDArray[np.bool_]) -> int:
    """Choose K from the patches [steps, N] that change: the least power of two that covers them; at most half of a frame."""
    wanted = float(np.quantile(changed.sum(1), COVERED, method="higher")) if len(changed) else 0.0
    bucket = 2 ** int(np.ceil(np.log2(max(1.0, SPARE * wanted))))
    return int(max(1, min(bucket, changed.shape[1] // 2)))


@torch.inference_mode()
def localization(
    model: WorldModel, windows: Windows, device: torch.device, dtype: torch.dtype
) -> dict[str, float | None]:
    """Measure how well a model predicts which patches of held-out windows change.

    Returns:
        `recall` and `precision` of the K patches that the model computes, `recall_likely` and `precision_likely` of those whose probability
        of change is above a half; `changed`: mean share of a frame that changes.
    """
    assert isinstance(model, Localizes)
    model.eval()
    counts = torch.zeros(6, dtype=torch.int64)
    for part in sample_windows(windows):
        batch = {name: torch.from_numpy(value).to(device) for name, value in windows.batch(part).items()}
        with autocast(device, dtype):
            masks = model.change_masks(batch)
        changes, computed, likely = masks.values()
        found = (changes, torch.ones_like(changes), computed, computed & changes, likely, likely & changes)
        counts += torch.stack([mask.sum() for mask in found]).cpu()
    changing, patches, chosen, chosen_hits, expected, expected_hits = counts.tolist()
    return {
        "recall": chosen_hits / max(1, changing),
        "precision": chosen_hits / max(1, chosen),
        "recall_likely": expected_hits / max(1, changing),
        "precision_likely": expected_hits / max(1, expected),
        "changed": changing / max(1, patches),
    }
