"""A training node has the packages of requirements-train.txt alone: it trains, and any other command names what it lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from wmcache.common.distributions import missing_requirement
from wmcache.trainer.models import MODELS

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "requirements-train.txt").read_text().splitlines() if not line.startswith("#")]
# Hides the modules of all installed packages but those of these requirements and of what they require.
NODE = """
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

allowed, left = set(), sys.argv.pop(1).split(",")
while left:
    name = re.split(r"[^\\w.-]", left.pop(), maxsplit=1)[0].replace("_", "-").lower()
    if name in allowed:
        continue
    allowed.add(name)
    try:
        left += [line for line in requires(name) or [] if "extra ==" not in line]
    except PackageNotFoundError:
        pass
hidden = {
    module
    for module, owners in packages_distributions().items()
    if module != "wmcache" and not allowed & {owner.replace("_", "-").lower() for owner in owners}
}

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
assert {"mujoco", "timm", "transformers", "dask", "gymnasium", "webdataset", "pyarrow", "scipy"} <= hidden
assert not {"torch", "zarr", "numpy"} & hidden
from wmcache import cli
program = sys.argv.pop(1)
sys.argv[0] = program
getattr(cli, program)(prog_name=program)
"""


def on_a_node(program: str, line: str, home: Path, **paths: object) -> subprocess.CompletedProcess[str]:
    words = [word.format(**paths) for word in line.split()]
    return subprocess.run(
        [sys.executable, "-c", NODE, ",".join(LINES), program, *words],
        cwd=home,
        env={**os.environ, "WMCACHE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_requirements_are_among_those_of_the_package() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert set(LINES) <= set(config["options"]["install_requires"].splitlines())
    assert re.search(r"requirements-train\.txt", (ROOT / "docs/install.md").read_text())


def test_a_node_trains(store_path: Path, tmp_path: Path) -> None:
    sizes = "--steps 2 --width 16 --depth 1 --heads 2 --batch-size 4 --device cpu"
    done = on_a_node("wmtrain", f"--cache {{store}} --out {{out}} {sizes}", tmp_path, store=store_path, out="run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/checkpoints/last/model.safetensors").exists()


@pytest.mark.parametrize(
    ("program", "line", "package"),
    [
        ("main", "collect --episodes 2", "mujoco"),
        ("main", "extract --dataset {data}", "pyarrow"),
        ("main", "info s3://bucket/store.zarr", "universal-pathlib"),
    ],
)
def test_another_command_names_the_missing_package(
    dataset_path: Path, tmp_path: Path, program: str, line: str, package: str
) -> None:
    done = on_a_node(program, line, tmp_path, data=dataset_path)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"Error: {package} is not installed")
    assert "pip install wmcache" in error
    assert "Traceback" not in done.stderr


def test_only_requirements_are_named() -> None:
    assert [missing_requirement(name) for name in ("PIL.Image", "sklearn", "google_crc32c", "upath", "yaml")] == [
        *("pillow", "scikit-learn", "google-crc32c", "universal-pathlib", "pyyaml")
    ]
    assert missing_requirement("wmcache.no_such_module") is None
    assert missing_requirement("hypothesis") is None  # of an extra
    assert missing_requirement("") is None


@pytest.mark.sweep
@pytest.mark.parametrize("model", sorted(set(MODELS) - {"avdc", "avdc-plan"}))
def test_no_model_needs_another_package(model: str, store_path: Path, tmp_path: Path) -> None:
    line = f"--cache {{store}} --out run --model {model} --steps 1 --batch-size 4 --device cpu"
    done = on_a_node("wmtrain", line, tmp_path, store=store_path)
    # A model may refuse the store, which has neither rewards nor change maps.
    assert "not installed" not in done.stderr
    assert "Traceback" not in done.stderr
