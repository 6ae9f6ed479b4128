"""MuJoCo, imported so that a missing OpenGL library is an error only when something is drawn.

MuJoCo reads MUJOCO_GL once, at import, and loads that backend at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

from wmcache.common.errors import UserError


class RendererError(UserError):
    """OpenGL is not available; the message names the MUJOCO_GL to choose and what to install."""


# Without a screen, EGL works; the user's own choice is kept.
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

__all__ = ["RendererError", "gl_failure", "mujoco"]
