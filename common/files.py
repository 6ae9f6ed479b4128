"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from wmcache.common.errors import UserError, reason
from wmcache.common.paths import CHECK, CHECK_REMOTE, AnyPath, is_local, open_to_read, put


@contextmanager
def atomic_write(path: AnyPath) -> Iterator[IO[bytes]]:
    """Write a file that appears complete or not at all, by fsync and rename or as one object; raise UserError where that fails."""
    if not is_local(path):
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


def write_whole(path: AnyPath, data: bytes) -> str | None:
    """Write a file as `atomic_write` does; return the tag that an object store gives it, see `Found`."""
    if not is_local(path):
        with cannot_write(path):
            return put(path, data)
    with atomic_write(path) as file:
        file.write(data)
    return None


@contextmanager
def cannot_write(path: AnyPath) -> Iterator[None]:
    """Turn an OSError into the UserError of a path that cannot be written."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: AnyPath, error: OSError, hint: str = CHECK) -> UserError:
    """Return the error of a path that cannot be written; `hint` is for a local one."""
    return UserError(f"cannot write {path}: {reason(error)}; {hint if is_local(path) else CHECK_REMOTE}")


def temporary_for(path: Path) -> Path:
    """Return where to write what will be renamed to `path`; `sweep` reads the process from the name."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def is_temporary(path: AnyPath) -> bool:
    """Return whether a path is one of `temporary_for`."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def sweep(folder: AnyPath) -> list[Path]:
    """Delete the temporary files that dead processes of this machine left; return those of running processes and of other machines."""
    staying = []
    for path in sorted(folder.glob(".*.tmp")) if is_local(folder) else ():
        owner, _, process = path.name.removesuffix(".tmp").rpartition(".")
        is_own = owner.endswith(f".{platform.node()}") and process.isdecimal()
        if not is_own or psutil.pid_exists(int(process)):
            staying.append(path)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return staying


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; raise UserError where that is not possible."""
    with cannot_write(path):
        path.mkdir(parents=True, exist_ok=True)


def sha256_of(path: AnyPath) -> str:
    """Return a file's SHA-256 as hexadecimal digits."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
