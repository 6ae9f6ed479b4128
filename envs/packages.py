"""Optional packages of environments: a clear error where one is missing, or does not work with the installed MuJoCo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from wmcache.common.errors import UserError, reason
from wmcache.envs.mujoco_gl import mujoco


@contextmanager
def installed_for(name: str, package: str, extra: str) -> Iterator[None]:
    """Turn whatever a package of an environment raises into one line that names the versions and the extra to install."""
    try:
        yield
    except Exception as error:  # from ImportError to AttributeError, depending on the versions
        try:
            found = f"{package} {version(package)} does not work with MuJoCo {mujoco.__version__}"
        except PackageNotFoundError:
            found = f"{package} is not installed"
        raise UserError(
            f"{name}: {found} ({type(error).__name__}: {reason(error)}); pip install 'wmcache[{extra}]'"
        ) from error
