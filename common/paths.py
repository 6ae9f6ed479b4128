"""Paths and URLs: what can be done with both, and what an error of the system means for a user."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmcache.common.errors import UnreadableError, UserError, reason
from wmcache.common.storage import AnyPath as AnyPath  # exported, as every path comes from here
from wmcache.common.storage import Found as Found
from wmcache.common.storage import as_os_errors, storage, tag_of
from wmcache.common.storage import is_local as is_local

if TYPE_CHECKING:
    from upath import UPath

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
"""Objects are sent in one request, up to S3's limit for one, so that their tag is an MD5 of one part."""
PATIENCE = 60.0
SLOWEST = 1e6
"""Seconds, and bytes a second, that a server may take to receive an object."""

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
"""Error number of reading a local file -> what a user can do about it; about all others: make it readable."""
WRITING: dict[int, str] = {
    **READING,
    errno.EACCES: "make it writable, or choose another path",
    errno.EPERM: "make it writable, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f), or choose another path",
}
"""The same for writing; about all others: free space."""
NO_MAPS = (errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of file systems that open a file but do not map it."""
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Error numbers of a file that does not exist, or is a folder."""


def as_path(text: str | AnyPath) -> AnyPath:
    """Return the path or URL that a text names.

    Raises:
        UserError: no file system is known for the URL, or its package is not installed.
    """
    if not isinstance(text, str):
        return text
    protocol, separator, rest = text.partition("://")
    if not separator:
        if re.match(r"[a-z][a-z0-9]+:/", text):
            raise UserError(f"{text!r} is neither a path nor a URL; write ://, or ./ before a folder of that name")
        return Path(text)
    if protocol == "file" and rest.startswith("/"):
        return Path(rest)
    if protocol == "file" or not rest.strip("/"):
        example = "/folder" if protocol == "file" else "bucket/folder"
        raise UserError(f"{text!r} is not a path or URL; expected something like {protocol}://{example}")
    from upath import UPath  # slow to import, and needed for URLs only

    try:
        # Other processes write there too, so listings must not be cached.
        found: UPath = UPath(text, use_listings_cache=False, **OPTIONS.get(protocol, {}))
        system = type(found.fs)  # imports the file system's package
        if protocol in EXTRAS:
            system.retries = 1  # s3fs would repeat botocore's attempts five times
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        hint = f"pip install 'wmcache[{extra}]'" if extra else "pip install the file system that fsspec names for it"
        raise UserError(
            f"the file system of {protocol}:// is not installed ({reason(error)}): {text}; {hint}"
        ) from error
    except Exception as error:  # whatever the file system raises about its settings
        raise UserError(f"{text} cannot be used ({reason(error)}); check the address and its settings") from error
    return found


def require_name(at: AnyPath) -> None:
    """Raise UserError for a bucket without a folder in it, which must not be written to."""
    if not at.name:
        raise UserError(f"{at} is a bucket, not a folder; name one in it, as {str(at).rstrip('/')}/NAME")


def absolute(at: AnyPath) -> str:
    """Return text that means the same in another process on another machine."""
    return str(at.absolute()) if is_local(at) else str(at)


def resolve(at: AnyPath) -> AnyPath:
    """Return a path with its links followed."""
    return at.resolve() if is_local(at) else at


def beside(at: AnyPath, suffix: str) -> Path:
    """Return where a file about a path goes: beside it, or for a URL in the working directory."""
    return (at.resolve() if is_local(at) else Path(at.name)).with_suffix(suffix)


def exists(at: AnyPath) -> bool:
    """Return whether there is a file or a folder; raise OSError where that cannot be determined."""
    return storage(at).exists()


def read_bytes(at: AnyPath) -> bytes:
    """Return a file's content; raise OSError."""
    return storage(at).read()


def open_to_read(at: AnyPath) -> io.BufferedIOBase:
    """Open a file for reading in any order; raise OSError."""
    return at.open("rb") if is_local(at) else io.BytesIO(read_bytes(at))


def size_of(at: AnyPath) -> int:
    """Return a file's bytes; raise OSError."""
    return storage(at).size()


def stamp(at: AnyPath) -> object:
    """Return a value that changes whenever a file is written again; raise OSError."""
    return storage(at).stamp()


def names_in(folder: AnyPath, prefix: str = "") -> list[str]:
    """Return the sorted names in a folder that start with `prefix`, none where the folder does not exist; raise OSError."""
    return storage(folder).names(prefix)


def files_in(folder: AnyPath, prefix: str = "") -> Iterator[tuple[str, Found]]:
    """Yield names, sizes and tags of the files in a folder, as `names_in` selects them, in no order; raise OSError."""
    return storage(folder).files(prefix)


def free_space(at: AnyPath) -> int | None:
    """Return the free bytes of the file system that a path is, or would be, on; None for an object store, which has no limit."""
    return storage(at).free_space()


def top_names(folder: AnyPath) -> set[str]:
    """Return the names of files and folders in a folder, none where it does not exist; raise OSError."""
    return storage(folder).top_names()


def remove(at: AnyPath) -> None:
    """Delete a file, or a folder with its content, if it exists; raise OSError."""
    storage(at).remove()


def remove_files(files: Sequence[AnyPath]) -> None:
    """Delete the files of one folder that exist, from an object store many with one request; raise OSError."""
    storage(files[0].parent).remove_files([file.name for file in files])


def put(at: UPath, data: bytes, *, new: bool = False) -> str | None:
    """Write an object, whole or not at all, and return its tag, see `Found`.

    Args:
        new: do not replace an object.

    Raises:
        FileExistsError: there is an object, and `new` is set.
        OSError: it cannot be written.
    """
    from fsspec.asyn import sync

    settings = {"mode": "create" if new else "overwrite", **PUT.get(at.protocol, {})}
    with as_os_errors(at):
        try:
            if not at.fs.async_impl:
                at.fs.pipe_file(at.path, data, **settings)
                return None
            # fsspec itself waits for a silent server without limit.
            limit = PATIENCE + len(data) / SLOWEST
            return tag_of(sync(at.fs.loop, at.fs._pipe_file, at.path, data, **settings, timeout=limit))
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


def reading_hint(at: AnyPath, error: OSError | None = None) -> str:
    """Return what a user can do about a path that cannot be read, as the end of an error."""
    if not is_local(at):
        return "check address, credentials and network, then run it again"
    return READING.get(error.errno or 0 if error else 0, "make it readable")


def unreadable(at: AnyPath, error: OSError) -> UnreadableError:
    """Return the error of a path that exists and cannot be read."""
    return UnreadableError(f"{at} cannot be read ({reason(error)}); {reading_hint(at, error)}")


def cause_outside(error: BaseException | None) -> OSError | None:
    """Return the system's error that led to another one; None if there is none, or if a file is missing.

    A library that fails to decode a file raises an `OSError` without a number: that is damage.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in MISSING:
            return error
        error = error.__cause__ or error.__context__
    return None
