"""Locks between processes, as files."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from wmcache.common.files import not_written
from wmcache.common.paths import CHECK, AnyPath, is_local

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Error numbers of file systems without file locks."""


@contextmanager
def exclusive(lock: AnyPath, guarded: AnyPath | None = None, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file against all other processes; the operating system releases it when its holder dies.

    Args:
        lock: the file, which exists only while it is held. Object stores have no locks: there all processes continue.
        guarded: what the error names; `lock` by default.

    Yields:
        Whether this process holds it; False only without `wait`.
    """
    if not is_local(lock):
        yield True
        return
    # A soft lock, a file without a system lock, would stay when its holder dies.
    held = FileLock(lock, timeout=-1 if wait else 0, thread_local=False, fallback_to_soft=False)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        hint = CHECK
        if error.errno in NO_LOCKS:
            with contextlib.suppress(OSError):  # no process can hold it
                lock.unlink(missing_ok=True)
            hint = "choose a path on a file system with file locks, such as a local disk"
        raise not_written(guarded or lock, error, hint) from error
    try:
        yield True
    finally:
        # Before the release: a process that waits for this file then sees that it is gone, and creates another.
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)
        held.release()
