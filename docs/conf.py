"""The documentation as a site, written by `make docs`. The pages are Markdown that GitHub shows too."""

from __future__ import annotations

from typing import Any

from wmcache import __version__
from wmcache.common import options

project = html_title = "wmcache"
release = version = __version__
# The source folder is the repository, so that README.md and CONTRIBUTING.md are pages too.
root_doc = "docs/index"
include_patterns = ["docs/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "data", "tests", "docs/examples", "**/__pycache__"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_theme_options = {"light_css_variables": {"code-font-size": "0.72rem"}}  # lines of 140 characters
html_copy_source = False
html_show_copyright = False
highlight_language = "none"
maximum_signature_line_length = 100

# The anchors of GitHub.
myst_heading_anchors = 4

# Docstrings quote code as Markdown does.
default_role = "code"
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
# Otherwise a signature has the bounds of each option.
autodoc_type_aliases = {name: name for name, value in vars(options).items() if hasattr(value, "__metadata__")}
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def mark_code(app: object, what: str, name: str, obj: object, settings: object, lines: list[str]) -> None:  # noqa: ARG001
    """Mark indented blocks of a docstring as code, as Markdown does: those after a blank line that follows a line without indent."""
    marked: list[str] = []
    above = " "  # the last line that is not blank
    for at, line in enumerate(lines):
        if line.startswith("    ") and at and not lines[at - 1].strip() and not above.startswith(" "):
            marked += ["::", ""]
        marked.append(line)
        above = line if line.strip() else above
    lines[:] = marked


def setup(app: Any) -> None:
    """Let docstrings pass `mark_code` before Napoleon."""
    app.connect("autodoc-process-docstring", mark_code, priority=100)
