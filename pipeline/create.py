"""A dataset and encoders as a user names them; an encoder's weights may be fitted on the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmcache.common.errors import UserError
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.fit import default_weights
from wmcache.pipeline.frames import FrameDataset


def open_dataset(path: AnyPath | None) -> FrameDataset:
    """Open the dataset at `path`, or the default one."""
    return FrameDataset.open(path or home() / "pointmaze-umaze")


def open_inputs(dataset: AnyPath | None, encoder: dict[str, Any]) -> tuple[FrameDataset, list[Encoder]]:
    """Open a dataset, and create encoders with its fitted weights; `encoder` has arguments of `create_encoders`."""
    frames = open_dataset(dataset)
    return frames, create_encoders(frames.card.name, **encoder)


def create_encoders(
    dataset: str, *, names: str, weights: Sequence[str] = (), base_weights: Path | None = None, **options: Any
) -> list[Encoder]:
    """Create encoders.

    Args:
        dataset: name of the dataset whose fitted weights are taken.
        names: separated by commas.
        weights: `PATH` for all encoders that are not fitted, `NAME=PATH` for one.
        base_weights, options: as in `encoders.create`.

    Raises:
        UserError: a name or path does not fit; or as `encoders.create`.
    """
    wanted = [name.strip() for name in names.split(",")]
    if len(set(wanted)) < len(wanted):
        raise UserError(f"--encoder {names} has a name twice; name each once")
    files = _weights_by_name(weights, wanted)
    paths: dict[str, Path | None] = {}
    for name in wanted:
        own = encoders.get_entry(encoders.family_of(name))  # a fitted family's layers have its weights
        fitted = default_weights(dataset, own.spec.name)
        of_all = files.get("") if len(wanted) == 1 or own.fit is None else None
        paths[name] = files.get(name) or of_all or (fitted if fitted.exists() else None)
    if "" in files and files[""] not in paths.values():
        raise UserError(f"--weights {files['']} fits none of {', '.join(wanted)}; write --weights NAME={files['']}")
    bases = {name: base_weights for name in wanted if encoders.get_entry(name).load is None}
    if base_weights is not None and not bases:
        raise UserError(f"--base-weights {base_weights}: {', '.join(wanted)} has no base encoder; leave it out")
    return [
        encoders.create(name, weights=path, base_weights=bases.get(name), **options) for name, path in paths.items()
    ]


def _weights_by_name(given: Sequence[str], wanted: Sequence[str]) -> dict[str, Path]:
    """Split `NAME=PATH`; a path without a name is under the empty one."""
    files: dict[str, Path] = {}
    for word in given:
        name, equals, path = word.partition("=")
        if not equals or name not in wanted:
            name, path = "", word
        if name in files:
            raise UserError(f"--weights {word} is the second for {name or 'all encoders'}; write --weights NAME=PATH")
        files[name] = Path(path)
    return files
