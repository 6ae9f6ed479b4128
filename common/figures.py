"""Figures as PNG files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png_bytes(figure: Figure, **settings: Any) -> bytes:
    """Return the figure as a PNG file; `settings` are those of `Figure.savefig`, such as `dpi`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **settings)
    return buffer.getvalue()
