"""Reading files from outside with libraries that raise whatever they raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from wmcache.common.distributions import missing_requirement
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
    """Turn a lack of memory or of a package, and errors of the system that nothing else has explained, into a UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = missing_requirement(error.name or "")
        if package is None:  # a mistake in the code
            raise
        raise UserError(
            f"{package} is not installed, which this command needs; install all that wmcache needs: pip install wmcache"
        ) from error
    except MemoryError as error:
        raise UserError("not enough memory; lower --batch-size, or the N of --cluster local:N") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{reason(error)}; {CHECK_REMOTE if '://' in where else CHECK}") from error
