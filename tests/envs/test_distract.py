"""Distraction changes what frames look like, and nothing else."""

from __future__ import annotations

import colorsys
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from wmcache.commands.data import collect
from wmcache.common.columns import of_role
from wmcache.envs import Distraction, Environment, Maze, Replay, Task, open_environment
from wmcache.envs.distract import Look
from wmcache.envs.pointmaze.maze import START_MARGIN
from wmcache.envs.pointmaze.wander import wander
from wmcache.pipeline.frames import FrameDataset

from ..conftest import contents

SIZE = 48
PYGAME = pytest.mark.skipif(find_spec("pygame") is None, reason="pygame is not installed")
ALL = "colors,camera,background,jitter"
PLAIN = ["UMaze", "gym:Reacher-v5", pytest.param("gym:CartPole-v1", marks=PYGAME)]


def begin(env: Environment, seed: int = 0) -> np.ndarray:
    return env.reset([env.sample_task(np.random.default_rng(seed + row)) for row in range(env.count)]).image


def actions_for(env: Environment, steps: int) -> np.ndarray:
    space = env.spec.action
    assert space.low is not None
    assert space.high is not None
    values = np.random.default_rng(5).uniform(space.low, space.high, (env.count, steps, space.width))
    return values.astype(np.float32)


def sectors(frames: np.ndarray) -> np.ndarray:
    """Return the twelfth of the hue circle of each pixel that has a clear hue."""
    hsv = np.asarray(Image.fromarray(frames.reshape(-1, 1, 3)).convert("HSV")).reshape(-1, 3).astype(int)
    return (hsv[(hsv[:, 1] > 90) & (hsv[:, 2] > 40), 0] * 12) // 256


@pytest.mark.parametrize("seed", range(6))
def test_colours_are_drawn_from_the_sectors_of_the_seed(seed: int) -> None:
    drawn = [
        colorsys.rgb_to_hsv(*colour)
        for episode in range(200)
        for colour in Look(Distraction(("colors",), seed), episode, 0).colours(9)
    ]
    hues = 12 * np.array(drawn)[:, 0]
    assert set(np.floor(hues).astype(int)) == set(range(seed % 2, 12, 2))
    assert np.abs(hues % 1 - 0.5).max() < 0.2


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("seed", [0, 1])
def test_colours_of_even_and_odd_seeds_are_disjoint(name: str, seed: int) -> None:
    env = open_environment(f"{name}+colors,background@{seed}", 4, SIZE)
    frames = begin(env)
    found = sectors(frames)
    assert len(found) > frames[..., 0].size / 4
    assert (found % 2 == seed % 2).mean() > 0.8  # the others are edges, where colours mix
    assert len(np.unique(frames[:, 0, 0], axis=0)) == 4
    env.close()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kinds", ["colors", "camera", "background", "jitter", "ball"])
def test_what_happens_is_as_without_distraction(name: str, kinds: str) -> None:
    if (name == "gym:CartPole-v1" and kinds == "camera") or (name != "UMaze" and kinds == "ball"):
        pytest.skip("it has no camera, or no ball")
    plain, distracted = (open_environment(full, 2, SIZE) for full in (name, f"{name}+{kinds}@3"))
    before = begin(plain)
    assert (begin(distracted) != before).any((1, 2, 3)).all()
    moved, same = (env.step(actions_for(env, 30)) for env in (plain, distracted))
    for column, values in moved.items():
        np.testing.assert_array_equal(same[column], values)
    ended = np.logical_or(*(moved.get(end, np.zeros((2, 30), bool)) for end in ("terminated", "truncated")))
    steps = 1 + np.minimum(np.arange(30), np.where(ended.any(1), ended.argmax(1), 30)[:, None])
    np.testing.assert_array_equal(same["view"][..., 1], steps)
    np.testing.assert_array_equal(same["view"][..., 0], np.repeat(same["view"][:, :1, 0], 30, 1))
    again = open_environment(f"{name}+{kinds}@3", 1, SIZE)
    rng = np.random.default_rng(1)
    start = again.sample_task(rng).start
    assert not isinstance(start, Replay)
    if name != "UMaze":
        lead = actions_for(distracted, 30)[1, : steps[1, -1]]
        replayed = again.reset([Task(Replay(start, lead))])
        np.testing.assert_array_equal(replayed.image[0], distracted.observe().image[1])
    for env in (plain, distracted, again):
        env.close()


