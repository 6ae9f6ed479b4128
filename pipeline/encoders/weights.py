"""Files of weights: safetensors only, from disk or from the Hugging Face hub.

What comes from the hub is pinned and checked: `$WMCACHE_HOME/encoders/pins.json` holds for each repository the commit and the SHA-256 of
what was downloaded first, which is asked for, and compared with, ever after. $HF_HOME and $HF_HUB_OFFLINE are honoured.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.common.folders import home
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.locks import exclusive
from wmcache.common.paths import cause_outside, unreadable
from wmcache.common.schema import Count, parse
from wmcache.common.space import human_bytes
from wmcache.common.tensors import Tensors, load_tensors, open_tensors
from wmcache.pipeline.encoders.base import EncoderSpec

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Which file holds which tensor, where `save_pretrained` has written several (shards)."""
SHA256 = re.compile("[0-9a-f]{64}")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def require_weights(path: Path) -> Path:
    """The path of a safetensors file, or of a folder that holds one or several as `save_pretrained` writes them.

    Raises:
        UserError: it is neither.
    """
    if path.is_dir() and any((path / name).is_file() for name in (FILE, INDEX)):
        return path
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(
            f"--weights {path}: neither an existing .safetensors file nor a folder with {FILE} or {INDEX} "
            "(nothing else is read: it could hold code)"
        )
    return path


def weights_file(path: Path) -> Path:
    """The file itself, of what `require_weights` allows.

    Raises:
        UserError: there are several.
    """
    if not path.is_dir():
        return path
    if not (path / FILE).is_file():
        raise UserError(f"{path} holds its weights in several files ({INDEX}), and this encoder takes one: {FILE}")
    return path / FILE


def weights_files(path: Path) -> list[Path]:
    """All files, of what `require_weights` allows.

    Raises:
        UserError: a folder's index is damaged, or names a file that is missing or is not in the folder.
    """
    if not path.is_dir() or (path / FILE).is_file():
        return [weights_file(path)]
    again = "get the folder again"
    parts = read_json(path / INDEX, again).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise UserError(f"{path / INDEX} is damaged (no weight_map); {again}")
    names = sorted({str(name) for name in parts.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{path / INDEX} names {name[:80]!r}, which is no safetensors file of the folder; {again}")
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing, one of {len(names)} files of {INDEX}; {again}")
    return [path / name for name in names]


def read_metadata(path: Path) -> dict[str, str]:
    """The head of a safetensors file; raises OSError or SafetensorError where it cannot be read."""
    with open_tensors(weights_file(path)) as file:
        return dict(file.metadata() or {})


def read_header(path: Path, encoder: str) -> dict[str, str]:
    """What `wmcache fit` wrote into the head of a file.

    Raises:
        UserError: it cannot be read, or is not of that encoder.
    """
    try:
        header = read_metadata(path)
    except (OSError, SafetensorError) as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        raise UserError(f"--weights {path} cannot be read ({error}); fit it again") from error
    if header.get("encoder") != encoder:
        raise UserError(
            f"--weights {path} holds {header.get('encoder', 'something else')}, not {encoder}; pass a file of {encoder}, or fit one"
        )
    return header


def read_json_part(header: dict[str, str], part: str, path: Path) -> Any:
    """A part of `read_header`'s that is JSON.

    Raises:
        UserError: it is missing, or none.
    """
    try:
        return json.loads(header[part])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"--weights {path} does not say its {part} ({type(error).__name__}); fit it again") from error


def load_fitted(network: nn.Module, path: Path, encoder: str) -> None:
    """Load a fitted network's weights.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    try:
        network.load_state_dict(load_tensors(weights_file(path)))
    except (SafetensorError, RuntimeError, OSError) as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--weights {path} does not fit {encoder} ({reason}); fit it again") from error


def not_fitted(encoder: str, fitted_as: str) -> UserError:
    """The error of fitted weights that were not given and are not at their default path."""
    return UserError(
        f"encoder {encoder} has no fitted weights here; pass --weights, or make them with: "
        f"wmcache fit --encoder {fitted_as}, on the same --dataset"
    )


def read_tensors(path: Path, encoder: str, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder's.

    Args:
        path: as `require_weights` allows.
        encoder: whose they are, for the message.
        without: beginnings of names that are not read, which may be most of the file.

    Raises:
        UserError: it cannot be read, or is cut short.
    """
    found: dict[str, Tensor] = {}
    for file in weights_files(path):
        with _opened(file, encoder) as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if not name.startswith(without)}  # noqa: SIM118 (no mapping)
    return found


