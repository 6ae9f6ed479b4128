"""wmcache: encode every frame once, train world models on cached latents, re-encode only live observations.

The five calls of `wmcache.api` and what they return are imported on first use, so that importing this package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmcache.api import collect, extract, fit, plan, train
    from wmcache.cache.store import TokenStore
    from wmcache.common.errors import UserError
    from wmcache.pipeline.frames import FrameDataset
    from wmcache.planner.plan import PlanResult
    from wmcache.trainer.trained import Run

__version__ = "0.1.0"
__all__ = [
    "FrameDataset",
    "PlanResult",
    "Run",
    "TokenStore",
    "UserError",
    "collect",
    "extract",
    "fit",
    "plan",
    "train",
]

_MODULES = {
    **dict.fromkeys(("collect", "fit", "extract", "train", "plan"), "api"),
    "FrameDataset": "pipeline.frames",
    "TokenStore": "cache.store",
    "Run": "trainer.trained",
    "PlanResult": "planner.plan",
    "UserError": "common.errors",
}

if not TYPE_CHECKING:  # which would take any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
