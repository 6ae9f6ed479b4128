"""Folders and files by path or by URL, and the few things that are done with them.

A path is a `Path`; any other address that fsspec knows (`s3://bucket/key`, `memory://name`, …) is a `UPath`. Whatever a file system far
away raises becomes an `OSError` here, so that callers handle a broken disk and a broken network alike.

An object appears whole or not at all when it is written, but nothing can be renamed and nobody can hold a lock. So what is done there
must be right when it is done twice at once: an object first, then the record that it is whole.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wmcache.common.errors import UnreadableError, UserError

if TYPE_CHECKING:
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"

EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Protocols whose file system is an extra of ours."""

OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        # For whoever waits: a server that is silent is given up after a minute.
        "config_kwargs": {
            "connect_timeout": 5,
            "read_timeout": 20,
            # Unless somebody has said how often.
            **({} if "AWS_MAX_ATTEMPTS" in os.environ else {"retries": {"total_max_attempts": 3, "mode": "standard"}}),
        }
    },
}

_NETWORK = "check the network and the mount of its file system, then run the same command again"
_DISK = "check the disk and the mount of its file system (dmesg), then run the same command again"
READING: dict[int, str] = {
    errno.ENOMEM: "raise the limit of addresses: ulimit -v",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENFILE: "the machine has too many files open; close some",
    errno.EIO: _DISK,
    errno.EUCLEAN: _DISK,
    **dict.fromkeys(
        (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO), _NETWORK
    ),
}
"""What a user can do about an error of reading a local file; about all others: make it readable."""
WRITING: dict[int, str] = {
    **READING,
    errno.EACCES: "make it writable, or choose another place",
    errno.EPERM: "make it writable, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f), or choose another place",
}
"""The same about writing; about all others: free space."""

