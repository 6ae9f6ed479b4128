"""Weights from the Hugging Face hub, pinned and checked.

`$WMCACHE_HOME/encoders/pins.json` contains for each repository the commit and the SHA-256 of the first download. Later downloads ask for
this commit and are compared with this hash. $HF_HOME and $HF_HUB_OFFLINE are honoured.
"""

from __future__ import annotations

import errno
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from tqdm import tqdm

from wmcache.common.errors import UserError, reason
from wmcache.common.files import sha256_of
from wmcache.common.folders import home
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.locks import exclusive
from wmcache.common.paths import cause_outside, readable
from wmcache.common.schema import Count, parse
from wmcache.common.space import human_bytes
from wmcache.pipeline.encoders.base import EncoderSpec
from wmcache.pipeline.encoders.weights import FILE

SHA256 = re.compile("[0-9a-f]{64}")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Pin:
    """The first download from a repository: its commit, and hash and size of the file."""

    revision: str
    sha256: str
    bytes: Count


def _pins_file() -> Path:
    return home() / "encoders" / "pins.json"


def read_pins() -> dict[str, Pin]:
    """Read repository -> pin; raises UserError if the file is damaged."""
    file, hint = _pins_file(), "restore it, or move it away: the next download is pinned again"
    if not file.exists():
        return {}
    return {repository: parse(Pin, pin, file, hint) for repository, pin in read_json(file, hint).items()}


def _find(repository: str, revision: str) -> tuple[Pin | None, str, Path | None]:
    """Return the pin of a repository at a revision, the commit to ask for, and the file in the hub's cache."""
    pin = read_pins().get(repository)
    pin = pin if pin and revision in ("", pin.revision) else None
    revision = revision or (pin.revision if pin else "")
    found = try_to_load_from_cache(repository, FILE, revision=revision or None)
    if isinstance(found, str):
        return pin, revision, Path(found)
    if revision:
        return pin, revision, None
    # A download by its commit is not the cache's `main`, and another user of that cache has no pin.
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "snapshots"
    there = [path for path in folder.glob(f"*/{FILE}") if path.is_file()]
    return pin, revision, max(there, key=lambda path: path.lstat().st_mtime, default=None)


@dataclass(frozen=True)
class Cached:
    """A repository's weights in the hub's cache; `fault` is why they cannot be used, judged by their size, or empty."""

    path: Path
    revision: str
    bytes: int
    fault: str = ""


def look_up(repository: str, revision: str = "") -> Cached | None:
    """Find a repository's weights in the hub's cache, by default the pinned or else the newest, without reading the file."""
    pin, _, path = _find(repository, revision)
    if path is None:
        return None
    size = path.stat().st_size
    fault = f"{human_bytes(pin.bytes)} were downloaded" if pin and size != pin.bytes else ""
    return Cached(path, path.parent.name, size, fault)


def find_weights(spec: EncoderSpec, weights: Path | None) -> tuple[Path, str]:
    """Return the file or folder of an encoder's weights, and their source in an identity: `file` or `<repository>@<commit>`."""
    if weights is not None:
        return weights, "file"
    path = download_weights(spec.source, spec.name, revision=spec.revision, accept=spec.accept)
    return path, f"{spec.source}@{path.parent.name}"


def download_weights(repository: str, encoder: str, *, revision: str = "", accept: str = "") -> Path:
    """Return the weights of a repository in the hub's cache, in a folder named by their commit; download and pin them if necessary.

    Raises:
        UserError: they are not in the cache and cannot be downloaded, or their bytes are not those that were published or pinned.
    """
    pin, asked, path = _find(repository, revision)
    if path is not None:
        published = path.resolve().name  # the cache names a large file by its checksum
    else:
        path, published = _download(repository, encoder, asked, accept)
    with readable(path.resolve()):
        digest = sha256_of(path)
    known = pin.sha256 if pin else published if SHA256.fullmatch(published) else digest
    if digest != known:
        raise UserError(
            f"{path.resolve()} ({human_bytes(path.stat().st_size)}) is cut short or changed: its SHA-256 is "
            f"{digest[:12]}..., not {known[:12]}...; move that file away, and run the same command again"
        )
    if pin is None:
        new = Pin(path.parent.name, digest, path.stat().st_size)
        try:
            with exclusive(_pins_file().with_name(".pins.lock")):
                pins = {**read_pins(), repository: new}
                write_json(_pins_file(), {name: asdict(value) for name, value in pins.items()})
        except UserError as error:
            # With a read-only home the weights are still usable; the next run checks them again.
            tqdm.write(f"{repository} is not pinned: {error}", file=sys.stderr)
    return path


def _download(repository: str, encoder: str, revision: str, accept: str) -> tuple[Path, str]:
    """Return the downloaded file, and the checksum that the hub reports."""
    try:
        # Fails at once without a network; the download itself would retry for half a minute.
        found = get_hf_file_metadata(hf_hub_url(repository, FILE, revision=revision or None))
        path = hf_hub_download(repository, FILE, revision=found.commit_hash or revision or None)
        return Path(path), found.etag or ""
    except Exception as error:
        weights, outside = f"the weights of {encoder} ({repository})", cause_outside(error)
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        if isinstance(error, GatedRepoError) or (refused and accept):
            page = accept or f"https://huggingface.co/{repository}"
            raise UserError(
                f"{weights} are gated: accept their licence at {page}, log in with: hf auth login, "
                "and run the same command again (or pass --weights)"
            ) from error
        if outside is not None and outside.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            raise UserError(
                f"{weights} are not in the hub's cache, and {constants.HF_HUB_CACHE} cannot be written ({reason(outside)}); "
                "set HF_HOME to a writable folder, or pass --weights"
            ) from error
        raise UserError(
            f"{weights} cannot be downloaded ({reason(error)}); "
            "pass --weights FILE.safetensors, or use --encoder tcn, which needs no download"
        ) from error
