"""The token store. Its names are imported on first use, so that a command that needs only an error's type does not import zarr."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmcache.cache.identity import Identity
    from wmcache.cache.layout import StoreCard
    from wmcache.cache.store import TokenStore
    from wmcache.cache.windows import Windows
    from wmcache.cache.writer import StoreWriter

__all__ = ["Identity", "StoreCard", "StoreWriter", "TokenStore", "Windows"]

_MODULES = {
    "Identity": "identity",
    "StoreCard": "layout",
    "StoreWriter": "writer",
    "TokenStore": "store",
    "Windows": "windows",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
