"""The registry of solvers. To add one, write a file with a frozen dataclass that is a `Solver`, and add it to SOLVERS."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from wmcache.common.errors import UserError
from wmcache.planner.base import Cost, Solver
from wmcache.planner.cem import Cem
from wmcache.planner.gd import Gd
from wmcache.planner.icem import Icem
from wmcache.planner.mppi import Mppi

SOLVERS: dict[str, type[Any]] = {"cem": Cem, "icem": Icem, "mppi": Mppi, "gd": Gd}
"""Name -> dataclass whose fields are the solver's options."""


def make_solver(name: str, **options: Any) -> Solver:
    """A solver.

    Args:
        name: in SOLVERS.
        options: fields of its dataclass; the rest keep their defaults.

    Raises:
        UserError: unknown name or option, or values that do not fit.
    """
    if name not in SOLVERS:
        raise UserError(f"no solver {name!r}; known are {', '.join(SOLVERS)}")
    known = [field.name for field in fields(SOLVERS[name])]
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"solver {name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    solver: Solver = SOLVERS[name](**options)
    return solver


__all__ = ["SOLVERS", "Cost", "Solver", "make_solver"]
