"""Encoders by the names and weights that a user gives, with weights fitted on the dataset where there are such."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.fit import default_weights


def create_encoders(
    dataset: str,
    *,
    names: str,
    weights: Sequence[str] = (),
    device: str = "auto",
    base_weights: Path | None = None,
    **options: Any,
) -> list[Encoder]:
    """Create encoders.

    Args:
        dataset: name of the dataset whose fitted weights are taken.
        names: of encoders, separated by commas.
        weights: `PATH` for all encoders that are not fitted, `NAME=PATH` for one.
        device, base_weights: as in `encoders.create`.
        options: fields of `EncoderOptions`.

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
    adapters = [name for name in wanted if encoders.get_entry(name).load is None]
    if base_weights is not None and not adapters:
        raise UserError(f"--base-weights {base_weights}: {', '.join(wanted)} has no base encoder; leave it out")
    return [
        encoders.create(
            name, weights=path, base_weights=base_weights if name in adapters else None, device=device, **options
        )
        for name, path in paths.items()
    ]


def _weights_by_name(given: Sequence[str], wanted: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` by name, and a path without a name under the empty one."""
    files: dict[str, Path] = {}
    for word in given:
        name, equals, path = word.partition("=")
        if not equals or name not in wanted:
            name, path = "", word
        if name in files:
            raise UserError(f"--weights {word} is the second for {name or 'all encoders'}; write --weights NAME=PATH")
        files[name] = Path(path)
    return files
