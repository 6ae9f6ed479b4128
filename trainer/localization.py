"""How well a model knows where something is about to change, and how much that is: of change maps, or of the tokens themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.device import autocast
from wmcache.trainer.feed import gather_changes
from wmcache.trainer.models import MODELS
from wmcache.trainer.models.latent import LEAST_DEVIATION

SAMPLED_WINDOWS = 2048
WINDOWS_AT_ONCE = 64


def settle(store: TokenStore, windows: Windows, name: str, options: Any) -> tuple[TokenStore | None, Any]:
    """What a model takes from the data before it is built.

    Args:
        store, windows: what it will be trained on. name: of the model. options: its own.

    Returns:
        The change maps, where the model learns from them, and the options with nothing left open.

    Raises:
        UserError: there are no change maps.
    """
    choose = getattr(MODELS[name][1], "settle", None)
    if choose is None:
        return None, options
    MODELS[name][1].require(store.card.tokens_per_frame)  # type: ignore[attr-defined]  # (it settles, so it is DdpWm)
    changes = store.changes(windows.frameskip) if options.labels == "pixels" else None
    return changes, choose(options, store.card.tokens_per_frame, _changed(store, windows, changes, options))


def _changed(store: TokenStore, windows: Windows, changes: TokenStore | None, options: Any) -> NDArray[np.bool_]:
    """Which patches change in some steps of the windows, bool [steps, N]."""
    chosen = np.random.default_rng(0).permutation(len(windows))[:SAMPLED_WINDOWS]
    parts = []
    for part in np.array_split(chosen, max(1, len(chosen) // WINDOWS_AT_ONCE)):
        if changes is not None:
            cells = gather_changes(changes, windows.frames(part)[:, 1:])
            changed = (cells > options.least_change).any(-1)
        else:
            tokens = windows.batch(part)["tokens"].astype(np.float32)
            if options.standardise:
                tokens /= np.maximum(store.std, LEAST_DEVIATION)
            changed = np.sqrt(np.square(np.diff(tokens, axis=1)).mean(-1)) > options.least_change
        parts.append(changed.reshape(-1, changed.shape[-1]))
    return np.concatenate(parts)


@torch.inference_mode()
def localization(
    model: Any, windows: Windows, changes: TokenStore | None, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """How well a `DdpWm` tells, in windows that it was not trained on, which patches are about to change.

    Returns:
        `recall`: share of the patches that change which are among the K that the model computes, and `precision`: share of these K that
        change, which is low where K has room to spare; `recall_likely` and `precision_likely`: the same for those that it holds for more
        likely than not to change; `changed`: the mean share of a frame that changes.
    """
    model.eval()
    there = chosen_hits = chosen_count = likely_hits = likely_count = patches = 0
    numbers = np.random.default_rng(0).permutation(len(windows))[:SAMPLED_WINDOWS]
    for part in np.array_split(numbers, max(1, len(numbers) // WINDOWS_AT_ONCE)):
        data = {name: torch.from_numpy(value).to(device) for name, value in windows.batch(part).items()}
        if changes is not None:
            data["changes"] = torch.from_numpy(gather_changes(changes, windows.frames(part))).to(device)
        with autocast(device, dtype):
            logits = model.locate(data["tokens"], data["proprio"], data["action"])
        labels = model.labels(model.standardised(data["tokens"], data["proprio"], data["action"])[0], data).any(-1)
        likely, chosen = (logits > 0).any(-1), model.computed(logits)
        there += int(labels.sum())
        patches += labels.numel()
        chosen_hits += int((chosen & labels).sum())
        chosen_count += int(chosen.sum())
        likely_hits += int((likely & labels).sum())
        likely_count += int(likely.sum())
    return {
        "recall": chosen_hits / max(1, there),
        "precision": chosen_hits / max(1, chosen_count),
        "recall_likely": likely_hits / max(1, there),
        "precision_likely": likely_hits / max(1, likely_count),
        "changed": there / max(1, patches),
    }
