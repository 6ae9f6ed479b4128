"""Files of weights: safetensors only, because other formats may contain code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from wmcache.common.errors import UserError, reason
from wmcache.common.jsonfiles import read_json
from wmcache.common.reading import reading
from wmcache.common.tensors import load_tensors, open_tensors
from wmcache.pipeline.encoders.base import EncoderSpec

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Maps tensors to files if `save_pretrained` has written several."""
REFIT = "fit it again"
DECODER = "decoder."
"""Before the names of a decoder's tensors in a fitted file; files of earlier versions have none."""


def require_weights(path: Path) -> Path:
    """Return the path of a safetensors file, or of a folder with one or several; raises UserError if it is neither."""
    if path.is_dir() and any((path / name).is_file() for name in (FILE, INDEX)):
        return path
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(
            f"--weights {path}: neither an existing .safetensors file nor a folder with {FILE} or {INDEX} "
            "(other formats are not read: they may contain code)"
        )
    return path


def refuse_weights(spec: EncoderSpec, weights: Path | None) -> None:
    """Raise UserError if an encoder without weights is given some."""
    if weights is not None:
        raise UserError(f"encoder {spec.name} has no weights: {weights}; leave out --weights")


def weights_file(path: Path) -> Path:
    """Return the only file of a path that `require_weights` allows; raises UserError if there are several."""
    if not path.is_dir():
        return path
    if not (path / FILE).is_file():
        raise UserError(f"{path} contains several files of weights ({INDEX}); this encoder reads only {FILE}")
    return path / FILE


def _weights_files(path: Path) -> list[Path]:
    """Return all files of a path that `require_weights` allows; an index may name only files of its folder."""
    if not path.is_dir() or (path / FILE).is_file():
        return [weights_file(path)]
    index, hint = path / INDEX, "get the folder again"
    parts = read_json(index, hint).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise UserError(f"{index} is damaged (no weight_map); {hint}")
    names = sorted({str(name) for name in parts.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (path / name).is_file():
            raise UserError(f"{index} names {name[:80]!r}, which is no safetensors file of the folder; {hint}")
    return [path / name for name in names]


def read_metadata(path: Path) -> dict[str, str]:
    """Return the header of a safetensors file; raises OSError or SafetensorError."""
    with open_tensors(weights_file(path)) as file:
        return dict(file.metadata() or {})


def read_header(path: Path, encoder: str) -> dict[str, Any]:
    """Return the header that `wmcache fit` wrote, `options` and `base` decoded; raises UserError if it is of another encoder."""
    with reading(path, f"--weights {path} cannot be read", REFIT):
        header: dict[str, Any] = read_metadata(path)
        header |= {part: json.loads(header[part]) for part in ("options", "base") if part in header}
    if (found := header.get("encoder", "something else")) != encoder:
        raise UserError(f"--weights {path} contains {found}, not {encoder}; pass a file of {encoder}, or fit one")
    return header


def load_fitted(network: nn.Module, path: Path, encoder: str, decoder: nn.Module | None = None) -> bool:
    """Load a fitted network's weights, and those of a decoder where the file has some (`DECODER`); returns whether it has.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    with reading(path, f"--weights {path} does not fit {encoder}", REFIT):
        tensors = load_tensors(weights_file(path))
        drawing: dict[str, Tensor] = {}
        if decoder is not None:
            names = [name for name in tensors if name.startswith(DECODER)]
            drawing = {name.removeprefix(DECODER): tensors.pop(name) for name in names}
            if drawing:
                decoder.load_state_dict(drawing)
        network.load_state_dict(tensors)
    return bool(drawing)


def require_fitted(weights: Path | None, encoder: str, fitted_as: str) -> Path:
    """Return the path of fitted weights; raises UserError if none were given and none are at their default path."""
    if weights is None:
        hint = f"pass --weights, or make them with: wmcache fit --encoder {fitted_as}, on the same --dataset"
        raise UserError(f"encoder {encoder} has no fitted weights; {hint}")
    return weights


def read_tensors(path: Path, encoder: str, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read the tensors of a file or folder but those whose names start with one of `without`; raises UserError for a damaged file."""
    found: dict[str, Tensor] = {}
    for file in _weights_files(path):
        fault = f"{file} does not contain the weights of {encoder}"
        with reading(file, fault, "get it again"), open_tensors(file) as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if not name.startswith(without)}  # noqa: SIM118 (no mapping)
    return found


def without_batch_counts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the numbers of batches behind statistics: they change no token, and not every file has them, so no identity does."""
    return {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}


@dataclass(frozen=True)
class FittedFile:
    """A file that `wmcache fit` wrote, with the fingerprint of its dataset and an adapter's base; `fault` is why it cannot be used."""

    path: Path
    bytes: int
    encoder: str = ""
    dataset: str = ""
    base: str = ""
    base_weights: str = ""
    fault: str = ""


def list_fitted(folder: Path) -> list[FittedFile]:
    """List the fitted files of a folder, damaged ones included."""
    found = []
    for path in filter(Path.is_file, sorted(folder.glob("*.safetensors"))):
        size = path.stat().st_size
        try:
            header = read_metadata(path)
            base = json.loads(header.get("base", "{}"))
            on = base.get("name", ""), base.get("weights") or ""
            found.append(FittedFile(path, size, header["encoder"], header.get("dataset", ""), *map(str, on)))
        except (OSError, SafetensorError, ValueError, AttributeError, KeyError) as error:
            found.append(FittedFile(path, size, fault=f"cannot be read as weights of wmcache fit ({reason(error)})"))
    return found
