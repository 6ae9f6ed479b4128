"""Parameter groups of optimisers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def decay_groups(
    groups: Iterable[Mapping[str, Any]], weight_decay: float, *, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Split each group into matrices, which decay, and vectors, which decay only with `decay_all`; frozen parameters are left out."""
    result: list[dict[str, Any]] = []
    for group in groups:
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        decaying = [parameter for parameter in trained if decay_all or parameter.ndim >= 2]
        others = [parameter for parameter in trained if not (decay_all or parameter.ndim >= 2)]
        result.append({"weight_decay": weight_decay, **group, "params": decaying})
        result.append({**group, "weight_decay": 0.0, "params": others})
    return result
