"""Paths and URLs behind one interface: local files and the object stores that fsspec knows.

A path is a `Path`; any other address (`s3://bucket/key`, `memory://name`) is a `UPath`. Functions raise OSError, whatever a remote file
system raises. An object appears whole or not at all, but it cannot be renamed or locked: two processes may write it at once.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from typing_extensions import TypeIs

from wmcache.common.errors import UnreadableError, UserError, reason

if TYPE_CHECKING:
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"

EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Protocol -> the extra of this package that installs its file system."""
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        # Give up on a silent server after a minute.
        "config_kwargs": {
            "connect_timeout": 5,
            "read_timeout": 20,
            **({} if "AWS_MAX_ATTEMPTS" in os.environ else {"retries": {"total_max_attempts": 3, "mode": "standard"}}),
        }
    },
}
PUT: dict[str, dict[str, Any]] = {"s3": {"chunksize": 5 * 2**30}}
"""Objects are sent in one request, up to S3's limit for one, so that their tag is the MD5 of one part."""
PATIENCE = 60.0
SLOWEST = 1e6
"""Seconds, and bytes a second, that a server may take to receive an object."""

CHECK = "check permissions, free space, mount and limits (ulimit -a), then run the same command again"
CHECK_REMOTE = "check address, credentials and network, then run the same command again"
"""What a user can do about an error of the system; the error's own text has the reason."""
NO_MAPS = (errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of file systems that open a file but do not map it."""
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Error numbers of a file that does not exist, or is a folder."""


class Found(NamedTuple):
    """A file in a listing; object stores may tag it with 32 hexadecimal digits, different for each write."""

    bytes: int
    tag: str | None = None


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


def as_path(text: str | AnyPath) -> AnyPath:
    """Return the path or URL that a text names; raise UserError where its file system is unknown, or not installed."""
    if not isinstance(text, str):
        return text
    protocol, separator, rest = text.partition("://")
    if not (separator or re.match(r"[a-z][a-z0-9]+:/", text)):
        return Path(text)
    if protocol == "file" and rest.startswith("/"):
        return Path(rest)
    if protocol == "file" or not rest.strip("/"):
        raise UserError(f"{text!r} is not a path or URL; write ./folder, file:///folder or s3://bucket/folder")
    from upath import UPath  # slow to import, and needed for URLs only

    try:
        # Other processes write there too, so listings must not be cached.
        found: UPath = UPath(text, use_listings_cache=False, **OPTIONS.get(protocol, {}))
        system = type(found.fs)  # imports the file system's package
        if protocol in EXTRAS:
            system.retries = 1  # s3fs would repeat botocore's attempts five times
    except ImportError as error:
        hint = f"pip install {f'wmcache[{EXTRAS[protocol]}]' if protocol in EXTRAS else 'what fsspec names for it'}"
        raise UserError(f"no file system is installed ({reason(error)}): {text}; {hint}") from error
    except Exception as error:  # whatever the file system raises about its settings
        raise UserError(f"{text} cannot be used ({reason(error)}); check the address and its settings") from error
    return found


def require_name(at: AnyPath) -> None:
    """Raise UserError for a bucket without a folder in it, which must not be written to."""
    if not at.name:
        raise UserError(f"{at} is a bucket, not a folder; name one in it, as {str(at).rstrip('/')}/NAME")


def absolute(at: AnyPath) -> str:
    """Return text that means the same in another process on another machine."""
    return str(at.absolute())


def beside(at: AnyPath, suffix: str) -> Path:
    """Return where a file about a path goes: beside it, or for a URL in the working directory."""
    return (at.resolve() if is_local(at) else Path(at.name)).with_suffix(suffix)


def exists(at: AnyPath) -> bool:
    """Return whether there is a file or a folder; raise OSError where that cannot be determined."""
    if is_local(at):
        return at.exists()
    with as_os_errors(at):
        return at.exists()


def read_bytes(at: AnyPath) -> bytes:
    """Return a file's content."""
    if is_local(at):
        return at.read_bytes()
    with as_os_errors(at):
        return bytes(at.fs.cat_file(at.path))


def open_to_read(at: AnyPath) -> io.BufferedIOBase:
    """Open a file for reading in any order."""
    return at.open("rb") if is_local(at) else io.BytesIO(read_bytes(at))


def size_of(at: AnyPath) -> int:
    """Return a file's bytes."""
    if is_local(at):
        return at.stat().st_size
    with as_os_errors(at):
        return int(at.stat().st_size)


def stamp(at: AnyPath) -> object:
    """Return a value that changes whenever a file is written again."""
    if is_local(at):
        found = os.stat(at)  # noqa: PTH116 (half the time of Path.stat, and it is called for every batch)
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
    with as_os_errors(at):
        info = at.fs.info(at.path)
    return info.get("ETag"), str(info.get("LastModified") or info.get("created")), info["size"]


def names_in(folder: AnyPath, prefix: str = "") -> list[str]:
    """Return the sorted names in a folder that start with `prefix`, none where the folder does not exist."""
    if is_local(folder):
        return sorted(at.name for at in folder.glob(f"{prefix}*"))
    if prefix:
        return sorted(name for name, _ in files_in(folder, prefix))
    with as_os_errors(folder):
        try:
            return sorted(key.rstrip("/").rpartition("/")[2] for key in folder.fs.ls(folder.path, detail=False))
        except FileNotFoundError:
            return []


def files_in(folder: AnyPath, prefix: str = "") -> Iterator[tuple[str, Found]]:
    """Yield names, sizes and tags of the files in a folder whose names start with `prefix`, in no order."""
    if is_local(folder):
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
        if name.startswith(prefix) and "/" not in name:  # some file systems ignore the prefix
            yield name, Found(int(info["size"]), _tag(info))


def folders_below(folder: AnyPath, suffix: str) -> Iterator[AnyPath]:
    """Yield the folders at any depth whose names end in `suffix`, without looking inside of them."""
    if is_local(folder):
        for root, names, _ in os.walk(folder):
            for name in [name for name in names if name.endswith(suffix)]:
                names.remove(name)
                yield Path(root, name)
        return
    with as_os_errors(folder):
        for root, below, _ in folder.fs.walk(folder.path, detail=True):
            for name in [name for name in below if name.endswith(suffix)]:
                del below[name]
                yield folder / root.removeprefix(folder.path.rstrip("/")).strip("/") / name


def usage(folder: AnyPath) -> int:
    """Return the bytes of all files below; files that disappear meanwhile do not count."""
    if not is_local(folder):
        with as_os_errors(folder):
            return int(folder.fs.du(folder.path)) if folder.fs.exists(folder.path) else 0
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += Path(root, name).stat().st_size
    return total


def free_space(at: AnyPath) -> int | None:
    """Return the free bytes of the file system that a path is, or would be, on; None for an object store, which has no limit."""
    if not is_local(at):
        return None
    existing = at.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def remove(at: AnyPath) -> None:
    """Delete a file, or a folder with its content, if it exists."""
    if not is_local(at):
        with as_os_errors(at):
            if at.fs.exists(at.path):
                at.fs.rm(at.path, recursive=True)
    elif at.is_dir() and not at.is_symlink():
        shutil.rmtree(at)
    else:
        at.unlink(missing_ok=True)


def remove_files(files: Sequence[AnyPath]) -> None:
    """Delete the files of one folder that exist, from an object store many with one request."""
    folder = files[0].parent
    if is_local(folder):
        for file in files:
            file.unlink(missing_ok=True)
        return
    with as_os_errors(folder):
        existing = set(folder.fs.find(folder.path))
        if wanted := [path for file in files if (path := (folder / file.name).path) in existing]:
            folder.fs.rm(wanted)


def put(at: UPath, data: bytes, *, new: bool = False) -> str | None:
    """Write an object, whole or not at all, and return its tag; raise FileExistsError where there is one and `new` is set."""
    from fsspec.asyn import sync

    settings = {"mode": "create" if new else "overwrite", **PUT.get(at.protocol, {})}
    with as_os_errors(at):
        try:
            if not at.fs.async_impl:
                at.fs.pipe_file(at.path, data, **settings)
                return None
            # fsspec itself waits for a silent server without limit.
            limit = PATIENCE + len(data) / SLOWEST
            return _tag(sync(at.fs.loop, at.fs._pipe_file, at.path, data, **settings, timeout=limit))
        except OSError as error:
            if new and at.fs.exists(at.path):  # some servers report a failed precondition instead
                raise FileExistsError(str(at)) from error
            raise


def upload(folder: Path, to: UPath, *, last: str) -> bool:
    """Copy a folder's files, and `last` after all others; return False where `last` exists already."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in files:
        if name != last:
            put(to / name, (folder / name).read_bytes())
    try:
        put(to / last, (folder / last).read_bytes(), new=True)
    except FileExistsError:
        return False
    return True


def _tag(answer: Any) -> str | None:
    tag = str(answer.get("ETag") or "").strip('"').lower() if isinstance(answer, dict) else ""
    return tag if re.fullmatch("[0-9a-f]{32}", tag) else None


def unreadable(at: AnyPath, error: OSError) -> UnreadableError:
    """Return the error of a path that exists and cannot be read."""
    return UnreadableError(f"{at} cannot be read ({reason(error)}); {CHECK if is_local(at) else CHECK_REMOTE}")


@contextmanager
def readable(at: AnyPath) -> Iterator[None]:
    """Turn an OSError into the UnreadableError of a path."""
    try:
        yield
    except OSError as error:
        raise unreadable(at, error) from error


def cause_outside(error: BaseException | None) -> OSError | None:
    """Return the system's error that led to another one; None if there is none, or if a file is missing.

    A library that fails to decode a file raises an `OSError` without a number: that is damage.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in MISSING:
            return error
        error = error.__cause__ or error.__context__
    return None
