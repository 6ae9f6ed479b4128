"""Self-contained HTML pages."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from wmcache.common.files import atomic_write


def write_page(path: Path, package: str, template: str, **values: Any) -> None:
    """Render a template of a package. It has the filters `base64`, of bytes, and `figure`, of a number or None to 2 digits or others."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"base64": lambda content: base64.b64encode(content).decode(), "figure": _figure}
    html = environment.from_string(files(package).joinpath(template).read_text()).render(**values)
    with atomic_write(path) as file:
        file.write(html.encode())


def _figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"