NO_MAPS = (errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of file systems that open a file and do not map it."""
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""A file is not there, or a folder is in its place."""

PUT: dict[str, dict[str, Any]] = {"s3": {"chunksize": 5 * 2**30}}
"""How objects are sent: in one request, up to S3's limit for one, so that their tag is one too."""
PATIENCE = 60.0
SLOWEST = 1e6
"""Seconds, and bytes a second, that a server may take to receive an object."""


@dataclass(frozen=True)
class Found:
    """A file in a listing.

    Attributes:
        bytes: of it.
        tag: what an object store says of its content: 32 hexadecimal digits, another for another write; None where it says nothing.
    """

    bytes: int
    tag: str | None = None


def as_path(text: str | AnyPath) -> AnyPath:
    """What a path or a URL names.

    Raises:
        UserError: no file system is known for the URL, or its package is not installed.
    """
    if not isinstance(text, str):
        return text
    protocol, separator, rest = text.partition("://")
    if not separator:
        if re.match(r"[a-z][a-z0-9]+:/", text):
            raise UserError(f"{text} is neither a path nor a URL; write ://, or ./ before a folder of that name")
        return Path(text)
    if protocol == "file" and rest.startswith("/"):
        return Path(rest)
    if protocol == "file" or not rest.strip("/"):
        example = "/folder" if protocol == "file" else "bucket/folder"
        raise UserError(f"{text} names no place; write {protocol}://{example}")
    from upath import UPath  # costs what a command without URLs need not pay

    try:
        # Others write there too: a listing that was true a minute ago is no help.
        found: UPath = UPath(text, use_listings_cache=False, **OPTIONS.get(protocol, {}))
        system = type(found.fs)  # whose package is imported here
        if protocol in EXTRAS:
            system.retries = 1  # s3fs would begin botocore's tries anew, five times
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        hint = f"pip install 'wmcache[{extra}]'" if extra else "pip install the file system that fsspec names for it"
        raise UserError(f"{text}: there is no file system for {protocol}:// here ({_reason(error)}); {hint}") from error
    except Exception as error:  # (whatever the file system makes of its settings)
        raise UserError(f"{text} cannot be used ({_reason(error)}); check the address and its settings") from error
    return found


def is_local(at: AnyPath) -> bool:
    """Whether it is a path, where files can be renamed, locked and mapped."""
    return isinstance(at, Path)


def reading_hint(at: AnyPath, error: OSError | None = None) -> str:
    """What a user can do about a place that cannot be read, as the end of an error."""
    if not isinstance(at, Path):
        return "check address, credentials and network, then run it again"
    return READING.get(error.errno or 0 if error else 0, "make it readable")


def unreadable(at: AnyPath, error: OSError) -> UnreadableError:
    """The error of a place that exists and cannot be read, with the reason and what a user can do about it."""
    return UnreadableError(f"{at} cannot be read ({error.strerror or error}); {reading_hint(at, error)}")


def cause_outside(error: BaseException | None) -> OSError | None:
    """The error of the system that led to another one; None where there is none, or it says that a file is missing.

    A library that fails to decode a file raises an `OSError` without a number: that is damage.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in MISSING:
            return error
        error = error.__cause__ or error.__context__
    return None


def beside(at: AnyPath, suffix: str) -> Path:
    """Where a file about a place goes: beside it, or for a URL in the working directory."""
    return at.resolve().with_suffix(suffix) if isinstance(at, Path) else Path(at.name).with_suffix(suffix)


def absolute(at: AnyPath) -> str:
    """As text that means the same in another process on another machine."""
    return str(at.absolute()) if isinstance(at, Path) else str(at)


@contextmanager
def as_os_errors(at: AnyPath) -> Iterator[None]:
    """Whatever a file system far away raises about a place, as an OSError with that place and a reason for people."""
    try:
        yield
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        reason = _reason(error)  # which may be no more than the key
        raise FileNotFoundError(errno.ENOENT, reason if " " in reason else "it does not exist", str(at)) from error
    except Exception as error:
        raise OSError(errno.EIO, _reason(error), str(at)) from error


def exists(at: AnyPath) -> bool:
    """Whether there is a file or a folder; raises OSError where that cannot be told."""
    if isinstance(at, Path):
        return at.exists()
    with as_os_errors(at):
        return bool(at.fs.exists(at.path))


def read_bytes(at: AnyPath) -> bytes:
    """A file's content; raises OSError."""
    if isinstance(at, Path):
        return at.read_bytes()
    with as_os_errors(at):
        return bytes(at.fs.cat_file(at.path))


def put(at: UPath, data: bytes, *, new: bool = False) -> str | None:
    """Write an object, whole or not at all.

    Args:
        at, data: where and what.
        new: only where there is none yet.

    Returns:
        Its tag, see `Found`.

    Raises:
        FileExistsError: there was one, and `new` was asked for.
        OSError: it cannot be written.
    """
    settings = {"mode": "create" if new else "overwrite", **PUT.get(at.protocol, {})}
    from fsspec.asyn import sync

    with as_os_errors(at):
        try:
            if not at.fs.async_impl:
                at.fs.pipe_file(at.path, data, **settings)
                return None
            # With a time limit of our own: a server that has gone silent is waited for without end.
            limit = PATIENCE + len(data) / SLOWEST
            return _tag(sync(at.fs.loop, at.fs._pipe_file, at.path, data, **settings, timeout=limit))
        except OSError as error:
            if new and at.fs.exists(at.path):  # some say that a precondition did not hold
                raise FileExistsError(str(at)) from error
            raise


def size_of(at: AnyPath) -> int:
    """Bytes of a file; raises OSError."""
    if isinstance(at, Path):
        return at.stat().st_size
    with as_os_errors(at):
        return int(at.fs.info(at.path)["size"])


def stamp(at: AnyPath) -> object:
    """Something that changes whenever a file is written anew; raises OSError."""
    if isinstance(at, Path):
        found = os.stat(at)  # noqa: PTH116 (half the time of Path.stat, and it is called for every batch)
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
    with as_os_errors(at):
        info = at.fs.info(at.path)
        return info.get("ETag"), str(info.get("LastModified") or info.get("created")), info["size"]


def names_in(folder: AnyPath, prefix: str = "") -> list[str]:
    """Names of what is in a folder, sorted; none where there is no folder. Raises OSError."""
    if isinstance(folder, Path):
        return sorted(at.name for at in folder.glob(f"{prefix}*"))
    return sorted(name for name, _ in files_in(folder, prefix))


def files_in(folder: AnyPath, prefix: str = "") -> Iterator[tuple[str, Found]]:
    """Names, sizes and checksums of the files in a folder whose names begin so; none where there is no folder. Raises OSError."""
    if isinstance(folder, Path):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(prefix) and entry.is_file():
                        yield entry.name, Found(entry.stat().st_size)
        return
    with as_os_errors(folder):
        listing = folder.fs.find(folder.path, detail=True, prefix=prefix)
    for key, info in listing.items():
        name = key.removeprefix(folder.path.rstrip("/") + "/")
        if name.startswith(prefix) and "/" not in name:  # some file systems know no prefixes
            yield name, Found(int(info["size"]), _tag(info))


def remove(at: AnyPath) -> None:
    """Delete a file, or a folder with all that is in it; nothing where there is none. Raises OSError."""
    if not isinstance(at, Path):
        with as_os_errors(at):
            if at.fs.exists(at.path):
                at.fs.rm(at.path, recursive=True)
    elif at.is_dir() and not at.is_symlink():
        shutil.rmtree(at)
    else:
        at.unlink(missing_ok=True)


def remove_files(files: Sequence[AnyPath]) -> None:
    """Delete files of one place, those that are there; from an object store many with a request. Raises OSError."""
    far = [at for at in files if not isinstance(at, Path)]
    for at in files:
        if isinstance(at, Path):
            remove(at)
    if far:
        system, folder = far[0].fs, far[0].parent
        with as_os_errors(folder):
            there = set(system.find(folder.path))
            if wanted := [at.path for at in far if at.path in there]:
                system.rm(wanted)


def top_names(folder: AnyPath) -> set[str]:
    """Names of all that is directly in a folder, folders too; none where there is no folder. Raises OSError."""
    if isinstance(folder, Path):
        return {at.name for at in folder.iterdir()} if folder.is_dir() else set()
    with as_os_errors(folder):
        try:
            return {key.rstrip("/").rpartition("/")[2] for key in folder.fs.ls(folder.path, detail=False)}
        except FileNotFoundError:
            return set()


def require_name(at: AnyPath) -> None:
    """Refuse, as a UserError, to write into a bucket itself."""
    if not at.name:
        raise UserError(f"{at} is no folder; name one in it, as {str(at).rstrip('/')}/NAME")


def upload(folder: Path, to: UPath, *, last: str) -> bool:
    """Copy a folder's files, `last` of all the one without which the copy does not count; False where that one is there already."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in files:
        if name != last:
            put(to / name, (folder / name).read_bytes())
    try:
        put(to / last, (folder / last).read_bytes(), new=True)
    except FileExistsError:
        return False
    return True


def open_to_read(at: AnyPath) -> io.BufferedIOBase:
    """A file to read from, in any order."""
    if isinstance(at, Path):
        return at.open("rb")
    return io.BytesIO(read_bytes(at))


def zarr_store(at: AnyPath) -> Any:
    """What zarr takes for a store there."""
    if isinstance(at, Path):
        return at
    from zarr.storage import FsspecStore  # most who name a place have no need of zarr

    return FsspecStore.from_url(str(at), storage_options=dict(at.storage_options))


def _tag(answer: Any) -> str | None:
    """The tag in what an object store has answered."""
    tag = str(answer.get("ETag") or "").strip('"').lower() if isinstance(answer, dict) else ""
    return tag if len(tag) == 32 and set(tag) <= set("0123456789abcdef") else None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
