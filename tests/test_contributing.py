"""The package that CONTRIBUTING.md prints works: from frames to plans, by the real commands in separate processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from wmcache.pipeline.frames import FrameDataset

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
MODULES = dict(re.findall(r"```python\n# my_package/(\w+)\.py\n(.*?)```", TEXT, re.DOTALL))
PROJECT = tomllib.loads(re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)[0])["project"]


def install(folder: Path, project: dict, modules: dict[str, str]) -> None:
    """Write a package and its metadata, as an installed wheel leaves them."""
    package, info = folder / project["name"].replace("-", "_"), folder / f"{project['name']}-1.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").touch()
    for name, code in modules.items():
        (package / f"{name}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1\n")
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


class Shell:
    """Runs programs in a folder whose packages are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {**os.environ, "PYTHONPATH": path, "WMCACHE_HOME": str(folder / "home")}

    def __call__(self, program: str, line: str, *, status: int = 0) -> subprocess.CompletedProcess[str]:
        script = f"from wmcache import cli; cli.{program}()"
        words = [sys.executable, "-c", script, *line.split()]
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        return done


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder = tmp_path_factory.mktemp("contributor")
    install(folder, PROJECT, MODULES)
    return Shell(folder)


def test_every_kind_has_a_short_module_in_its_own_group() -> None:
    groups = PROJECT["entry-points"]
    planning = {"plan_policies", "solvers", "protocols"}
    kinds = {"environments", "encoders", "importers", "policies", "models", "decoders", *planning}
    assert set(groups) == {f"wmcache.{kind}" for kind in kinds}
    assert {f"my_package.{name}" for name in MODULES} == {
        target for points in groups.values() for target in points.values()
    }
    assert len(TEXT.splitlines()) <= 290


def test_the_package_collects_extracts_trains_and_plans(shell: Shell) -> None:
    shell("main", "collect --policy circle --episodes 6 --length 25 --image-size 32 --cluster local:1 --out frames")
    torch.manual_seed(0)
    network = timm.create_model("convnext_atto", num_classes=0)
    save_file(network.state_dict(), shell.folder / "weights.safetensors")
    listed = shell("main", "encoders").stdout
    assert any(line.startswith("convnext ") for line in listed.splitlines())
    extract = "extract --dataset frames --encoder convnext --weights weights.safetensors --device cpu --cluster local:1"
    shell("main", f"{extract} --out tokens.zarr")
    shell("wmtrain", "--cache tokens.zarr --model mover --hidden 8 --out run --steps 2 --batch-size 4 --device cpu")
    assert json.loads((shell.folder / "run/config.json").read_text())["model_options"] == {"hidden": 8}
    planned = shell("wmplan", "--run run --protocol quick --device cpu --json").stdout
    assert json.loads(planned)["episodes"] == 2
    shell(
        "wmtrain", "decoder --cache tokens.zarr --decoder colours --out decoder --steps 2 --batch-size 4 --device cpu"
    )
    # Without the package its run cannot be planned with, in one line.
    shutil.copytree(shell.folder / "run", shell.folder / "elsewhere/run")
    refused = Shell(shell.folder / "elsewhere")("wmplan", "--run run --cache ../tokens.zarr", status=1).stderr
    assert len(refused.splitlines()) == 1
    assert "'mover'" in refused


@pytest.mark.sweep  # half a minute
def test_the_environment_and_the_policy_are_evaluated(shell: Shell) -> None:
    shell("main", "collect --env Slide --policy held --episodes 6 --length 40 --image-size 32 --out slide")
    shell("main", "extract --dataset slide --encoder pixels --device cpu --cluster local:1 --out slide.zarr")
    shell("wmtrain", "--cache slide.zarr --model mover --hidden 8 --out slid --steps 2 --batch-size 4 --device cpu")
    plan = "--run slid --policy reach --episodes 4 --budget 30 --device cpu --json"
    for flags in ("", "--judge-columns position --threshold 0.1 --goal-steps 20 --env Slide"):
        found = json.loads(shell("wmplan", f"{plan} {flags}").stdout)
        assert (found["policy"], found["reads_state"], found["env"]) == ("reach", True, "Slide")
        assert found["threshold"] == 0.1
        assert found["successes"] == 4
        assert found["baselines"]["zero"][0]["successes"] == 0


def test_the_import_format_has_a_command_with_its_options(shell: Shell) -> None:
    rng = np.random.default_rng(0)
    (shell.folder / "episodes").mkdir()
    images = rng.integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    for number, frames in enumerate(images):
        action, state = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
        np.savez(shell.folder / f"episodes/{number}.npz", images=frames, action=action, state=state)
    shell("main", "import npz episodes --fps 7 --out imported")
    found = FrameDataset.open(shell.folder / "imported")
    assert (found.card.fps, found.card.episodes, found.card.env) == (7, 2, "npz")
    np.testing.assert_array_equal(found.read_frames(range(10)), images.reshape(10, 16, 16, 3))


def test_a_package_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    install(tmp_path, {"name": "bad", "entry-points": {"wmcache.encoders": {"bad": "bad.nowhere"}}}, {})
    refused = Shell(tmp_path)("main", "encoders", status=1).stderr
    assert refused.count("\n") == 1
    assert "bad.nowhere" in refused
