"""How much freed memory this process keeps for its next tensors."""

from __future__ import annotations

import ctypes
import os
import sys

MALLOC = {"MALLOC_TRIM_THRESHOLD_": 256 * 2**20, "MALLOC_MMAP_THRESHOLD_": 32 * 2**20}
"""glibc's variables, in bytes. By default it returns memory after almost every batch, and each page has to be zeroed again."""
PARAMETERS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
"""The same in mallopt(3)."""


def keep_freed_memory() -> None:
    """Set the thresholds of glibc's allocator, unless the user has set one; other allocators keep their settings."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for name, size in MALLOC.items():
            mallopt(PARAMETERS[name], size)