def tensor_names(path: Path, encoder: str) -> set[str]:
    """The names of the tensors that `read_tensors` reads; raises as it does."""
    names: set[str] = set()
    for file in weights_files(path):
        with _opened(file, encoder) as tensors:
            names |= set(tensors.keys())
    return names


@contextmanager
def _opened(file: Path, encoder: str) -> Iterator[Tensors]:
    """An open file of weights; what fails in the block is raised as a UserError that names the file."""
    try:
        with open_tensors(file) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        if outside := cause_outside(error):
            raise unreadable(file, outside) from error
        raise UserError(f"{file} does not hold the weights of {encoder} ({error}); get it again") from error


@dataclass(frozen=True)
class Pin:
    """What was downloaded first from a repository.

    Attributes:
        revision: its commit.
        sha256, bytes: of the file.
    """

    revision: str
    sha256: str
    bytes: Count


def pins_file() -> Path:
    """`$WMCACHE_HOME/encoders/pins.json`."""
    return home() / "encoders" / "pins.json"


def read_pins() -> dict[str, Pin]:
    """Repository -> pin.

    Raises:
        UserError: the file is damaged.
    """
    file, hint = pins_file(), "restore it, or move it away: what is downloaded next is pinned again"
    if not file.exists():
        return {}
    return {repository: parse(Pin, pin, file, hint) for repository, pin in read_json(file, hint).items()}


def pin_of(repository: str, revision: str) -> Pin | None:
    """What is known of a repository, at a revision if one is given; raises as `read_pins`."""
    pin = read_pins().get(repository)
    return pin if pin and revision in ("", pin.revision) else None


@dataclass(frozen=True)
class Cached:
    """A repository's weights in the hub's cache.

    Attributes:
        path: of the file.
        revision: its commit.
        bytes: on disk.
        fault: why it cannot be used, as far as its size tells, or nothing.
    """

    path: Path
    revision: str
    bytes: int
    fault: str = ""


def look_up(repository: str, revision: str = "") -> Cached | None:
    """A repository's weights in the hub's cache, or None; the file's bytes are not read.

    Args:
        repository: on the hub.
        revision: a commit; empty for the pinned one, or where there is none for the newest that the cache knows.

    Raises:
        UserError: as `read_pins`.
    """
    pin = pin_of(repository, revision)
    path = _in_cache(repository, revision or (pin.revision if pin else ""))
    if path is None:
        return None
    size = path.stat().st_size
    fault = f"{human_bytes(pin.bytes)} were downloaded" if pin and size != pin.bytes else ""
    return Cached(path, path.parent.name, size, fault)


def _in_cache(repository: str, revision: str) -> Path | None:
    """The file of a repository in the hub's cache at a commit; without one, of the newest that there is."""
    found = try_to_load_from_cache(repository, FILE, revision=revision or None)
    if isinstance(found, str):
        return Path(found)
    if revision:
        return None
    # What was downloaded by its commit, as here, is not the cache's `main`; another user of that cache has no pin of it.
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "snapshots"
    there = [path for path in folder.glob(f"*/{FILE}") if path.is_file()]
    return max(there, key=lambda path: path.lstat().st_mtime, default=None)


def find_weights(spec: EncoderSpec, weights: Path | None) -> tuple[Path, str]:
    """The file or folder to load an encoder's weights from, and what an identity calls it.

    Returns:
        `weights` and `file`; where None are given, the file of the spec's source and `<repository>@<commit>`.

    Raises:
        UserError: as `download_weights`.
    """
    if weights is not None:
        return weights, "file"
    path = download_weights(spec.source, spec.name, revision=spec.revision, accept=spec.accept)
    return path, f"{spec.source}@{path.parent.name}"


