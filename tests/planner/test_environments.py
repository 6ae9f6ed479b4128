"""Environments without a geometry, from frames to a report: judged by return, by their own distance, or by one on named columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from wmcache.cache import TokenStore
from wmcache.commands.plan import wmplan
from wmcache.common.errors import UserError
from wmcache.envs import Task, open_environment
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, run_baseline, run_episodes, tasks_of
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import write_report
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

MakeRun = Callable[..., Path]
SIZES: dict[str, dict[str, Any]] = {
    "mdn-rnn": {"hidden": 16, "mixtures": 2, "sequence": 6},
    "dino-wm": {"width": 16, "depth": 1, "heads": 2},
    "td-mpc2": {"latent": 8, "hidden": 8, "encoder_width": 8},
}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """(environment, model, frameskip, settings of the frames) -> a run."""

    def make(env: str, model: str, frameskip: int, **frames: Any) -> Path:
        folder = tmp_path_factory.mktemp("other")
        collect(env, folder / "frames", **{"episodes": 6, "length": 40, "image_size": 32, **frames})
        extract(FrameDataset.open(folder / "frames"), encoders.create("pixels", device="cpu"), folder / "pixels.zarr")
        settings = TrainOptions(
            model=model,
            model_options=SIZES[model],
            frameskip=frameskip,
            steps=5,
            batch=8,
            dtype="float32",
            device="cpu",
        )
        train(folder / "pixels.zarr", folder / "run", settings)
        return folder / "run"

    return make


@pytest.fixture
def quick() -> PlanOptions:
    search = {"samples": 8, "elites": 3, "iterations": 2}
    return PlanOptions(episodes=3, budget=12, horizon=2, search=search, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "env",
    [
        *("gym:Pendulum-v1", "gym:CartPole-v1", "{package}:Dots-v0"),
        pytest.param("gym:CarRacing-v3", marks=pytest.mark.sweep),
    ],
)
def test_without_a_goal_the_predicted_return_is_maximised(
    make_run: MakeRun, quick: PlanOptions, tmp_path: Path, user_package: str, env: str
) -> None:
    env = env.format(package=user_package)
    run = make_run(env, "mdn-rnn", 1)
    context = EvalContext(run, quick)
    assert context.drift["cosine"] > 0.999  # frames are drawn by replay
    episodes, results = evaluate(context, quick, tmp_path)
    write_report(tmp_path, run, context, episodes, results, "wmplan")
    written = json.loads((tmp_path / "results.json").read_text())
    assert {"report.html", "episodes.parquet"} <= {file.name for file in tmp_path.iterdir()}
    assert len(list((tmp_path / "videos").iterdir())) == 3
    returns = episodes.rewards.sum(1)
    assert written["return"]["mean"] == pytest.approx(returns.mean())
    low, high = written["return"]["ci95"]
    assert low <= returns.mean() <= high
    assert list(written["baselines"]) == ["random", "zero"]
    assert written["env"] == env
    assert written["options"]["objective"] == "return"
    one_hot = written["options"]["solver"] == "categorical-cem"
    assert one_hot == (env == "gym:CartPole-v1")
    if one_hot:
        assert (np.sort(episodes.actions, -1) == [0, 1]).all()
    # The recorded episode is what the environment does, and depends on its number alone.
    again = open_environment(env)
    again.reset([again.sample_task(np.random.default_rng(99 * 2 + 1), goal=False)])
    np.testing.assert_allclose(again.step(episodes.actions[2:])["reward"], episodes.rewards[2:])
    alone = run_episodes(context, quick, [2])
    np.testing.assert_allclose(alone.rewards, episodes.rewards[2:], rtol=1e-3)


def test_a_learned_policy_and_value_plan_for_a_return(make_run: MakeRun, quick: PlanOptions) -> None:
    run = make_run("gym:Pendulum-v1", "td-mpc2", 2)
    options = replace(quick, solver="mppi", search={**quick.search, "proposals": 3})
    episodes = run_episodes(EvalContext(run, options), options, range(2))
    assert episodes.rewards.shape == (2, 12)
    assert (np.abs(episodes.actions) <= 2).all()
    np.testing.assert_array_equal(run_episodes(EvalContext(run, options), options, range(2)).actions, episodes.actions)
    with pytest.raises(UserError, match="--model rssm"):
        make_run("gym:CartPole-v1", "td-mpc2", 1)


def test_a_distracted_store_is_planned_in_its_own_environment_or_another(
    make_run: MakeRun, quick: PlanOptions, tmp_path: Path
) -> None:
    run, named = make_run("UMaze+colors,background@1", "dino-wm", 2), []
    for env in (None, "UMaze+colors,background@0", "UMaze"):
        for goals in ("random-state", "dataset"):
            options = replace(quick, env=env, goals=goals, strict=False)
            context = EvalContext(run, options)
            assert context.drift["cosine"] > 0.999  # of the store's own frames
            episodes, _ = evaluate(context, options, tmp_path)
            assert episodes.states.shape[-1] == (4 if env == "UMaze" else 6)
            if env != "UMaze":
                np.testing.assert_array_equal(episodes.start[:, 4], episodes.goal[:, 4])
            named.append(context.fingerprint(options))
    assert len(set(named)) == 6
    plain = replace(quick, env="UMaze+camera@0", goals="dataset", strict=False)
    context = EvalContext(make_run("UMaze", "dino-wm", 2), plain)
    episodes, _ = evaluate(context, plain, tmp_path)
    np.testing.assert_array_equal(episodes.start[:, 4], episodes.goal[:, 4])


def test_nothing_acts_after_all_episodes_have_ended(make_run: MakeRun, quick: PlanOptions) -> None:
    context = EvalContext(make_run("gym:CartPole-v1", "mdn-rnn", 1), quick)
    short, long = (run_baseline(context, replace(quick, budget=budget), "random") for budget in (200, 450))
    most = int(short.rewards.sum(1).max())
    assert most < 200
    assert short.replans == long.replans == 3 * most
    assert (short.states.shape[1], long.states.shape[1]) == (200, 450)
    np.testing.assert_array_equal(long.rewards[:, :200], short.rewards)
    np.testing.assert_array_equal(long.states[:, most:], np.repeat(long.states[:, most - 1 : most], 450 - most, 1))
    assert long.actions.shape == (3, 450, 2)
    assert not long.rewards[:, 200:].any()


def test_without_a_goal_or_a_reward_what_needs_one_is_refused(
    make_run: MakeRun, quick: PlanOptions, tmp_path: Path
) -> None:
    run = make_run("gym:Pendulum-v1", "dino-wm", 2)
    with pytest.raises(UserError, match="mdn-rnn"):
        evaluate(EvalContext(run, quick), quick, tmp_path / "plan")
    for changed, flag in (
        ({"goals": "dataset"}, "--goals"),
        ({"threshold": 0.5}, "--threshold"),
        ({"mask": True}, "--mask"),
    ):
        with pytest.raises(UserError, match=f"{flag} .*gym:Pendulum-v1"):
            EvalContext(run, replace(quick, **changed))
    with pytest.raises(UserError, match="--policy expert"):
        evaluate(EvalContext(run, quick), replace(quick, policy="expert"), tmp_path / "plan")
    assert not (tmp_path / "plan").exists()
    random = run_baseline(EvalContext(run, quick), quick, "random")
    assert (np.abs(random.actions) <= 2).all()
    assert (np.abs(random.actions) > 1).any()


def test_solvers_without_discrete_actions_are_refused(make_run: MakeRun, quick: PlanOptions, tmp_path: Path) -> None:
    run = make_run("gym:CartPole-v1", "dino-wm", 1)
    with pytest.raises(UserError, match="categorical-cem"):
        EvalContext(run, replace(quick, solver="mppi"))
    result = CliRunner().invoke(wmplan, ["--run", str(run), "--solver", "cem", "--out", str(tmp_path / "plan")])
    assert result.exit_code == 1
    assert "categorical-cem" in result.stderr
    assert not (tmp_path / "plan").exists()


def test_pusht_is_planned_to_frames_of_held_out_episodes(make_run: MakeRun, quick: PlanOptions, tmp_path: Path) -> None:
    run = make_run("PushT", "dino-wm", 5, policy="expert", length=60)
    options = replace(quick, goals="dataset", goal_steps=25, budget=30, baselines="zero,expert")
    context = EvalContext(run, options)
    episodes, results = evaluate(context, options, tmp_path)
    write_report(tmp_path, run, context, episodes, results, "wmplan")
    assert (results["threshold"], results["env"]) == (1.0, "PushT")
    assert [row["threshold"] for row in results["by_threshold"]] == [1.0]
    assert results["by_threshold"][0]["path_ratio"] is None
    assert results["baselines"]["expert"][0]["successes"] > results["baselines"]["zero"][0]["successes"]
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"success", "training"}
    state = TokenStore.open(run.parent / "pixels.zarr").require_state()
    for start, goal in zip(episodes.start, episodes.goal, strict=True):
        frame = int(np.flatnonzero((state == start).all(1))[0])
        np.testing.assert_array_equal(state[frame + 25], goal)


@pytest.mark.parametrize(
    ("env", "columns", "threshold"),
    [
        ("gym:Pendulum-v1", "observation", 0.5),
        ("{package}:Dots-v0", "robot_xy,lamp", 0.05),
        ("gym:Reacher-v5", "observation:8-9", 0.01),
        ("PushT", "proprio:0-1", 20.0),
    ],
)
def test_success_is_a_distance_to_a_held_out_frame_on_named_columns(
    make_run: MakeRun, quick: PlanOptions, tmp_path: Path, user_package: str, env: str, columns: str, threshold: float
) -> None:
    run = make_run(env.format(package=user_package), "dino-wm", 1)
    options = replace(quick, judge_columns=columns, threshold=threshold, goal_steps=5, budget=6)
    context = EvalContext(run, options)
    episodes, results = evaluate(context, options, tmp_path)
    write_report(tmp_path, run, context, episodes, results, "wmplan")
    assert results["resolved"]["goals"] == "dataset"
    assert [row["threshold"] for row in results["by_threshold"]] == [threshold]
    assert list(results["baselines"]) == ["random", "zero"]
    assert results["began_at_goal"] == {str(threshold): 0}  # strict
    assert len(list((tmp_path / "videos").iterdir())) == 3
    store, frames = context.store, FrameDataset.open(run.parent / "frames")
    names = [name.split(":")[0] for name in columns.split(",")]
    values = np.concatenate([store.column(name) for name in names], 1)
    one, other = episodes.states[0, 0], episodes.goal[0]
    chosen = {"observation:8-9": slice(8, 10), "proprio:0-1": slice(0, 2)}.get(columns, slice(None))
    assert context.success.distance(one, other) == pytest.approx(np.linalg.norm((one - other)[chosen]))
    held_out = np.isin(store.episode, store.split("val"))
    world = context.open_env()
    for number, task in enumerate(tasks_of(context, context.settled(options), range(3))):
        goals = np.flatnonzero((values == episodes.goal[number]).all(1) & held_out)
        first = next(goal - 5 for goal in goals if np.allclose(values[goal - 5], episodes.start[number], atol=0.05))
        assert store.episode[first] == store.episode[first + 5]
        # The start is that frame: the recorded actions lead from there to the goal. The goal is shown as it was collected.
        world.reset([task])
        moved = world.step(store.action[None, first : first + 5])
        reached = np.concatenate([moved[name][0, -1] for name in names])
        assert context.success.distance(reached, episodes.goal[number]) < 0.1 * threshold
        assert task.goal is not None
        (collected,) = frames.read_frames([first + 5])
        np.testing.assert_array_equal(world.reset([Task(task.goal)]).image[0], collected)
    alone = run_episodes(context, options, [2])
    np.testing.assert_allclose(alone.states, episodes.states[2:], rtol=1e-3, atol=1e-5)


def test_a_distance_on_columns_that_do_not_exist_or_without_a_threshold_is_refused(
    make_run: MakeRun, quick: PlanOptions
) -> None:
    run = make_run("gym:Pendulum-v1", "dino-wm", 1)
    for changed, words in (
        ({"judge_columns": "observation"}, "--threshold"),
        ({"judge_columns": "obs", "threshold": 0.5}, "'obs'.*observation"),
        ({"judge_columns": "reward", "threshold": 0.5}, "'reward'"),
        ({"judge_columns": "observation:1-3", "threshold": 0.5}, "observation:1-3.*0 to 2"),
        ({"judge_columns": "observation:2-1", "threshold": 0.5}, "observation:2-1"),
        ({"judge_columns": "observation:", "threshold": 0.5}, "'observation:'"),
        ({"judge_columns": "observation", "threshold": 0.5, "goals": "random-action"}, "--goals random-action"),
    ):
        with pytest.raises(UserError, match=words):
            EvalContext(run, replace(quick, **changed))
    options = replace(quick, judge_columns="observation", threshold=50.0)
    with pytest.raises(UserError, match="--no-strict"):
        run_episodes(EvalContext(run, options), options, [0])
    assert len(run_episodes(EvalContext(run, options), replace(options, strict=False), [0]).goal) == 1


@pytest.mark.sweep  # half a minute
def test_pusher_is_planned_to_a_frame_by_the_command(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("gym:Pusher-v5", "dino-wm", 2)
    words = "--judge-columns observation --threshold 0.2 --goal-steps 6 --episodes 2 --budget 4 --horizon 2 --samples 8"
    more = ["--elites", "3", "--iterations", "1", "--baselines", "random,zero,untrained", "--device", "cpu", "--json"]
    result = CliRunner().invoke(wmplan, ["--run", str(run), *words.split(), *more])
    assert result.exit_code == 0, result.stderr
    written = json.loads(result.stdout)
    assert (written["env"], written["threshold"], written["episodes"]) == ("gym:Pusher-v5", 0.2, 2)
    assert set(written["baselines"]) == {"random", "zero", "untrained"}
    (folder,) = run.glob("plan-*")
    assert "judge-columns-observation" in folder.name
    assert (folder / "report.html").exists()
