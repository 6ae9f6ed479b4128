"""The documentation as a site: it builds without a warning, all its links resolve, and the code of docs/formats.md runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors = {"", "top"}
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.mark.sweep
def test_the_site_builds_and_its_links_resolve(tmp_path: Path) -> None:
    words = ["--fail-on-warning", "--quiet", "-c", "docs", ".", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {file: Page(file) for file in tmp_path.rglob("*.html")}
    written = {str(file.relative_to(ROOT).with_suffix(".html")) for file in (ROOT / "docs").rglob("*.md")}
    assert {"README.html", "CONTRIBUTING.html", *written} <= {str(file.relative_to(tmp_path)) for file in pages}
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if parts.scheme or parts.netloc:
                continue
            anchored = target not in pages or unquote(parts.fragment) in pages[target].anchors
            if not (target.exists() and anchored):
                broken.append(f"{file.relative_to(tmp_path)}: {link}")
    assert broken == []
    assert "wmcache.cache.store.TokenStore" in pages[tmp_path / "docs/api/cache.html"].anchors


def test_the_navigation_has_every_page() -> None:
    listed = [
        (folder / f"{name}.md").resolve()
        for folder in (ROOT / "docs", ROOT / "docs/api")
        for block in re.findall(r"```\{toctree\}\n(.*?)```", (folder / "index.md").read_text(), re.DOTALL)
        for name in re.findall(r"^(?:.*<)?([\w./-]+)>?$", block, re.MULTILINE)
    ]
    pages = {*(ROOT / "docs").rglob("*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))}
    assert sorted(listed) == sorted(pages - {ROOT / "docs/index.md"})


def test_the_code_of_the_formats_runs(
    dataset_path: Path, store_path: Path, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for made, name in (
        (dataset_path, "pointmaze-umaze"),
        (store_path, "stores/pointmaze-umaze/tcn-64.zarr"),
        (run_path, "runs/pointmaze-umaze-tcn-64"),
    ):
        shutil.copytree(made, tmp_path / "data" / name, symlinks=True)
    found: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/formats.md").read_text(), re.DOTALL):
        exec(block, found)
    assert found["steps"].num_rows == found["store"]["tokens"].shape[0] == 360
    assert found["card"]["encoder"]["name"] == "tcn"
    assert len(found["frames"]) == 64
    assert found["weights"]
    assert found["metrics"]
