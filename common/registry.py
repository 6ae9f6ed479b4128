"""Registries of encoders, world models, solvers, …, from this package and from others."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from wmcache.common.errors import UserError, reason, suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and their entries.

    Entries come from the modules of one package of wmcache, which are imported on first use, and from entry points of other installed
    packages: each names a module that registers its entries when it is imported.

        SOLVERS: Registry[type[Solver]] = Registry("solver", package="wmcache.planner.solvers", group="wmcache.solvers")

        @SOLVERS.register("cem")
        class Cem: ...
    """

    def __init__(self, kind: str, *, package: str, group: str) -> None:
        """Import nothing yet; errors call an entry a `kind`, `group` is that of the entry points."""
        self.kind, self.package, self.group = kind, package, group
        self._entries: dict[str, T] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument; raise ValueError where the name is taken."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name} is registered already")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry of a name; raise UserError where it is unknown, or an entry point cannot be imported."""
        self._load()
        if name not in self._entries:
            raise UserError(
                f"unknown {self.kind} {name!r}, which no installed package has; {suggest(name, list(self))}"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names, sorted."""
        self._load()
        return iter(sorted(self._entries))

    def _load(self) -> None:
        if self._complete:
            return
        self._complete = True  # first, because modules may ask for each other's entries while they are imported
        for module in pkgutil.iter_modules(import_module(self.package).__path__, f"{self.package}."):
            import_module(module.name)
        for point in entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:  # whatever another package raises
                self._complete = False  # the next lookup reports it too, instead of missing the entries
                raise UserError(
                    f"{point.value} (entry point {point.name} of {self.group}) cannot be imported ({reason(error)}); "
                    "repair or uninstall that package"
                ) from error
