"""The folders of wmcache: their markers, where they usually are, and which one a wrong path may have meant."""

from __future__ import annotations

import contextlib
import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, is_local


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        label: for errors.
        files: every folder of this kind has them. The first is its marker: other programs have no file of that name.
        usual: globs in `home`.
    """

    label: str
    files: tuple[str, ...]
    usual: tuple[str, ...]


KINDS = {
    "store": Kind("a token store", ("zarr.json",), ("*.zarr", "stores/*.zarr", "stores/*/*.zarr")),
    "dataset": Kind("a frame dataset", ("dataset.json",), ("*",)),
    "run": Kind("a run or a decoder", ("identity.json", "config.json"), ("runs/*",)),
}


def home() -> Path:
    """Return where datasets, encoders, stores and runs are: $WMCACHE_HOME, or `data/` in the working directory.

    Raises:
        UserError: it is a URL.
    """
    folder = os.environ.get("WMCACHE_HOME", "data")
    if "://" in folder:
        raise UserError(f"WMCACHE_HOME must be a local folder: {folder}; pass URLs to --dataset, --out and --cache")
    return Path(folder)


def name_of(store: AnyPath) -> str:
    """Return the default name of what is made of a store: the store's and its folder's, usually the dataset's."""
    return f"{store.absolute().parent.name}-{store.stem}".lstrip("-")


def default_run(store: AnyPath) -> Path:
    """Return the default folder of a run on a store."""
    return home() / "runs" / name_of(store)


def did_you_mean(missing: AnyPath, kind: str, otherwise: str) -> str:
    """Return a hint for the error about a missing folder: an existing one of the same path under `home`, or of a similar name.

    Args:
        kind: key of `KINDS`.
        otherwise: the hint where no folder is similar.
    """
    if not is_local(missing):
        return otherwise
    file = KINDS[kind].files[-1]
    similar: dict[str, Path] = {}
    with contextlib.suppress(OSError, UserError, ValueError):
        parts = missing.parts[missing.is_absolute() :]
        same = (home().joinpath(*parts[start:]) for start in range(len(parts)))
        if found := next((path for path in same if (path / file).is_file()), None):
            return f"did you mean {found}?"
        near = [*missing.parent.glob("*"), *(path for pattern in KINDS[kind].usual for path in home().glob(pattern))]
        # By stem: the common suffix would make all stores similar.
        similar = {path.stem: path for path in near if (path / file).is_file()}
    if close := difflib.get_close_matches(missing.stem, similar, n=1):
        return f"did you mean {similar[close[0]]}?"
    return otherwise


def other_kind(missing: AnyPath) -> str | None:
    """Return what the folder of a missing file is, and what it is not; None where that is unknown."""
    wanted = next((kind for kind in KINDS.values() if missing.name in kind.files), None)
    if wanted is None or not is_local(missing):
        return None
    found = "a file" if missing.parent.is_file() else None
    for kind in KINDS.values():
        if kind is not wanted and (missing.parent / kind.files[0]).is_file():
            found = found or kind.label
    return f"{found}, not {wanted.label}" if found else None
