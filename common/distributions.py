"""The packages that wmcache requires, by the modules that they install."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "upath": "universal-pathlib", "yaml": "pyyaml"}
"""Module -> the package that installs it, where the names differ."""


def missing_requirement(module: str) -> str | None:
    """Return the package of a module that was not found; None where wmcache, without extras, does not require it."""
    top = module.partition(".")[0]
    package = DISTRIBUTIONS.get(top, top).replace("_", "-").lower()
    try:
        required = requires("wmcache") or []
    except PackageNotFoundError:
        return None
    lines = (line for line in required if "extra ==" not in line)
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0].replace("_", "-").lower() for line in lines}
    return package if package in names else None
