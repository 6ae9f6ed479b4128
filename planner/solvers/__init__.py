"""Solvers of the planning problem, one file each. A new one is a file here, or an entry point of the group `wmcache.solvers`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from wmcache.common.options import parse_options
from wmcache.common.registry import Registry
from wmcache.planner.base import Cost, Solver

SOLVERS: Registry[type[Solver]] = Registry("solver", package="wmcache.planner.solvers", group="wmcache.solvers")
"""Name -> frozen dataclass whose fields are the solver's options."""


def option_names(solver: str) -> list[str]:
    """List the options of a solver; raises UserError for an unknown solver."""
    return [field.name for field in fields(SOLVERS.get(solver))]


def make_solver(name: str, **options: Any) -> Solver:
    """Create a solver; raise UserError for an unknown name or option, or invalid values."""
    return parse_options(SOLVERS.get(name), options, f"solver {name}")


__all__ = ["SOLVERS", "Cost", "Solver", "make_solver", "option_names"]
