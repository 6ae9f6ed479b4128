"""Files that are either whole or absent, and where they live by default."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import io
import json
import math
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

from wmcache.common.errors import MissingError, UserError
from wmcache.common.paths import WRITING, AnyPath, cause_outside, open_to_read, put, read_bytes, unreadable

MOST_JSON_BYTES = 64_000_000
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems answer that have no file locks."""
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


USUAL = {
    "store": ("zarr.json", ("*.zarr", "stores/*.zarr", "stores/*/*.zarr")),
    "dataset": ("dataset.json", ("*",)),
    "run": ("config.json", ("runs/*",)),
}
"""Kind of folder -> the file that it has, and where it usually is in `home`."""


def did_you_mean(missing: AnyPath, kind: str, otherwise: str) -> str:
    """A hint at a folder that is there, for the error about one that is missing: of the same path under `home`, or of a similar name.

    Args:
        missing: what was asked for.
        kind: of `USUAL`.
        otherwise: the hint where there is none like it.
    """
    if not isinstance(missing, Path):
        return otherwise
    marker, usual = USUAL[kind]
    there: dict[str, Path] = {}
    with contextlib.suppress(OSError, UserError, ValueError):
        parts = missing.parts[missing.is_absolute() :]
        same = (home().joinpath(*parts[start:]) for start in range(len(parts)))
        if found := next((path for path in same if (path / marker).is_file()), None):
            return f"did you mean {found}?"
        near = [*missing.parent.glob("*"), *(path for pattern in usual for path in home().glob(pattern))]
        # By their stems, or every store would be like every other for the suffix alone.
        there = {path.stem: path for path in near if (path / marker).is_file()}
    if close := difflib.get_close_matches(missing.stem, there, n=1):
        return f"did you mean {there[close[0]]}?"
    return otherwise


@contextmanager
def atomic_write(path: AnyPath) -> Iterator[IO[bytes]]:
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
def cannot_write(path: AnyPath) -> Iterator[None]:
    """An OSError of writing there as one line."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error, "free space or choose another place") from error


def not_written(path: AnyPath, error: OSError, full: str = "free space, then run the same command again") -> UserError:
    """The error of a place that cannot be written, with the reason and what a user can do about it.

    Args:
        path: the place, as the user knows it.
        error: what the system said.
        full: what to do about a local place that is full, or refuses for another reason.
    """
    hint = WRITING.get(error.errno or 0, full)
    if not isinstance(path, Path):
        hint = "check address, credentials and network, then run the same command again"
    return UserError(f"cannot write {path}: {error.strerror or error}; {hint}")


def temporary_for(path: Path) -> Path:
    """Where to write what will be renamed to `path`; the name tells whose it is, so that `sweep` knows the dead."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def is_temporary(path: AnyPath) -> bool:
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
def exclusive(lock: AnyPath, place: AnyPath | None = None, *, wait: bool = True) -> Iterator[bool]:
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
        hint = "free space, make it writable, or choose another place"
        if error.errno in NO_LOCKS:
            with contextlib.suppress(OSError):  # no process can hold it
                lock.unlink(missing_ok=True)
            hint = "its file system has no file locks: choose one that has (a local disk), or have it mounted with them"
        raise not_written(place or lock, error, hint) from error
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
        raise not_written(path, error, "choose another place") from error


def write_json(path: AnyPath, value: Any) -> None:
    """Write JSON atomically, readable by people; raises UserError where a number is not finite."""
    try:
        text = dump_json(value, indent=2)
    except UserError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    with atomic_write(path) as file:
        file.write((text + "\n").encode())


def dump_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Strict JSON, which every parser reads; raises UserError, naming the place, where a number is not finite."""
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError as error:
        if (found := _not_finite(value)) is None:
            raise
        raise UserError(f"{found[0]} is {found[1]}; it must be a finite number") from error


def nulls(value: Any) -> Any:
    """The JSON value with null in place of every number that is not finite: of figures that need not exist, never of settings."""
    if isinstance(value, dict):
        return {name: nulls(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_finite(value: Any, name: str = "the value") -> tuple[str, float] | None:
    """The first number of a JSON value that is not finite: its key and itself."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (name, value)
    items = (
        value.items()
        if isinstance(value, dict)
        else ((name, item) for item in value)
        if isinstance(value, list | tuple)
        else ()
    )
    return next((found for key, item in items if (found := _not_finite(item, str(key)))), None)


def _other_kind(path: AnyPath) -> str | None:
    """What the folder of a missing file is instead; None where that is not known."""
    if path.name not in KINDS or not isinstance(path, Path):
        return None
    if path.parent.is_file():
        return "a file"
    return next(
        (kind for name, kind in MARKERS.items() if kind != KINDS[path.name] and (path.parent / name).is_file()), None
    )


def read_json(path: AnyPath, hint: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        hint: what to do about a missing or damaged file, for the error's end.

    Raises:
        MissingError: there is no file.
        UnreadableError: the system cannot read it.
        UserError: it is not a JSON object, or its folder is of another kind.
    """
    try:
        # Asking an object store for the size first costs as much as the object.
        too_large = isinstance(path, Path) and path.stat().st_size > MOST_JSON_BYTES
        if too_large or len(data := read_bytes(path)) > MOST_JSON_BYTES:
            raise UserError(f"{path} is larger than any of ours; {hint}")
        value = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        if found := _other_kind(path):
            raise UserError(f"{path.parent} is {found}, not {KINDS[path.name]}; pass another path") from None
        raise MissingError(f"{path} does not exist; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:160]}); {hint}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; {hint}")
    return value


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """The JSON object with a checksum of itself, so that `require_seal` sees any changed digit."""
    return {**value, "checksum": json_digest(value)}


def require_seal(value: dict[str, Any], path: AnyPath, hint: str) -> dict[str, Any]:
    """The object that was sealed; raises UserError, naming `path`, where it is not what it was."""
    if value.get("checksum") != json_digest({name: item for name, item in value.items() if name != "checksum"}):
        raise UserError(f"{path} differs from its own checksum; {hint}")
    return value


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of(path: AnyPath) -> str:
    """The file's SHA-256, as hexadecimal digits."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(path: AnyPath, needed: int, what: str) -> None:
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


def free_space(path: AnyPath) -> int | None:
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
