"""Protocols: named settings of an evaluation. An option that is given beside `--protocol` wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wmcache.common.registry import Registry

PROTOCOLS: Registry[Mapping[str, Any]] = Registry(
    "protocol", package="wmcache.planner.protocols", group="wmcache.protocols"
)
"""Name -> fields of PlanOptions and options of its solver."""
