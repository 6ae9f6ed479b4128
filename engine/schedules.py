"""Learning rates by step, for steps 0 to `steps` - 1; `peak` is the highest."""

from __future__ import annotations

import math


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
