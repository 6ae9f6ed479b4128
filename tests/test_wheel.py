"""The wheel: it has every file of the package, and the road works where only the wheel is, outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROAD = (
    "wmcache --help",
    "wmcache collect --episodes 6 --length 40 --image-size 32 --frames-per-shard 64 --cluster local:1",
    "wmcache fit --steps 5 --batch-size 16 --device cpu",
    "wmcache extract --device cpu",
    "wmtrain --cache home/stores/pointmaze-umaze/tcn-64.zarr --steps 4 --width 16 --depth 1 --heads 2 --batch-size 8 --device cpu",
    "wmplan --run home/runs/pointmaze-umaze-tcn-64 --episodes 2 --budget 10 --samples 8 --elites 3 --iterations 2 --horizon 2 --device cpu",
)
pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the repository, because a build leaves files in its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "data", "docs", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    words = ["wheel", "--quiet", "--no-deps", "--wheel-dir", folder, folder / "source"]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the wheel, and the packages of this environment but for its wmcache."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], check=True
    )
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # The .pth files of a folder that is added this way are not read, and the editable wmcache is one of them.
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    rooms = [file.parent for file in ROOT.glob("*/__init__.py")]
    files = [*ROOT.glob("*.py"), ROOT / "py.typed"]
    files += [file for room in rooms for file in room.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    packed = {
        name.removeprefix("wmcache/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("wmcache/")
    }
    assert packed == {str(file.relative_to(ROOT)) for file in files}


def test_the_road_works_outside_the_repository(programs: Path, tmp_path: Path) -> None:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"WMCACHE_HOME": str(tmp_path / "home"), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    where = [programs / "python", "-c", "import wmcache; print(wmcache.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(programs.parent)
    for line in ROAD:
        program, *words = line.split()
        done = subprocess.run(
            [programs / program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
    assert list((tmp_path / "home").rglob("report.html"))
