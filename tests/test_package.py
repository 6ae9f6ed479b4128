"""The package as a user meets it: its commands, how soon they answer, and what they will never run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest
import wmcache
from wmcache.pipeline.encoders import specs
from wmcache.pipeline.encoders.base import EncoderSpec

BIN = Path(sys.executable).parent
ROOT = Path(wmcache.__file__).parent
SOURCES = sorted(ROOT.glob("*.py"))
for folder in ("cache", "commands", "envs", "pipeline", "planner", "study", "trainer"):
    SOURCES += sorted((ROOT / folder).rglob("*.py"))


def test_the_commands_are_installed() -> None:
    ours = {point.name for point in entry_points(group="console_scripts") if point.value.startswith("wmcache.")}
    assert ours == {"wmcache", "wmtrain", "wmplan"}
    assert all((BIN / name).exists() for name in ours)


def test_the_version_is_the_one_that_is_installed() -> None:
    assert metadata("wmcache")["Version"] == wmcache.__version__


@pytest.mark.parametrize("command", ["wmcache", "wmtrain", "wmplan"])
def test_help_answers_before_anything_heavy_is_loaded(command: str) -> None:
    program = (
        "import json, runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, BIN / command], capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded & {"torch", "zarr", "numpy", "mujoco", "timm", "dask", "matplotlib"} == set()


NEVER = {"torch.load", "torch.save", "torch.hub.load", "eval", "exec"} | {
    f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "Loader", "UnsafeLoader")
}


def dangers(source: Path) -> list[str]:
    """Whatever could run code out of a data file."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.name for name in node.names] + [getattr(node, "module", None) or ""]
            found += [
                name for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "marshal")
            ]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            only_tensors = called == "torch.load" and "weights_only=True" in map(ast.unparse, node.keywords)
            if called in NEVER and not only_tensors:
                found.append(called)
            found += [
                f"{called}({keyword.arg})"
                for keyword in node.keywords
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell")
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
    return found


def test_the_search_for_dangers_finds_them(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    bad = (
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f)",
    )
    good = "torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "yaml.safe_load(f)"
    source.write_text("\n".join((*bad, *good, "np.load(f, allow_pickle=True)")))
    found = ["pickle", "joblib", "torch.load", "torch.load", "yaml.load", "np.load(allow_pickle)"]
    assert dangers(source) == found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source.parent.name}/{source.name}")
def test_nothing_is_read_that_could_hold_code(source: Path) -> None:
    assert dangers(source) == []


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_every_encoder_says_where_it_comes_from_and_what_one_may_do_with_it(spec: EncoderSpec) -> None:
    assert spec.source
    assert spec.licence
    assert spec.summary
    assert "\n" not in spec.summary
    rows, columns = spec.token_grid
    assert rows * columns > 0
