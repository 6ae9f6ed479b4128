"""Registries find the entries of a package and of other installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmcache.common.errors import UserError
from wmcache.common.registry import Registry

POINT = "[wmcache.shapes]\nother = another_package_of_shapes\n"
Shapes = Registry[type[object]]


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """A registry whose own package is empty, beside an installed package with an entry point."""
    (tmp_path / "own_shapes").mkdir()
    (tmp_path / "own_shapes/__init__.py").touch()
    (tmp_path / "other-1.dist-info").mkdir()
    (tmp_path / "other-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (tmp_path / "other-1.dist-info/entry_points.txt").write_text(POINT)
    monkeypatch.syspath_prepend(tmp_path)
    registry: Shapes = Registry("shape", package="own_shapes", group="wmcache.shapes")
    registry.register("circle")(object)
    return registry


def test_an_entry_point_that_fails_is_reported_by_every_lookup(shapes: Shapes, tmp_path: Path) -> None:
    for _ in range(2):  # not as an unknown name
        with pytest.raises(UserError, match="another_package_of_shapes"):
            shapes.get("circle")
    (tmp_path / "another_package_of_shapes.py").touch()
    assert shapes.get("circle") is object


def test_an_unknown_name_is_answered_with_the_nearest_and_a_taken_one_is_refused(
    shapes: Shapes, tmp_path: Path
) -> None:
    (tmp_path / "another_package_of_shapes.py").touch()
    with pytest.raises(UserError, match=r"'cirle'.* circle"):
        shapes.get("cirle")
    with pytest.raises(ValueError, match="circle"):
        shapes.register("circle")(int)
