"""One model of several mazes, planned in mazes that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import MazeError, find_maze, open_environment
from wmcache.pipeline.fit import read_fit
from wmcache.pipeline.frames import FrameDataset

from .conftest import MODEL, PLAN, error_of, run, succeed

MAZES = ("Maze5x5-0", "UMaze")
QUICK = "--length 30 --image-size 32 --frames-per-shard 64 --cluster local:1"
FIT = "wmcache fit --steps 2 --batch-size 4 --device cpu --out {home}/tcn.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames, weights, stores and a run of two mazes; read only."""
    home = tmp_path_factory.mktemp("mazes")
    for name in MAZES:
        succeed(f"wmcache collect --env {name} --episodes 3 --out {{home}}/{name} {QUICK}", home)
    frames = " ".join(f"--dataset {{home}}/{name}" for name in MAZES)
    succeed(f"{FIT} {frames}", home)
    for name in MAZES:
        line = "wmcache extract --device cpu --weights {home}/tcn.safetensors"
        succeed(f"{line} --dataset {{home}}/{name} --out {{home}}/{name}.zarr", home)
    caches = " ".join(f"--cache {{home}}/{name}.zarr" for name in MAZES)
    succeed(f"wmtrain {caches} --steps 2 --out {{home}}/run {MODEL}", home)
    return home


def test_a_model_of_several_mazes_plans_in_another_one(home: Path) -> None:
    plan = f"wmplan --run {{home}}/run --env Maze7x7-3 --out {{home}}/plan {PLAN} --goals tasks --baselines expert"
    printed = succeed(plan, home).stdout
    results = json.loads((home / "plan" / "results.json").read_text())
    assert (results["maze"], results["episodes"]) == ("Maze7x7-3", 2)
    tasks = list(open_environment("Maze7x7-3").fixed_tasks())[:2]
    page = (home / "plan" / "report.html").read_text()
    for name in tasks:
        assert f"task {name}: planner " in printed
        assert name in page
    for row in [*results["by_threshold"], *results["baselines"]["expert"]]:
        judged = row["by_task"]
        assert list(judged) == tasks
        for part in ("successes", "held"):
            assert sum(found[part] for found in judged.values()) == row[part]
        assert [found["episodes"] for found in judged.values()] == [1, 1]


def test_an_encoder_that_is_fitted_on_several_datasets_records_all_of_them(home: Path, tmp_path: Path) -> None:
    known = read_fit(home / "tcn.safetensors")
    assert known["dataset"] == "+".join(FrameDataset.open(home / name).card.fingerprint for name in MAZES)
    assert int(known["frames"]) == 2 * 2 * 30
    again = succeed(f"{FIT} --dataset {{home}}/{MAZES[0]} --dataset {{home}}/{MAZES[1]}", home)
    assert "already complete" in again.stdout
    turned = run(f"{FIT} --dataset {{home}}/{MAZES[1]} --dataset {{home}}/{MAZES[0]}", home)
    assert "--out" in error_of(turned)
    twice = f"wmcache fit --dataset {{home}}/UMaze --dataset {{home}}/UMaze --out {tmp_path}/x.safetensors"
    assert "--dataset" in error_of(run(twice, home))
    adapter = f"wmcache fit --encoder dino-tok --dataset {{home}}/UMaze --dataset {{home}}/{MAZES[0]}"
    assert "dino-tok" in error_of(run(adapter, home))


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (7, 11), (13, 17)])
def test_random_mazes_are_connected_and_a_function_of_their_name(rows: int, columns: int) -> None:
    drawn = [find_maze(f"Maze{rows}x{columns}-{seed}") for seed in range(12)]
    for maze in drawn:
        assert (len(maze.rows), len(maze.rows[0])) == (rows, columns)
        cells = np.argwhere(maze.free) - 0.2
        assert len(cells) >= (rows // 2) * (columns // 2)
        assert np.isfinite(maze.geodesic(cells[0], cells)).all()
        assert maze == find_maze(maze.name)
    assert len({maze.rows for maze in drawn}) > 2


def test_the_expert_reaches_goals_of_random_and_giant_mazes() -> None:
    for name in ("Maze9x9-4", "Giant"):
        env = open_environment(name)
        task = env.sample_task(np.random.default_rng(2))
        act, goal = env.expert(), np.asarray(task.goal)
        assert act is not None
        env.reset([task])
        env.step(act(np.asarray(task.start), goal, 250)[None])
        assert env.distance(env.observe().columns["state"], goal) < 0.1
        env.close()


@pytest.mark.parametrize("name", ["Maze6x7-1", "Maze3x7-1", "Maze7x101-1"])
def test_a_size_without_a_random_maze_is_refused(name: str) -> None:
    with pytest.raises(MazeError, match=name):
        open_environment(name)
    with pytest.raises(UserError, match="Maze7x7-SEED"):
        open_environment("Maze7x7")
