"""Room on disks."""

from __future__ import annotations

from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, free_space


def require_space(path: AnyPath, needed: int, what: str) -> None:
    """Raise UserError unless `needed` bytes are free where `path` is, or would be; the error calls the work `what`."""
    free = free_space(path)
    if free is not None and free < needed:
        raise UserError(
            f"{what} needs {human_bytes(needed)}, {human_bytes(free)} are free: {path}; free space or choose another --out"
        )


def human_bytes(count: float) -> str:
    """Return `30.1 GB`, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
