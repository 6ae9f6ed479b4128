"""The folder of everything that wmcache makes."""

from __future__ import annotations

import os
from pathlib import Path

from wmcache.common.errors import UserError


def home() -> Path:
    """Return where datasets, encoders, stores and runs are: $WMCACHE_HOME, or `data/`; raise UserError for a URL."""
    folder = os.environ.get("WMCACHE_HOME", "data")
    if "://" in folder:
        raise UserError(f"WMCACHE_HOME must be a local folder: {folder}; pass URLs to --dataset, --out and --cache")
    return Path(folder)
