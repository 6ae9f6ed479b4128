"""Learning rates by step, for steps 0 to `steps` - 1 with `peak` as the highest, and parameter groups of optimisers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def warmup_constant_decay(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Rise linearly for a share `warmup` of the steps, stay, then fall to 0 as 1 - sqrt for a share `decay` (arXiv 2405.18392)."""
    rising, falling = math.ceil(warmup * steps), math.ceil(decay * steps)
    if step < rising:
        return peak * (step + 1) / rising
    if step < steps - falling:
        return peak
    return peak * (1 - math.sqrt((step - (steps - falling)) / falling))


def warmup_cosine(step: int, steps: int, peak: float) -> float:
    """Rise linearly for a tenth of the steps, then fall to 0 as a cosine (arXiv 1608.03983)."""
    rising = max(1, steps // 10)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def decay_groups(
    groups: Iterable[Mapping[str, Any]], weight_decay: float, *, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Split each group into matrices, which decay, and vectors, which decay only with `decay_all`; frozen parameters are left out."""
    result: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[bool, list[Any]] = {True: [], False: []}
        for parameter in group["params"]:
            if parameter.requires_grad:
                parts[decay_all or parameter.ndim >= 2].append(parameter)
        result.append({"weight_decay": weight_decay, **group, "params": parts[True]})
        result.append({**group, "weight_decay": 0.0, "params": parts[False]})
    return result
