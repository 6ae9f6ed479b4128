"""The package: its commands and how soon they answer, what they never execute, and how its files read."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from wmcache.cli import main, wmplan, wmtrain

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
ROOMS = [file.parent for file in sorted(ROOT.glob("*/__init__.py"))]
PACKAGES = sorted(file.parent for room in ROOMS for file in room.rglob("__init__.py"))
SOURCES = sorted([*ROOT.glob("*.py"), *(file for package in PACKAGES for file in package.glob("*.py"))])


def name_of(source: Path) -> str:
    return str(source.relative_to(ROOT))


def test_the_commands_are_installed() -> None:
    names = {point.name for point in entry_points(group="console_scripts") if point.value.startswith("wmcache.")}
    assert names == {"wmcache", "wmtrain", "wmplan"}
    assert all((BIN / name).exists() for name in names)


def test_every_package_is_listed_for_installation() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    assert listed == ["wmcache", *(f"wmcache.{name_of(package).replace('/', '.')}" for package in PACKAGES)]


@pytest.mark.parametrize("folder", ["wmcache", "wm-src", "x y"])
def test_the_linter_passes_in_a_folder_of_any_name(folder: str, tmp_path: Path) -> None:
    for file in (ROOT / "pyproject.toml", *SOURCES, *sorted((ROOT / "tests").rglob("*.py"))):
        copied = tmp_path / folder / file.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copied)
    done = subprocess.run(
        [BIN / "ruff", "check", "--no-cache", "."], cwd=tmp_path / folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


FRAGMENTS = {"As", "By", "In", "Its", "Of", "On", "That", "To"}
"""Words that continue a sentence that the help does not show."""
HEAVY = {
    *("dask", "distributed", "gymnasium", "jinja2", "matplotlib", "mujoco", "numpy", "pandas", "PIL", "pyarrow"),
    *("pydantic", "scipy", "sklearn", "timm", "s3fs", "torch", "torchvision", "transformers", "upath", "zarr"),
}
HELPS = """
import json, sys
from click.testing import CliRunner
from wmcache.cli import main, wmplan, wmtrain

def walk(words, command):
    # Others list what a registry has, or the options of what one of their options names.
    if getattr(command, "by", None) is None and "list_commands" not in vars(type(command)):
        yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk((*words, name), inner)

statuses = {
    " ".join([program.name, *words]): CliRunner().invoke(program, [*words, "-h"]).exit_code
    for program in (main, wmtrain, wmplan)
    for words in walk((), program)
}
statuses["unknown"] = CliRunner().invoke(main, ["no-such-command"]).exit_code
print(json.dumps([statuses, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_no_help_loads_what_takes_long_to_import() -> None:
    done = subprocess.run([sys.executable, "-c", HELPS], check=True, capture_output=True)
    statuses, modules = json.loads(done.stdout)
    assert statuses.pop("unknown") == 2
    assert len(statuses) > 25
    assert set(statuses.values()) == {0}
    assert HEAVY & set(modules) == set()


def helps(words: str, known: click.Command) -> Iterator[tuple[str, str]]:
    """Yield each option of a command and of its subcommands, with its help."""
    yield from ((f"{words} {option.opts[0]}", getattr(option, "help", None) or "") for option in known.params)
    for name, inner in getattr(known, "commands", {}).items():
        yield from helps(f"{words} {name}", inner)


@pytest.mark.parametrize("program", [main, wmtrain, wmplan], ids=lambda program: program.name)
def test_the_help_of_an_option_reads_on_its_own(program: click.Command) -> None:
    found = [(flag, text) for flag, text in helps(str(program.name), program) if text]
    assert found
    assert [flag for flag, text in found if len(text.split()) < 2 or text.split()[0] in FRAGMENTS] == []


# `wmcache rm` deletes what the user names.
ASKED_TO_DELETE = {"cache/catalogue.py", "planner/evaluate.py"}


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_no_error_suggests_to_destroy_work(source: Path) -> None:
    raised = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Raise)]
    words = [part.value for node in raised for part in ast.walk(node) if isinstance(part, ast.Constant)]
    advice = " ".join(word for word in words if isinstance(word, str))
    if name_of(source) not in ASKED_TO_DELETE:
        assert "delete" not in advice
        assert "--overwrite" not in advice


# In normalised code: what could execute code from a data file.
DANGER = re.compile(
    r"^\s*(?:import|from) (?:pickle|dill|cloudpickle|joblib|marshal)\b"
    r"|(?<![\w.])(?:eval|exec)\(|torch\.(?:save|hub\.load|load(?!\(.*weights_only=True))\("
    r"|yaml\.(?:load|load_all|full_load|unsafe_load|Loader|UnsafeLoader)\b"
    r"|\b(?:allow_pickle|trust_remote_code|shell)=(?!False\b)",
    re.MULTILINE,
)


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_nothing_is_read_that_could_contain_code(source: Path) -> None:
    found = [match.group().strip() for match in DANGER.finditer(ast.unparse(ast.parse(source.read_text())))]
    # Its unpickler makes records of whatever a file names; see tests/trainer/test_pickled_modules.py.
    assert found == (["import pickle"] if name_of(source) == "trainer/pickled_modules.py" else [])


def test_the_search_for_dangers_finds_them() -> None:
    bad = ["import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)"]
    bad += ["yaml.load(f)", "np.load(f, allow_pickle=True)", "eval(x)"]
    good = ["torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "yaml.safe_load(f)", "model.eval()"]
    assert all(DANGER.search(line) for line in bad)
    assert not DANGER.search("\n".join(good))


# How the files read.

LINES, FUNCTION_LINES = 400, 60
LONGER: dict[str, str] = {}
"""File, or file:function, -> why it is longer."""
WORDS = re.compile(r"\b(m[e]nd|an[e]w|who[e]ver|t[o]ld|str[a]nger)\b", re.IGNORECASE)
"""Words that the style guide replaces, spelt so that this file does not contain them."""
FOLDERS = ("tests", "docs", "scripts", ".ci")


def test_no_file_and_no_function_is_too_long() -> None:
    found = []
    for source in SOURCES:
        text = source.read_text()
        found += [name_of(source)] if text.count("\n") > LINES else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES:
                found.append(f"{name_of(source)}:{node.name}")
    assert sorted(found) == sorted(LONGER)


def test_no_file_contains_a_word_that_the_style_guide_replaces() -> None:
    folders = (*ROOMS, *(ROOT / name for name in FOLDERS))
    texts = {*ROOT.iterdir(), *(file for folder in folders for file in folder.rglob("*"))}
    found = []
    for text in sorted(text for text in texts if text.is_file() and text.suffix not in (".png", ".gif", ".pyc")):
        lines = text.read_text(errors="ignore").splitlines()
        found += [f"{name_of(text)}:{at}: {line.strip()}" for at, line in enumerate(lines, 1) if WORDS.search(line)]
    assert found == []
