"""Files that are either whole or absent, and where they live by default."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from wmcache.cache.errors import UserError


def home() -> Path:
    """Where datasets, encoders, stores and runs live: $WMCACHE_HOME, or `data/` in the working directory."""
    return Path(os.environ.get("WMCACHE_HOME", "data"))


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that it appears whole or not at all: temporary file beside it, fsync, rename.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; raises UserError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, readable by people."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        mend: what to do about a missing or damaged file, for the error's end.

    Raises:
        UserError: the file is missing, or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {mend}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {mend}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; {mend}")
    return value


def sha256_of(path: Path) -> str:
    """The file's SHA-256, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(path: Path, needed: int, what: str) -> None:
    """Refuse work that cannot fit, before it starts.

    Args:
        path: where the work will be written; need not exist yet.
        needed: bytes.
        what: the work's name, for the message.

    Raises:
        UserError: fewer than `needed` bytes are free there.
    """
    free = free_space(path)
    if free < needed:
        raise UserError(
            f"{what} needs {human_bytes(needed)} at {path}, but {human_bytes(free)} are free there; choose another --out"
        )


def free_space(path: Path) -> int:
    """Free bytes on the file system that `path` is, or would be, on."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def human_bytes(count: float) -> str:
    """`30.1 GB`: decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_between_updates() -> float:
    """Of a progress bar: a terminal gets a living one, a log file a line every 10 seconds."""
    return 0.1 if sys.stderr.isatty() else 10.0
