"""Fixtures of the tests of studies: one tiny study, run once a session by the real command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from click.testing import CliRunner, Result

from wmcache.cli import main

STUDY = """
seeds = [0, 1]
fractions = [0.5, 1.0]
probe_frames = 100
device = "cpu"
dataset = {dataset}

[train]
steps = 4
batch = 8
dtype = "float32"
model_options = {{ width = 16, depth = 1, heads = 2 }}

[[plan]]
protocol = "mpc-100"
episodes = 2
budget = 10
horizon = 2
samples = 8
elites = 2
iterations = 1

[[encoders]]
name = "tcn"
fit = {{ steps = {steps}, batch = 16 }}

[[encoders]]
name = "pixels"
"""
FAILING = """
[[encoders]]
name = "tcn"
label = "broken"
weights = {weights}
"""
ADAPTER = """
[[encoders]]
name = "pca"
base = "tcn-layers"
fit = { dim = 8 }
"""

Study = Callable[..., Result]


@pytest.fixture(scope="session")
def write_study(dataset_path: Path) -> Callable[..., Path]:
    """(folder, steps of tcn's fit, more TOML) -> the study's file in it."""

    def write(folder: Path, steps: int = 4, more: str = "") -> Path:
        file = folder / "tiny.toml"
        file.write_text(STUDY.format(dataset=json.dumps(str(dataset_path)), steps=steps) + more)
        return file

    return write


def run(file: Path, out: Path, *flags: str, status: int = 0) -> Result:
    """Run `wmcache study`, which must end with this exit status."""
    result = CliRunner().invoke(main, ["study", str(file), "--out", str(out), *flags], prog_name="wmcache")
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="session")
def study_path(write_study: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study; read only, so copy it to change it. What the command printed is in printed.txt."""
    folder = tmp_path_factory.mktemp("study")
    out = folder / "out"
    result = run(write_study(folder), out)
    (folder / "printed.txt").write_text(result.stdout)
    return out


@pytest.fixture
def copy(study_path: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, to be changed."""
    return copytree(study_path, tmp_path / "out", symlinks=True)
