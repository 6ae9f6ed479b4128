"""Local files and object stores behind the same methods; `paths.py` has the functions that use them.

A `Path` is a local file; any other address that fsspec knows (`s3://bucket/key`, `memory://name`) is a `UPath`. All methods raise OSError,
whatever a remote file system raises, so that callers handle a broken disk and a broken network alike.

An object appears whole or not at all, but it cannot be renamed or locked. Work on objects has to be correct when two processes do it at
once: the object first, then the record that it is complete.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from typing_extensions import TypeIs

from wmcache.common.errors import reason

if TYPE_CHECKING:
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"


@dataclass(frozen=True)
class Found:
    """A file in a listing.

    Attributes:
        bytes: its size.
        tag: 32 hexadecimal digits that an object store gives its content, different for another write; None where it gives none.
    """

    bytes: int
    tag: str | None = None


class _Local:
    """A path on this machine."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def exists(self) -> bool:
        return self.at.exists()

    def read(self) -> bytes:
        return self.at.read_bytes()

    def size(self) -> int:
        return self.at.stat().st_size

    def stamp(self) -> object:
        found = os.stat(self.at)  # noqa: PTH116 (half the time of Path.stat, and it is called for every batch)
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def names(self, prefix: str) -> list[str]:
        return sorted(at.name for at in self.at.glob(f"{prefix}*"))

    def files(self, prefix: str) -> Iterator[tuple[str, Found]]:
        if self.at.is_dir():
            with os.scandir(self.at) as entries:
                for entry in entries:
                    if entry.name.startswith(prefix) and entry.is_file():
                        yield entry.name, Found(entry.stat().st_size)

    def top_names(self) -> set[str]:
        return set(self.names(""))

    def folders(self, suffix: str) -> Iterator[Path]:
        for root, names, _ in os.walk(self.at):
            for name in [name for name in names if name.endswith(suffix)]:
                names.remove(name)
                yield Path(root, name)

    def usage(self) -> int:
        total = 0
        for root, _, files in os.walk(self.at):
            for name in files:
                try:
                    total += Path(root, name).stat().st_size
                except OSError:
                    continue
        return total

    def remove(self) -> None:
        if self.at.is_dir() and not self.at.is_symlink():
            shutil.rmtree(self.at)
        else:
            self.at.unlink(missing_ok=True)

    def remove_files(self, names: Sequence[str]) -> None:
        for name in names:
            (self.at / name).unlink(missing_ok=True)

    def free_space(self) -> int | None:
        existing = self.at.absolute()
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free


class _Remote:
    """An object, or a prefix of objects."""

    def __init__(self, at: UPath) -> None:
        self.at = at

    def exists(self) -> bool:
        with as_os_errors(self.at):
            return bool(self.at.fs.exists(self.at.path))

    def read(self) -> bytes:
        with as_os_errors(self.at):
            return bytes(self.at.fs.cat_file(self.at.path))

    def size(self) -> int:
        return int(self._info()["size"])

    def stamp(self) -> object:
        info = self._info()
        return info.get("ETag"), str(info.get("LastModified") or info.get("created")), info["size"]

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name, _ in self.files(prefix))

    def files(self, prefix: str) -> Iterator[tuple[str, Found]]:
        with as_os_errors(self.at):
            listing = self.at.fs.find(self.at.path, detail=True, prefix=prefix)
        for key, info in listing.items():
            name = key.removeprefix(self.at.path.rstrip("/") + "/")
            if name.startswith(prefix) and "/" not in name:  # some file systems ignore the prefix
                yield name, Found(int(info["size"]), tag_of(info))

    def top_names(self) -> set[str]:
        with as_os_errors(self.at):
            try:
                return {key.rstrip("/").rpartition("/")[2] for key in self.at.fs.ls(self.at.path, detail=False)}
            except FileNotFoundError:
                return set()

    def folders(self, suffix: str) -> Iterator[UPath]:
        with as_os_errors(self.at):
            for root, below, _ in self.at.fs.walk(self.at.path, detail=True):
                for name in [name for name in below if name.endswith(suffix)]:
                    del below[name]
                    yield self.at / root.removeprefix(self.at.path.rstrip("/")).strip("/") / name

    def usage(self) -> int:
        with as_os_errors(self.at):
            return int(self.at.fs.du(self.at.path)) if self.at.fs.exists(self.at.path) else 0

    def remove(self) -> None:
        with as_os_errors(self.at):
            if self.at.fs.exists(self.at.path):
                self.at.fs.rm(self.at.path, recursive=True)

    def remove_files(self, names: Sequence[str]) -> None:
        with as_os_errors(self.at):
            existing = set(self.at.fs.find(self.at.path))
            if wanted := [path for name in names if (path := (self.at / name).path) in existing]:
                self.at.fs.rm(wanted)

    def free_space(self) -> int | None:
        return None

    def _info(self) -> dict[str, Any]:
        with as_os_errors(self.at):
            return dict(self.at.fs.info(self.at.path))


def storage(at: AnyPath) -> _Local | _Remote:
    """Return what does the work for a path or URL."""
    return _Local(at) if is_local(at) else _Remote(at)


def is_local(at: AnyPath) -> TypeIs[Path]:
    """Return whether it is a path, where files can be renamed, locked and mapped."""
    return isinstance(at, Path)


@contextmanager
def as_os_errors(at: AnyPath) -> Iterator[None]:
    """Turn whatever a remote file system raises into an OSError with the address and a one-line reason."""
    try:
        yield
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        text = reason(error)  # some file systems give no more than the key
        raise FileNotFoundError(errno.ENOENT, text if " " in text else "it does not exist", str(at)) from error
    except Exception as error:
        raise OSError(errno.EIO, reason(error), str(at)) from error


def tag_of(answer: Any) -> str | None:
    """Return the tag in an object store's answer."""
    tag = str(answer.get("ETag") or "").strip('"').lower() if isinstance(answer, dict) else ""
    return tag if len(tag) == 32 and set(tag) <= set("0123456789abcdef") else None
