"""MuJoCo, imported so that a missing OpenGL library is an error when something is drawn, and not before.

MuJoCo reads MUJOCO_GL once, when it is imported, and loads that backend there and then.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys


class RendererError(RuntimeError):
    """No OpenGL to draw with; the message says which MUJOCO_GL to choose and what to install."""


# Without a screen, EGL is what works; the user's own choice stands.
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

# Torch's Triton and Mesa each bring an LLVM, and Triton crashes the process when it comes second; torch may import it at any time.
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
