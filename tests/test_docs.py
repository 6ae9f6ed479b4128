"""The documentation: links resolve, printed commands exist, and the promises of docs/faults.md have tests."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from wmcache.cli import main, wmplan, wmtrain

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROGRAMS = {"wmcache": main, "wmtrain": wmtrain, "wmplan": wmplan}
SELECTORS = ("--model", "--solver", "--encoder", "--decoder")
"""Options that decide which other options a command has."""


def headings(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in headings(target))):
            broken.append(link)
    assert broken == []
    numbers = set(re.findall(r"\[\^(\w+)\](?!:)", page.read_text()))
    assert numbers == set(re.findall(r"^\[\^(\w+)\]:", page.read_text(), re.MULTILINE))


def printed_commands(page: Path) -> list[str]:
    """Return the commands in a page's text and code blocks, with continued lines joined and comments cut."""
    blocks = re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").split(" ")[0] in PROGRAMS]


@cache
def help_of(program: str, *words: str) -> tuple[int, str]:
    found = CliRunner().invoke(PROGRAMS[program], [*words, "--help"])
    return found.exit_code, found.output


def unknown_flags(line: str) -> list[str]:
    """Return the flags of a printed command that its help does not have, or the command itself if it does not exist."""
    program, *words = [word for word in shlex.split(line.replace("…", "")) if word != "..."]
    if words[:1] == ["sbatch"]:  # the rest is another command
        return []
    if program == "wmcache" and words and help_of(program, words[0])[0]:
        return [line]
    deep = next((at for at, word in enumerate(words) if word.startswith("-") or not word.islower()), len(words))
    chosen = [part for at, word in enumerate(words) if word in SELECTORS for part in words[at : at + 2]]
    for count in range(deep, -1, -1):
        status, text = help_of(program, *words[:count], *chosen)
        if status:  # an argument, or a command without this selector
            status, text = help_of(program, *words[:count])
        if not status:
            flags = {word for word in words if re.fullmatch(r"--[a-z][a-z0-9-]*", word)}
            known = set(re.findall(r"--[a-z][a-z0-9-]*", text))
            return sorted(flags - known)
    return [line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_printed_commands_and_their_flags_exist(page: Path) -> None:
    found = {line: unknown for line in printed_commands(page) if (unknown := unknown_flags(line))}
    assert found == {}


def test_every_promise_about_faults_has_its_test() -> None:
    rows = [row.split("|") for row in (ROOT / "docs/faults.md").read_text().splitlines() if row.startswith("| ")]
    cells = [row[3] for row in rows if row[3].strip() not in ("test", "tried by hand")]
    tests = "\n".join(file.read_text() for file in sorted((ROOT / "tests/faults").glob("*.py")))
    missing = []
    for cell in cells:
        names = re.findall(r"`([^`]+)`", cell)
        assert names, cell
        for name in names:
            if name.startswith("tests/") or name.endswith(".py"):
                found = (ROOT / name if "/" in name else ROOT / "tests/faults" / name).exists()
            else:
                end = "" if name.endswith("…") else r"\b"
                found = bool(re.search(rf"def {re.escape(name.rstrip('…'))}{end}", tests))
            missing += [] if found else [name]
    assert len(cells) > 40
    assert missing == []
