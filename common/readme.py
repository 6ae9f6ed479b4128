"""README.md of a dataset, a store or a run: YAML front matter as the Hugging Face Hub reads it, tables of facts, commands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from wmcache.common.columns import Columns
from wmcache.common.errors import one_line
from wmcache.common.files import write_whole
from wmcache.common.paths import AnyPath, exists, read_bytes

NAME = "README.md"
LICENSE = "unknown"
"""The Hub's name of a license that is not stated."""
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
"""Examples below a number -> the Hub's name."""
MARK = "<!-- wmcache replaces this file as long as this is the SHA-256 of the text above, so edits stay: "


@dataclass
class Readme:
    """A card, written from top to bottom.

    Attributes:
        tags, front: of the front matter.
    """

    title: str
    summary: str
    tags: Sequence[str]
    front: Mapping[str, object] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)

    def table(self, title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table under a heading; none where there are no rows."""
        lines = ["|".join(("", *(f" {_cell(value)} " for value in row), "")) for row in rows]
        if lines:
            heading = f"## {title}\n\n" if title else ""
            self.parts.append("\n".join([f"{heading}| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]))

    def facts(self, values: Mapping[str, object], title: str = "") -> None:
        """Add a table of names and values; empty values are left out."""
        self.table(title, ("", ""), [(name, value) for name, value in values.items() if value not in (None, "", "-")])

    def columns(self, columns: Columns) -> None:
        """Add a table of the columns of a step table."""
        rows = [
            (name, ", ".join(found.roles), found.dtype, " x ".join(map(str, found.shape)) or "1")
            for name, found in sorted(columns.items())
        ]
        self.table("Columns", ("column", "roles", "type", "size"), rows)

    def block(self, title: str, lines: Sequence[str], language: str = "") -> None:
        """Add a block of code under a heading."""
        self.parts.append(f"## {title}\n\n```{language}\n" + "\n".join(map(one_line, lines)) + "\n```")

    def text(self) -> str:
        """Return the file's content."""
        import yaml  # slow to import

        front = {"license": LICENSE, "library_name": "wmcache", "tags": ["wmcache", *self.tags], **self.front}
        matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
        body = "\n\n".join([f"# {_cell(self.title)}", self.summary, *self.parts])
        return f"---\n{matter}---\n\n{body}\n"


def write_readme(folder: AnyPath, readme: Readme) -> None:
    """Write README.md of a folder, whole or not at all; one that a user has written or edited stays as it is."""
    path, text = folder / NAME, readme.text()
    data = f"{text}\n{MARK}{_digest(text)} -->\n".encode()
    found = read_bytes(path) if exists(path) else None
    if found is None or (found != data and _is_own(found)):
        write_whole(path, data)


def size_category(examples: int) -> str:
    """Return the Hub's name of a number of examples."""
    return next((name for most, name in SIZES if examples < most), "n>10M")


def _is_own(data: bytes) -> bool:
    text, mark, digest = data.decode(errors="replace").rpartition(f"\n{MARK}")
    return bool(mark) and digest == f"{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _cell(value: object) -> str:
    """Return text in one line that ends no cell of a table and is no HTML."""
    return one_line(str(value)).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
