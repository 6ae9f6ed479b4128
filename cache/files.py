"""Files that are either whole or absent, and where they live by default."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import FileLock, Timeout
from wmcache.cache.errors import MissingError, UserError
from wmcache.cache.places import Place, open_to_read, put, read_bytes

MOST_JSON_BYTES = 64_000_000
MARKERS = {"zarr.json": "a token store", "dataset.json": "a frame dataset", "identity.json": "a run or a decoder"}
KINDS = {**MARKERS, "config.json": MARKERS["identity.json"]}
"""File in a folder of wmcache -> what the folder is. Other programs have a config.json too, so that is no marker."""


def home() -> Path:
    """Where datasets, encoders, stores and runs live: $WMCACHE_HOME, or `data/` in the working directory.

    Raises:
        UserError: it is a URL.
    """
    folder = os.environ.get("WMCACHE_HOME", "data")
    if "://" in folder:
        raise UserError(f"WMCACHE_HOME is {folder}; it must be a local folder, URLs go to --dataset, --out and --cache")
    return Path(folder)


@contextmanager
def atomic_write(path: Place) -> Iterator[IO[bytes]]:
    """Write a file so that it appears whole or not at all: temporary file beside it, fsync, rename; or in memory, then one object.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    if not isinstance(path, Path):
        with cannot_write(path), io.BytesIO() as memory:
            yield memory
            put(path, memory.getvalue())
        return
    temporary = temporary_for(path)
    try:
        with cannot_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def cannot_write(path: Place) -> Iterator[None]:
    """An OSError of writing there as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {mend_writing(path)}") from error


def mend_writing(path: Place) -> str:
    """What a user can do about a place that cannot be written, as the end of an error."""
    if isinstance(path, Path):
        return "free space or choose another place"
    return "check address, credentials and network, then run the same command again"


def temporary_for(path: Path) -> Path:
    """Where to write what will be renamed to `path`; the name tells whose it is, so that `sweep` knows the dead."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def is_temporary(path: Place) -> bool:
    """Whether a file is one that was, or will be, renamed to what it is for."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def sweep(folder: Path) -> list[Path]:
    """Delete what dead processes of this machine left unfinished in a folder; whatever may still be written is left alone.

    Returns:
        The temporary files and folders that stay: those of living processes, and those of other machines.
    """
    staying = []
    for path in sorted(folder.glob(".*.tmp")):
        owner = path.name.removesuffix(".tmp").rpartition(".")
        ours = owner[0].endswith(f".{platform.node()}") and owner[2].isdecimal()
        if not ours or psutil.pid_exists(int(owner[2])):
            staying.append(path)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return staying


@contextmanager
def exclusive(lock: Place, place: Place | None = None, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file against all other processes; the operating system lets go of it when its holder dies, however it dies.

    Args:
        lock: the file, which is there only while somebody holds it. Object stores have no locks: there everybody goes on.
        place: what it guards, for the message; the lock itself by default.
        wait: for whoever holds it now.

    Yields:
        Whether we hold it.

    Raises:
        UserError: the file cannot be made.
    """
    if not isinstance(lock, Path):
        yield True
        return
    # A lock that is no more than a file would stay when its holder dies.
    held = FileLock(lock, timeout=-1 if wait else 0, thread_local=False, fallback_to_soft=False)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        mend = "free space, make it writable, or choose another place"
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            mend = "its file system has no locks: mount it with flock, or choose another place"
        raise UserError(f"cannot write {place or lock}: {error.strerror or error}; {mend}") from error
    try:
        yield True
    finally:
        # Before letting go: whoever waits for this file then sees that it is gone, and makes a new one.
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)
        held.release()


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; raises UserError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def write_json(path: Place, value: Any) -> None:
    """Write JSON atomically, readable by people."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _other_kind(path: Place) -> str | None:
    """What the folder of a missing file is instead; None where that is not known."""
    if path.name not in KINDS or not isinstance(path, Path):
        return None
    if path.parent.is_file():
        return "a file"
    return next(
        (kind for name, kind in MARKERS.items() if kind != KINDS[path.name] and (path.parent / name).is_file()), None
    )


def read_json(path: Place, mend: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        mend: what to do about a missing or damaged file, for the error's end.

    Raises:
        MissingError: there is no file.
        UserError: it is not a JSON object.
    """
    try:
        # Asking an object store for the size first costs as much as the object.
        too_large = isinstance(path, Path) and path.stat().st_size > MOST_JSON_BYTES
        if too_large or len(data := read_bytes(path)) > MOST_JSON_BYTES:
            raise UserError(f"{path} is larger than any of ours; {mend}")
        value = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        if found := _other_kind(path):
            raise MissingError(f"{path.parent} is {found}, not {KINDS[path.name]}; pass another path") from None
        raise MissingError(f"{path} does not exist; {mend}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:160]
        raise UserError(f"{path} cannot be read ({reason}); {mend}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; {mend}")
    return value


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """The JSON object with a checksum of itself, so that `require_seal` sees any changed digit."""
    return {**value, "checksum": _checksum(value)}


def require_seal(value: dict[str, Any], path: Place, mend: str) -> dict[str, Any]:
    """The object that was sealed; raises UserError, naming `path`, where it is not what it was."""
    if value.get("checksum") != _checksum({name: item for name, item in value.items() if name != "checksum"}):
        raise UserError(f"{path} differs from its own checksum; {mend}")
    return value


def _checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Place) -> str:
    """The file's SHA-256, as hexadecimal digits."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(path: Place, needed: int, what: str) -> None:
    """Refuse work that cannot fit, before it starts.

    Args:
        path: where the work will be written; need not exist yet.
        needed: bytes.
        what: the work's name, for the message.

    Raises:
        UserError: fewer than `needed` bytes are free there.
    """
    free = free_space(path)
    if free is not None and free < needed:
        raise UserError(
            f"{what} needs {human_bytes(needed)} at {path}, but {human_bytes(free)} are free there; choose another --out"
        )


def free_space(path: Place) -> int | None:
    """Free bytes on the file system that `path` is, or would be, on; None for an object store, which has no end."""
    if not isinstance(path, Path):
        return None
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
