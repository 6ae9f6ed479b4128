"""The examples of CONTRIBUTING.md work as they are printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from wmcache.cli import main, wmplan, wmtrain
from wmcache.envs import policies
from wmcache.planner.solvers import SOLVERS
from wmcache.trainer.models import MODELS
from wmcache.trainer.runs import read_config

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
USE = """
import numpy as np
from wmcache.cli import main
from wmcache.pipeline import encoders

main(["encoders"], standalone_mode=False)
encoder = encoders.create("convnext", weights="weights.safetensors", dtype="float32", device="cpu")
frames = np.zeros((2, 224, 224, 3), np.uint8)
frames[1, 96:128, 160:192] = 255
black, moved = encoder(frames).float()
print((moved - black).norm(dim=1).argmax().item(), encoder.token_grid, encoder.frame_shape)
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package of somebody's own, which brings the encoder of CONTRIBUTING.md, and its weights."""
    folder = tmp_path_factory.mktemp("stranger")
    (code,) = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index("## Add an encoder") :], re.DOTALL)[:1]
    (point,) = re.findall(r'entry-points."(.*?)"\]\nconvnext = "my_package.convnext"', TEXT)
    (folder / "my_package").mkdir()
    (folder / "my_package/__init__.py").touch()
    (folder / "my_package/convnext.py").write_text(code)
    (folder / "my_package-1.dist-info").mkdir()
    (folder / "my_package-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (folder / "my_package-1.dist-info/entry_points.txt").write_text(f"[{point}]\nconvnext = my_package.convnext\n")
    torch.manual_seed(0)
    save_file(timm.create_model("convnext_atto").state_dict(), folder / "weights.safetensors")
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_example_of_an_encoder_is_a_short_one() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index("## Add an encoder") :], re.DOTALL)[:1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


def test_an_encoder_of_another_package_is_listed_and_encodes(stranger: Path) -> None:
    used = run(stranger, "-c", USE)
    *listed, found = used.stdout.splitlines() or [used.stderr]
    assert any(line.startswith("convnext ") for line in listed), used.stderr
    assert found == "26 (7, 7) (49, 320)", used.stderr


def test_a_package_that_cannot_be_imported_is_one_line(stranger: Path) -> None:
    (stranger / "broken").mkdir()
    (stranger / "broken/bad-1.dist-info").mkdir()
    (stranger / "broken/bad-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1\n")
    (stranger / "broken/bad-1.dist-info/entry_points.txt").write_text("[wmcache.encoders]\nbad = bad_package.nowhere\n")
    found = run(stranger / "broken", "-c", "from wmcache.cli import main; main(['encoders'])")
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "the encoders of bad_package.nowhere cannot be imported" in found.stderr


def example(section: str) -> dict[str, Any]:
    """What the Python code of a section defines."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index(f"## {section}") :], re.DOTALL)[:1]
    defined: dict[str, Any] = {"__name__": section}
    exec(compile(code, section, "exec", dont_inherit=True), defined)
    return defined


def invoke(program: Any, *words: object) -> Result:
    return CliRunner().invoke(program, [str(word) for word in words])


@pytest.fixture
def mover_run(store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short training of the example of a world model."""
    monkeypatch.setitem(MODELS, "mover", MODELS["dino-wm"])  # so that it is as before after the test
    example("Add a world model")
    words = ["--cache", store_path, "--model", "mover", "--out", tmp_path / "run", "--steps", 2, "--batch-size", 8]
    trained = invoke(wmtrain, *words, "--device", "cpu")
    assert trained.exit_code == 0, trained.output
    return tmp_path / "run"


def plan(run: Path, *words: object) -> Result:
    few = ["--episodes", 2, "--budget", 10, "--horizon", 2, "--samples", 8, "--device", "cpu", "--json"]
    return invoke(wmplan, "--run", run, *few, *words)


def test_the_world_model_trains_and_plans(mover_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_config(mover_run)["model_options"] == {"hidden": 64}
    planned = plan(mover_run, "--elites", 3, "--iterations", 2)
    assert planned.exit_code == 0, planned.output
    # The example of a solver, with an option that has no flag of another solver's.
    monkeypatch.setitem(SOLVERS, "shooting", example("Add a solver")["Shooting"])
    planned = plan(mover_run, "--solver", "shooting")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["episodes"] == 2


def test_a_run_of_a_model_that_is_not_registered_says_how_to_register_it(
    mover_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(MODELS, "mover")
    refused = plan(mover_run)
    assert refused.exit_code == 1
    assert len(refused.stderr.splitlines()) == 1
    for part in ("'mover'", "dino-wm", "CONTRIBUTING.md"):
        assert part in refused.stderr
    assert "train again" not in refused.stderr


def test_a_maze_and_a_policy_of_a_contributor_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Mine.txt").write_text("#####\n#OOO#\n#O#O#\n#####\n")
    monkeypatch.setitem(policies.POLICIES, "still", lambda rng, length: 0 * policies.held(rng, length))
    few = ["--episodes", 1, "--length", 4, "--image-size", 32, "--cluster", "local:1", "--out", tmp_path / "data"]
    collected = invoke(main, "collect", "--env", tmp_path / "Mine.txt", "--policy", "still", *few)
    assert collected.exit_code == 0, collected.output