@pytest.mark.parametrize("name", ["UMaze", "gym:Reacher-v5"])
def test_a_look_leaves_the_model_as_it_is(name: str) -> None:
    plain, distracted = open_environment(name, 1, SIZE), open_environment(f"{name}+{ALL}@0", 1, SIZE)
    before = begin(plain)
    states = plain.observe().columns["state"]
    seen = distracted.reset([distracted.sample_task(np.random.default_rng(0))])
    assert (seen.image != before).any()
    np.testing.assert_array_equal(distracted._inner.render(states), before)  # type: ignore[attr-defined]
    looks = [np.concatenate([states, [[number, 0.0]]], 1) for number in (1, 2, 1)]
    one, other, same = (distracted.render(look) for look in looks)
    assert (one != other).any()
    np.testing.assert_array_equal(one, same)
    for env in (plain, distracted):
        env.close()


def test_a_background_is_behind_objects_and_moves() -> None:
    plain, distracted = open_environment("UMaze", 1, SIZE), open_environment("UMaze+background@0", 1, SIZE)
    state = np.array([[0.8, 0.8, 0.0, 0.0]])
    usual = plain.render(state)[0]
    first, second, later = (
        distracted.render(np.concatenate([state, [view]], 1))[0] for view in ([5, 0], [6, 0], [5, 9])
    )
    floor = (usual == usual[SIZE // 2, SIZE // 4]).all(-1)
    assert 0.05 < floor.mean() < 0.6
    for frame in (first, second, later):
        changed = (frame != usual).any(-1)
        assert changed[floor].mean() > 0.95
        assert (changed & ~floor).mean() < 0.05  # edges
    assert (first != second).any()
    assert 0.02 < (first != later).any(-1)[floor].mean() < 0.9
    for env in (plain, distracted):
        env.close()


def test_a_second_ball_rolls_through_free_cells_whatever_the_first_does() -> None:
    env, plain = (open_environment(name, 2, SIZE) for name in ("Medium+ball@1", "Medium"))
    maze = Maze.load("Medium")
    tasks = [env.sample_task(np.random.default_rng(seed)) for seed in (0, 0)]
    env.reset(tasks)
    pushed = np.stack([np.ones((120, 2)), -np.ones((120, 2))])
    for t in range(120):
        moved = env.step(pushed[:, t : t + 1])["view"]
        np.testing.assert_array_equal(moved[0], moved[1])
        assert "view" not in of_role(env.spec.columns, "proprio")
    look = Look(Distraction(("ball",), 1), int(moved[0, 0, 0]), 0)
    path = np.stack([wander(maze, look.rng("ball"), step) for step in range(400)])
    assert maze.is_clear(path, START_MARGIN).all()
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).max() <= 0.15 + 1e-9
    assert len(np.unique(np.round(path), axis=0)) > 5
    # The second ball looks as the first one does at its position, and nothing else of the frame has changed.
    states = np.concatenate([path[100:101], np.zeros((1, 2))], 1)
    alone = plain.render(np.concatenate([states, states + np.array([0.0, 0.0, 1.0, 0.0])]))
    np.testing.assert_array_equal(alone[0], alone[1])
    both = env.render(np.concatenate([states, [[look.episode, 100.0]]], 1))
    np.testing.assert_array_equal(both[0], alone[0])
    far = env.render(np.concatenate([states, [[look.episode, 0.0]]], 1))[0]
    changed = (far != alone[0]).any(-1)
    assert 0 < changed.mean() < 0.02
    for one in (env, plain):
        one.close()


@pytest.mark.parametrize("name", PLAIN)
def test_a_jittered_frame_is_shifted_a_little_in_each_env_step(name: str) -> None:
    plain, jittered = open_environment(name, 1, SIZE), open_environment(f"{name}+jitter@0", 1, SIZE)
    usual = begin(plain)[0].astype(int)
    frames = [begin(jittered)[0].astype(int)]
    view = jittered.observe().columns["view"][0]
    reach = round(0.04 * SIZE) + 1
    for step in range(3):
        look = Look(Distraction(("jitter",), 0), int(view[0]), step)
        assert max(map(abs, look.shift)) <= 0.04
        if step == 0:
            right, down = (round(share * SIZE) for share in look.shift)
            inside = np.roll(usual, (down, right), (0, 1))[reach:-reach, reach:-reach]
            differs = np.abs(inside - frames[0][reach:-reach, reach:-reach]).max(-1) > 30
            assert differs.mean() < 0.1  # edges, which a shift by a part of a pixel blurs
            assert differs.mean() <= (np.abs(usual - frames[0])[reach:-reach, reach:-reach].max(-1) > 30).mean()
    assert len({Look(Distraction(("jitter",), 0), 1, step).shift for step in range(50)}) == 50
    for env in (plain, jittered):
        env.close()


def test_a_goal_looks_as_the_start_and_counts_as_without_distraction() -> None:
    plain, distracted = open_environment("UMaze"), open_environment("UMaze+camera@0")
    (task, usual) = (env.sample_task(np.random.default_rng(3)) for env in (distracted, plain))
    start, goal = np.asarray(task.start), np.asarray(task.goal)
    np.testing.assert_array_equal(start[:4], usual.start)
    np.testing.assert_array_equal(goal[:4], usual.goal)
    np.testing.assert_array_equal(start[4:], goal[4:])
    assert distracted.distance(start, goal) == plain.distance(start[:4], goal[:4])
    act, usual_act = distracted.expert(), plain.expert()
    assert act is not None
    assert usual_act is not None
    np.testing.assert_array_equal(act(start, goal, 5), usual_act(start[:4], goal[:4], 5))
    assert distracted.spec.thresholds == plain.spec.thresholds
    assert distracted.spec.world != plain.spec.world


def run(*words: str, fails: bool = False) -> str:
    small = ["--episodes=3", "--length=8", "--image-size=32", "--frames-per-shard=5"]
    done = CliRunner().invoke(collect, ["--cluster=local:1", *words, *small])
    assert done.exit_code == int(fails), done.output
    return done.output


def test_a_distracted_dataset_has_its_own_identity(tmp_path: Path) -> None:
    run("--env=UMaze", f"--out={tmp_path / 'plain'}")
    run("--env=UMaze", f"--out={tmp_path / 'a' / 'x'}", f"--distract={ALL},ball", "--distract-seed=2")
    run(
        "--env=UMaze",
        f"--out={tmp_path / 'b' / 'x'}",
        f"--distract={ALL},ball",
        "--distract-seed=2",
        "--cluster=local:2",
    )
    run("--env=UMaze+camera,colors@2", f"--out={tmp_path / 'c'}")
    run("--env=UMaze", f"--out={tmp_path / 'd'}", "--distract=colors,camera", "--distract-seed=4")
    assert contents(tmp_path / "a" / "x") == contents(tmp_path / "b" / "x")
    found = [FrameDataset.open(tmp_path / name) for name in ("plain", "a/x", "c", "d")]
    assert len({dataset.card.fingerprint for dataset in found}) == 4
    assert [dataset.card.env for dataset in found] == [
        "UMaze",
        f"UMaze+{ALL},ball@2",
        "UMaze+camera,colors@2",
        "UMaze+colors,camera@4",
    ]
    for dataset in found[1:]:
        for name in ("action", "state"):
            np.testing.assert_array_equal(dataset.steps.columns[name], found[0].steps.columns[name])
        assert dataset.card.layout == found[0].card.layout
        assert len(np.unique(dataset.steps.columns["view"][:, 0])) == 3
    assert "columns" not in json.loads((tmp_path / "plain" / "dataset.json").read_text())
    assert "env" in run("--env=UMaze", f"--out={tmp_path / 'plain'}", "--distract=colors", fails=True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--distract=colours"], "colors"),
        (["--distract-seed=1"], "--distract"),
        (["--env=UMaze+colors@1", "--distract=camera"], "--distract"),
        pytest.param(["--env=gym:CartPole-v1", "--distract=camera"], "camera", marks=PYGAME),
        (["--env=gym:Reacher-v5", "--distract=ball"], "ball"),
    ],
)
def test_a_distraction_that_is_not_possible_is_refused(tmp_path: Path, words: list[str], named: str) -> None:
    assert named in run(f"--out={tmp_path / 'x'}", *words, fails=True)
    assert not (tmp_path / "x").exists()


def test_kinds_are_read_in_any_order() -> None:
    assert str(Distraction.of("background, colors", 7)) == "colors,background@7"
    one, other = open_environment("UMaze+background,colors@7"), open_environment("UMaze+colors,background@7")
    assert one.spec == other.spec
