"""Studies of other environments: their own thresholds, a distance on named columns, or one line where there is no goal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from wmcache.envs import open_environment
from wmcache.pipeline.collect import collect
from wmcache.study.options import read_study

from .conftest import run

STUDY = """
probe_frames = 100
device = "cpu"
dataset = {dataset}

[train]
steps = 4
batch = 8
frameskip = 2
dtype = "float32"
model_options = {{ width = 16, depth = 1, heads = 2 }}

[[plan]]
protocol = "mpc-100"
episodes = 2
budget = 4
horizon = 2
samples = 8
elites = 2
iterations = 1
{more}

[[encoders]]
name = "pixels"
"""


def write(folder: Path, env: str, more: str = "", **frames: Any) -> Path:
    collect(env, folder / "frames", **{"episodes": 6, "length": 40, "image_size": 32, **frames})
    file = folder / "other.toml"
    file.write_text(STUDY.format(dataset=json.dumps(str(folder / "frames")), more=more))
    return file


@pytest.mark.parametrize(
    ("env", "more", "threshold"),
    [
        ("PushT", "", 1.0),
        ("gym:Pendulum-v1", 'judge_columns = "observation"\nthreshold = 0.4\ngoal_steps = 6\nstrict = false', 0.4),
    ],
)
def test_tables_have_the_thresholds_of_the_environment(tmp_path: Path, env: str, more: str, threshold: float) -> None:
    pytest.importorskip("gym_pusht" if env == "PushT" else "pygame")
    result = run(write(tmp_path, env, more), tmp_path / "out", "--json")
    (row,) = json.loads(result.stdout)["rows"]
    assert row["threshold"] == threshold
    assert row["successes"] == row[f"successes_{threshold}"]
    assert row["random_successes"] is not None
    assert "successes_0.25" not in row
    (table,) = (pq.read_table(file) for file in (tmp_path / "out/plans").glob("*/episodes.parquet"))
    assert [name for name in table.column_names if name.startswith("env_steps")] == [f"env_steps_{threshold}"]


def test_an_environment_without_a_goal_is_refused_before_any_work(tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    result = run(write(tmp_path, "gym:Pendulum-v1"), tmp_path / "out", status=1)
    (line,) = result.stderr.splitlines()
    assert "gym:Pendulum-v1" in line
    assert "judge_columns" in line
    assert not (tmp_path / "out/cells").exists()


WORLDS = """
name = "seen"

[[plan]]
name = "tasks"
protocol = "mpc-100"
goals = "tasks"
{small}

[[plan]]
name = "turned"
protocol = "mpc-100"
env = "Maze5x5-0"
{small}

[[plan]]
name = "coloured"
protocol = "mpc-100"
env = "UMaze+colors@0"
{small}
"""
SMALL = "episodes = 2\nbudget = 4\nhorizon = 2\nsamples = 8\nelites = 2\niterations = 1"


def test_a_frozen_model_plans_in_other_worlds_with_a_row_for_each(tmp_path: Path) -> None:
    result = run(write(tmp_path, "UMaze", WORLDS.format(small=SMALL)), tmp_path / "out")
    table = result.stdout.partition("reached, held")[2].splitlines()
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 120
    assert "pixels" in table[0]
    for line, name in zip(table[1:5], ("seen", "tasks", "turned", "coloured"), strict=True):
        assert line.split()[0] == name
        assert line.count(" of 2") == 3  # pixels, random, zero
    page = (tmp_path / "out/study.html").read_text().partition("<th>evaluation</th>")[2].partition("</table>")[0]
    for word in ("of the frames", "Maze5x5-0", "UMaze+colors@0", "tasks"):
        assert word in page
    cells = [json.loads(file.read_text()) for file in (tmp_path / "out/cells").glob("*.json")]
    assert [cell["stage"] for cell in cells].count("train") == 1
    assert [cell["stage"] for cell in cells].count("plan") == 4


def test_the_study_of_transfer_plans_in_worlds_that_exist() -> None:
    options = read_study(Path(__file__).parents[2] / "study/transfer.toml")
    assert options.collect is not None
    seen = open_environment(options.collect.env)
    names = [plan.options.env for plan in options.plan]
    assert names[0] is None
    worlds = [seen if name is None else open_environment(name) for name in names]
    assert len({env.spec.world for env in worlds}) == len(names) - 1  # the fixed tasks are the seen world's
    assert {env.spec.action.shape for env in worlds} == {(2,)}
