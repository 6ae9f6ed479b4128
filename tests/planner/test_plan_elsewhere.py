"""docs/examples/plan_elsewhere.py: planning in a simulator of the user's own."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from wmcache.cli import main, wmplan, wmtrain
from wmcache.pipeline.encoders import create
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.frames import FramesImporter

EXAMPLE = Path(__file__).parents[2] / "docs/examples/plan_elsewhere.py"
TINY = "--model dino-wm --width 32 --depth 1 --heads 2 --batch-size 16 --frameskip 2 --device cpu"


class Point:
    """A blob on a square; an action moves it."""

    def __init__(self, position: np.ndarray) -> None:
        self.position = np.asarray(position, np.float64)

    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        y, x = np.mgrid[:32, :32] / 31
        glow = np.exp(-((x - self.position[0]) ** 2 + (y - self.position[1]) ** 2) / 0.02)
        return np.repeat((255 * glow).astype(np.uint8)[:, :, None], 3, axis=2), self.position.copy()

    def step(self, action: np.ndarray) -> None:
        self.position = np.clip(self.position + 0.05 * np.clip(action, -1, 1), 0, 1)


def record(folder: Path, episodes: int, length: int) -> Path:
    """Frames of random actions and their table, as a user's recorder would write them."""
    rng, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for episode in range(episodes):
        point = Point(rng.uniform(size=2))
        for step in range(length):
            image, state = point.observe()
            action = rng.uniform(-1, 1, 2)
            name = f"{episode}-{step}.png"
            Image.fromarray(image).save(folder / name)
            rows.append({"episode": episode, "step": step, "file": name, "action": action, "state": state})
            point.step(action)
    pq.write_table(pa.Table.from_pylist(rows), folder / "steps.parquet")
    return folder / "steps.parquet"


@pytest.fixture(scope="module")
def store_of_points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points")
    table = record(folder / "images", 6, 20)
    source = FramesImporter(str(folder / "images"), actions=str(table)).open()
    write_dataset(source, folder / "points", frames_per_shard=60)
    extract(FrameDataset.open(folder / "points"), create("pixels", device="cpu"), folder / "pixels.zarr")
    return folder / "pixels.zarr"


def test_a_run_of_imported_frames_plans_in_the_user_s_simulator(store_of_points: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = CliRunner().invoke(
        wmtrain, [*TINY.split(), *map(str, ("--cache", store_of_points, "--out", run, "--steps", 10))]
    )
    assert trained.exit_code == 0, trained.output
    # wmplan has no simulator of these frames, so the hint is another.
    assert "wmplan --run" not in trained.output
    assert "docs/import.md" in trained.output
    refused = CliRunner().invoke(wmplan, ["--run", str(run), "--device", "cpu"])
    assert refused.exit_code == 1
    assert "docs/import.md" in refused.output
    point = Point(np.array([0.2, 0.3]))
    plan_elsewhere = runpy.run_path(str(EXAMPLE))["plan_elsewhere"]
    executed = plan_elsewhere(run, point, Point(np.array([0.7, 0.6])).observe()[0], 5)
    assert np.shape(executed) == (6, 2)
    assert np.abs(executed).max() <= 1
    moved = Point(np.array([0.2, 0.3]))
    for action in executed:
        moved.step(action)
    np.testing.assert_array_equal(moved.position, point.position)


@pytest.mark.parametrize("env", ["CartPole-v1", "nowhere.txt"])
def test_collect_lists_the_known_environments(tmp_path: Path, env: str) -> None:
    result = CliRunner().invoke(main, ["collect", "--env", env, "--out", str(tmp_path / "out")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert all(word in result.stderr for word in ("--env", "UMaze", ".txt", "wmcache import frames"))
