"""Reading files from outside with libraries that raise whatever they raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from wmcache.common.errors import UserError, reason
from wmcache.common.paths import CHECK, CHECK_REMOTE, AnyPath, cause_outside, unreadable


@contextmanager
def reading(path: AnyPath, fault: str, hint: str) -> Iterator[None]:
    """Turn any error of the block into a UserError, `fault (reason); hint`, or an UnreadableError where the system cannot read `path`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        raise UserError(f"{fault} ({reason(error)}); {hint}") from error


@contextmanager
def system_errors() -> Iterator[None]:
    """Turn a lack of memory, and errors of the system that nothing else has explained, into a UserError."""
    try:
        yield
    except MemoryError as error:
        raise UserError("not enough memory; lower --batch-size, or the N of --cluster local:N") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{reason(error)}; {CHECK_REMOTE if '://' in where else CHECK}") from error
