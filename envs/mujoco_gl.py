"""MuJoCo with a renderer that works without a screen, and an error that a user can act on where none does."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import sys
import weakref
from typing import Protocol

from wmcache.common.errors import UserError

# MuJoCo reads MUJOCO_GL once, at import. Without a screen, EGL works; the user's own choice is kept.
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

# Triton, which torch may import at any time, and Mesa each bring an LLVM; Triton crashes the process if it is loaded second.
with contextlib.suppress(ImportError):
    importlib.import_module("triton")

gl_failure: Exception | None = None
try:
    import mujoco
except Exception as error:  # noqa: BLE001 (from ImportError to AttributeError, depending on the backend)
    gl_failure = error
    for _name in [name for name in sys.modules if name == "mujoco" or name.startswith("mujoco.")]:
        del sys.modules[_name]
    _chosen = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disabled"
    import mujoco

    if _chosen is None:
        del os.environ["MUJOCO_GL"]
    else:
        os.environ["MUJOCO_GL"] = _chosen

__all__ = ["RendererError", "close_at_exit", "gl_failure", "mujoco", "open_renderer"]


class RendererError(UserError):
    """OpenGL is not available; the message names the MUJOCO_GL to choose and what to install."""

    @classmethod
    def of(cls, error: Exception) -> RendererError:
        """Return the error for an exception that opening a renderer raised."""
        chosen = os.environ.get("MUJOCO_GL", "")
        return cls(
            f"MuJoCo cannot draw with MUJOCO_GL={chosen!r} ({type(error).__name__}: {error}); choose MUJOCO_GL=egl "
            "(headless; Debian: apt-get install libegl1 libgl1), osmesa (headless, software; libosmesa6) or glfw (a screen)"
        )


def open_renderer(model: mujoco.MjModel, height: int, width: int | None = None) -> mujoco.Renderer:
    """Open a renderer, of square frames without a width; raises RendererError without OpenGL."""
    width, buffer = width or height, model.vis.global_
    buffer.offheight, buffer.offwidth = max(buffer.offheight, height), max(buffer.offwidth, width)
    try:
        if gl_failure is not None:
            raise gl_failure  # noqa: TRY301 (it ends as the same RendererError)
        renderer = mujoco.Renderer(model, height, width)
    except Exception as error:  # from ImportError to AttributeError, depending on the backend
        raise RendererError.of(error) from error
    close_at_exit(renderer)
    return renderer


class Closable(Protocol):
    """What has a GL context."""

    def close(self) -> None:
        """Free it; may be called again."""


_opened: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_at_exit(opened: Closable) -> None:
    """Close what has a GL context and is still open at exit: MuJoCo 3 reports an error for each context that is freed later."""
    _register()  # after the first context, because MuJoCo ends EGL by a function that is registered with it
    _opened.add(opened)


@functools.cache
def _register() -> None:
    atexit.register(_close_opened)


def _close_opened() -> None:
    for opened in list(_opened):
        with contextlib.suppress(Exception):  # of a context that another thread has used
            opened.close()