def download_weights(repository: str, encoder: str, *, revision: str = "", accept: str = "") -> Path:
    """The weights of a repository on the hub, downloaded if need be, pinned, and equal to what was pinned.

    Args:
        repository: on the hub.
        encoder: whose they are, for messages.
        revision: a commit; empty for the one that was pinned at the first download.
        accept: the page on which a gated repository's licence is accepted.

    Returns:
        The file in the hub's cache; its folder's name is its commit.

    Raises:
        UserError: they are not in the cache and cannot be downloaded, or are not the bytes that were published or pinned.
    """
    pin = pin_of(repository, revision)
    asked = revision or (pin.revision if pin else "")
    cached = _in_cache(repository, asked)
    if cached is not None:
        path = cached
        # The cache names a large file by its checksum.
        published = path.resolve().name
    else:
        path, published = _download(repository, encoder, asked, accept)
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise unreadable(path.resolve(), error) from error
    known = pin.sha256 if pin else published if SHA256.fullmatch(published) else digest
    if digest != known:
        raise UserError(
            f"{path.resolve()} ({human_bytes(path.stat().st_size)}) is cut short or changed: its SHA-256 is "
            f"{digest[:12]}..., not {known[:12]}...; move that file away, and run the same command again"
        )
    if pin is None:
        _pin(repository, Pin(path.parent.name, digest, path.stat().st_size))
    return path


def _pin(repository: str, new: Pin) -> None:
    try:
        with exclusive(pins_file().with_name(".pins.lock")):
            write_json(pins_file(), {name: asdict(value) for name, value in {**read_pins(), repository: new}.items()})
    except UserError as error:
        # A home that can only be read is no reason to refuse weights that are there: the next run checks them as this one did.
        tqdm.write(f"{repository} is not pinned: {error}", file=sys.stderr)


def _download(repository: str, encoder: str, revision: str, accept: str) -> tuple[Path, str]:
    """The downloaded file, and its checksum as the hub says it."""
    try:
        # Fails at once where there is no network; the download itself would try again for half a minute, aloud.
        found = get_hf_file_metadata(hf_hub_url(repository, FILE, revision=revision or None))
        path = hf_hub_download(repository, FILE, revision=found.commit_hash or revision or None)
        return Path(path), found.etag or ""
    except Exception as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        if isinstance(error, GatedRepoError) or (refused and accept):
            page = accept or f"https://huggingface.co/{repository}"
            raise UserError(
                f"the weights of {encoder} ({repository}) are gated: accept their licence at {page}, "
                "log in with: hf auth login, and run the same command again (or pass --weights)"
            ) from error
        reason = " ".join(str(error).split())[:160]
        outside = cause_outside(error)
        if outside is not None and outside.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            raise UserError(
                f"the weights of {encoder} ({repository}) are not in the hub's cache, and {constants.HF_HUB_CACHE} cannot be written "
                f"({outside.strerror}); set HF_HOME to a folder that can, or pass --weights"
            ) from error
        raise UserError(
            f"the weights of {encoder} ({repository}) cannot be downloaded ({reason}); "
            "pass --weights FILE.safetensors, or use --encoder tcn, which needs no download"
        ) from error


@dataclass(frozen=True)
class FittedFile:
    """A file that `wmcache fit` wrote, at a glance.

    Attributes:
        path, bytes: of the file.
        encoder, dataset: what was fitted, and the fingerprint of what it was fitted on.
        base, base_weights: for an adapter, the encoder that it is on, and where its weights were; else empty.
        fault: why it cannot be used, or nothing.
    """

    path: Path
    bytes: int
    encoder: str = ""
    dataset: str = ""
    base: str = ""
    base_weights: str = ""
    fault: str = ""


def list_fitted(folder: Path) -> list[FittedFile]:
    """All fitted files of a folder, whatever state they are in."""
    return [_look_at(path) for path in sorted(folder.glob("*.safetensors")) if path.is_file()]


def _look_at(path: Path) -> FittedFile:
    size = path.stat().st_size
    try:
        header = read_metadata(path)
        base = json.loads(header.get("base", "{}"))
        on = base.get("name", ""), base.get("weights") or ""
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        return FittedFile(path, size, fault=f"cannot be read ({' '.join(str(error).split())[:160]})")
    if "encoder" not in header:
        return FittedFile(path, size, fault="not written by wmcache fit")
    return FittedFile(path, size, header["encoder"], header.get("dataset", ""), *map(str, on))
