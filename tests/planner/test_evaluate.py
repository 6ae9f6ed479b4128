"""Planning episodes: an honest judge, a planner that is told nothing, and encoders and stores that must match."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from wmcache.cache import StoreWriter, TokenStore
from wmcache.common.errors import UserError
from wmcache.envs import PointMazeVectorEnv
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.planner import evaluate as evaluate_module
from wmcache.planner.evaluate import EvalContext, default_out, evaluate, live_drift, run_episodes
from wmcache.planner.mpc import Mpc
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import SOLVERS

QUICK: dict[str, dict[str, Any]] = {
    "cem": {"samples": 8, "elites": 3, "iterations": 2},
    "icem": {"samples": 8, "elites": 3, "iterations": 2},
    "mppi": {"samples": 8, "elites": 3, "iterations": 2},
    "gd": {"steps": 2, "optimiser": "adam"},
}


class RecordingEncoder:
    """The real encoder, and the frames that it was given, a call each."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.lag = encoder, encoder.lag
        self.calls: list[NDArray[np.uint8]] = []

    def __call__(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        self.calls.append(frames.copy())
        return self.encoder(frames if frames.ndim == 4 else frames[:, 1])

    @property
    def frames(self) -> int:
        return sum(map(len, self.calls))


@pytest.fixture
def recorded(setting: EvalContext, monkeypatch: pytest.MonkeyPatch) -> RecordingEncoder:
    recording = RecordingEncoder(setting.encoder)
    monkeypatch.setattr(setting, "encoder", recording)
    return recording


def set_up(run: Path, options: PlanOptions) -> tuple[EvalContext, RecordingEncoder]:
    setting: Any = EvalContext(run, options)
    setting.encoder = RecordingEncoder(setting.encoder)
    return setting, setting.encoder


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"search": {"samples": 20, "elites": 3}},
        {"search": {"iterations": 4}},
        {"horizon": 3},
        {"batch": 2},
        {"solver": "gd", "search": QUICK["gd"]},
        {"distance": "graph"},
        {"context": 3},
    ],
    ids=str,
)
def test_a_frame_is_encoded_once_a_goal_and_once_a_replan(
    run_path: Path, tiny_plan: PlanOptions, tmp_path: Path, changed: dict[str, Any]
) -> None:
    options = replace(tiny_plan, **changed)
    setting, recorded = set_up(run_path, options)
    episodes, results = evaluate(setting, options, tmp_path)
    # 12 env steps in chunks of 5.
    assert results["replans"] == 3 * 3
    assert results["encoder_frames"] == results["episodes"] + results["replans"] == recorded.frames
    assert episodes.states.shape == (3, 12, 4)
    assert np.isfinite(episodes.states).all()


class TestWhichFramesAreSeen:
    """A chunk of several model steps has frames in its middle; a plan from several frames needs the last of them."""

    @pytest.mark.parametrize(
        ("execute", "observed", "budget", "seen_after"),
        [
            (1, 1, 20, [5, 10, 15]),
            (1, 3, 20, [5, 10, 15]),
            (2, 1, 20, [10]),
            (2, 2, 20, [5, 10]),
            (2, 2, 30, [5, 10, 15, 20]),
            (3, 2, 45, [10, 15, 25, 30]),
            (3, 3, 45, [5, 10, 15, 20, 25, 30]),
            (3, 1, 45, [15, 30]),
            # The budget ends in the middle of a chunk, and of a model step.
            (2, 2, 27, [5, 10, 15, 20]),
            (3, 2, 23, [10, 15]),
            (3, 2, 7, []),
        ],
    )
    def test_only_those_that_a_plan_starts_from(
        self,
        run_path: Path,
        tiny_plan: PlanOptions,
        execute: int,
        observed: int,
        budget: int,
        seen_after: list[int],
    ) -> None:
        options = replace(
            tiny_plan, episodes=2, horizon=3, execute=execute, context=3, observed=observed, budget=budget
        )
        setting, recorded = set_up(run_path, options)
        episodes = run_episodes(setting, options, range(2))
        assert episodes.states.shape == (2, budget, 4)
        assert episodes.replans == 2 * -(-budget // (5 * execute))
        assert episodes.encoder_frames == recorded.frames == 2 * (2 + len(seen_after))
        # Which they are: the goal, the start, and what the camera sees after so many env steps.
        env = PointMazeVectorEnv(2, setting.maze, setting.image_size)
        states = [episodes.goal, episodes.start, *(episodes.states[:, step - 1] for step in seen_after)]
        for state, frames in zip(states, recorded.calls, strict=True):
            observation, _ = env.reset(options={"state": state})
            np.testing.assert_array_equal(frames, observation["image"])
        env.close()

    @pytest.mark.parametrize("lag", [1, 3, 5])
    def test_an_encoder_of_pairs_is_given_the_frame_before_too(
        self, run_path: Path, tiny_plan: PlanOptions, lag: int
    ) -> None:
        options = replace(tiny_plan, episodes=2, horizon=2, execute=2, context=2, observed=2, budget=23)
        setting, recorded = set_up(run_path, options)
        recorded.lag = lag
        episodes = run_episodes(setting, options, range(2))
        assert episodes.states.shape == (2, 23, 4)
        env = PointMazeVectorEnv(2, setting.maze, setting.image_size)

        def drawn(after: int) -> NDArray[np.uint8]:
            state = episodes.states[:, after - 1] if after else episodes.start
            return env.reset(options={"state": state})[0]["image"]

        assert [frames.ndim for frames in recorded.calls[:2]] == [4, 4]  # of goal and start there is one
        for after, frames in zip([5, 10, 15, 20], recorded.calls[2:], strict=True):
            np.testing.assert_array_equal(frames, np.stack([drawn(after - lag), drawn(after)], 1))
        env.close()

    @pytest.mark.parametrize(("execute", "frames", "actions"), [(1, [1, 2, 3, 3], [0, 1, 2, 2]), (2, [1, 3], [0, 2])])
    def test_a_plan_starts_from_as_many_as_there_are_and_knows_what_was_done_between_them(
        self,
        run_path: Path,
        tiny_plan: PlanOptions,
        monkeypatch: pytest.MonkeyPatch,
        execute: int,
        frames: list[int],
        actions: list[int],
    ) -> None:
        options = replace(tiny_plan, episodes=2, horizon=2, execute=execute, context=3, observed=3, budget=20)
        setting, _ = set_up(run_path, options)
        plan, seen, plans = Mpc.plan, [], []

        def watched(mpc: Mpc, tokens: Any, proprio: Any, previous: Any, generators: Any, past: Any = None) -> Any:
            seen.append((tokens.clone(), proprio.clone(), past))
            plans.append(plan(mpc, tokens, proprio, previous, generators, past))
            return plans[-1]

        monkeypatch.setattr(Mpc, "plan", watched)
        episodes = run_episodes(setting, options, range(2))
        assert [tokens.shape[1] for tokens, _, _ in seen] == frames
        assert [0 if past is None else past.shape[1] for _, _, past in seen] == actions
        executed = torch.cat([found[:, :execute] for found in plans], 1)
        states = np.concatenate([episodes.start[:, None], episodes.states], 1)[:, ::5].astype(np.float32)
        for number, (_, proprio, past) in enumerate(seen):
            now = number * execute
            first = now + 1 - proprio.shape[1]
            np.testing.assert_allclose(proprio.numpy(), states[:, first : now + 1], atol=1e-6)
            if past is not None:
                assert torch.equal(past, executed[:, first:now])


class TestWithoutProprio:
    def test_it_plans_from_pixels_alone(
        self, blind_run_path: Path, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = replace(tiny_plan, proprio="none", budget=20)
        setting = EvalContext(blind_run_path, options)
        # Without proprio one frame has no velocity.
        assert (setting.context, setting.observed) == (3, 3)
        straight = run_episodes(setting, options, range(3))

        class Unfeeling(PointMazeVectorEnv):
            def observe(self) -> Any:
                seen = super().observe()
                return {"image": seen["image"], "proprio": np.full_like(seen["proprio"], np.nan)}

        monkeypatch.setattr(evaluate_module, "PointMazeVectorEnv", Unfeeling)
        np.testing.assert_array_equal(run_episodes(setting, options, range(3)).states, straight.states)
        assert np.ptp(straight.states[..., :2], axis=1).any()

    def test_proprio_that_is_wrong_is_noticed_by_a_model_that_sees_it(
        self, setting: EvalContext, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        straight = run_episodes(setting, tiny_plan, range(3))

        class Mistaken(PointMazeVectorEnv):
            def observe(self) -> Any:
                seen = super().observe()
                return {"image": seen["image"], "proprio": seen["proprio"] + 1}

        monkeypatch.setattr(evaluate_module, "PointMazeVectorEnv", Mistaken)
        assert not np.array_equal(run_episodes(setting, tiny_plan, range(3)).states, straight.states)

    def test_a_run_with_proprio_is_refused_where_none_is_asked_for(
        self, run_path: Path, tiny_plan: PlanOptions
    ) -> None:
        with pytest.raises(UserError, match=r"trained with proprio.*wmtrain --proprio none"):
            EvalContext(run_path, replace(tiny_plan, proprio="none"))

    def test_a_run_without_has_no_proprio_to_weigh(self, blind_run_path: Path, tiny_plan: PlanOptions) -> None:
        with pytest.raises(UserError, match=r"trained without proprio.*--alpha"):
            EvalContext(blind_run_path, replace(tiny_plan, alpha=0.1))


def test_more_observed_frames_than_a_step_sees_are_refused(run_path: Path, tiny_plan: PlanOptions) -> None:
    with pytest.raises(UserError, match=r"--observed 2 is more than the 1 frames.*--context"):
        EvalContext(run_path, replace(tiny_plan, observed=2))


def test_a_step_sees_no_more_frames_than_the_model_was_trained_with(run_path: Path, tiny_plan: PlanOptions) -> None:
    assert EvalContext(run_path, replace(tiny_plan, context=12)).context == 3


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in ("seconds_per_replan", "options")}


def test_the_same_seed_gives_the_same_episodes(setting: EvalContext, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    first = evaluate(setting, tiny_plan, tmp_path / "a")
    again = evaluate(setting, tiny_plan, tmp_path / "b")
    np.testing.assert_array_equal(first[0].states, again[0].states)
    assert without_times(first[1]) == without_times(again[1])


def test_an_episode_does_not_depend_on_the_batch_or_on_the_first_number(
    setting: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    together, _ = evaluate(setting, tiny_plan, tmp_path / "a")
    alone, _ = evaluate(setting, replace(tiny_plan, batch=1), tmp_path / "b")
    np.testing.assert_allclose(alone.states, together.states, atol=1e-3)
    later, _ = evaluate(setting, replace(tiny_plan, seed=1, episodes=2), tmp_path / "c")
    np.testing.assert_array_equal(later.goal, together.goal[1:])
    np.testing.assert_allclose(later.states, together.states[1:], atol=1e-3)


class StoppedBar(tqdm):
    def update(self, n: float | None = 1) -> bool | None:
        if self.n >= 2:
            raise KeyboardInterrupt
        return super().update(n)


def test_a_stopped_evaluation_goes_on_with_the_episodes_that_are_missing(
    setting: EvalContext, tiny_plan: PlanOptions, recorded: RecordingEncoder, tmp_path: Path
) -> None:
    options = replace(tiny_plan, batch=1, budget=10)
    straight = evaluate(setting, options, tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        # Every episode takes two replans, so this is within the second one.
        patch.setattr(evaluate_module, "tqdm", StoppedBar)
        with pytest.raises(KeyboardInterrupt):
            evaluate(setting, options, tmp_path / "stopped")
    recorded.calls.clear()
    stopped = evaluate(setting, options, tmp_path / "stopped")
    assert recorded.frames == 2 * (1 + 2)
    np.testing.assert_array_equal(stopped[0].states, straight[0].states)
    assert without_times(stopped[1]) == without_times(straight[1])


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    setting: EvalContext, tiny_plan: PlanOptions, recorded: RecordingEncoder, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        evaluate(setting, tiny_plan, tmp_path / "file" / "plan")
    assert recorded.frames == 0


def test_goals_that_run_out_are_noticed_before_any_work(
    setting: EvalContext, tiny_plan: PlanOptions, recorded: RecordingEncoder, tmp_path: Path
) -> None:
    states = [[1.0, 1.0, 0.0, 0.0]] * 2
    pq.write_table(pa.table({"start": states, "goal": states}), tmp_path / "goals.parquet")
    options = replace(tiny_plan, batch=1, goals=str(tmp_path / "goals.parquet"))
    with pytest.raises(UserError, match="2 rows, episode 2 has none"):
        evaluate(setting, options, tmp_path / "plan")
    assert recorded.frames == 0
    assert not (tmp_path / "plan").exists()


def test_unfinished_episodes_to_other_goals_are_not_taken_up(
    setting: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    options = replace(tiny_plan, goals=str(tmp_path / "goals.parquet"))
    goals = []
    for x in (1.0, 1.2):
        states = [[x, 1.0, 0.0, 0.0]] * 3
        pq.write_table(pa.table({"start": states, "goal": states}), tmp_path / "goals.parquet")
        goals.append(evaluate(setting, options, tmp_path / "plan")[0].goal[0, 0])
    assert goals == [1.0, 1.2]


class LyingEnv(PointMazeVectorEnv):
    """Whatever it tells about states, distances and success is wrong; what the camera and the proprioception see is true."""

    received: list[NDArray[np.floating]]

    def advance(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        self.received.append(actions.copy())
        return super().advance(actions) + 100.0

    def _info(self) -> dict[str, Any]:
        info = super()._info()
        return {"state": info["state"] + 100.0, "goal": info["goal"] - 7.0, "distance": 0.0, "success": True}


class TruthfulEnv(PointMazeVectorEnv):
    received: list[NDArray[np.floating]]

    def advance(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        self.received.append(actions.copy())
        return super().advance(actions)


def options_of(protocol: str, options: PlanOptions) -> PlanOptions:
    """A protocol's options that are not about the solver or the sizes that cost time."""
    names = ("horizon", "execute", "objective", "distance", "context", "observed")
    return replace(options, **{name: PROTOCOLS[protocol][name] for name in names if name in PROTOCOLS[protocol]})


HONEST: dict[str, dict[str, Any]] = {
    **{solver: {"solver": solver, "search": QUICK[solver]} for solver in SOLVERS},
    "graph": {"distance": "graph"},
    "gd on the graph": {"distance": "graph", "solver": "gd", "search": QUICK["gd"]},
    "observed": {"context": 3, "observed": 3},
    "alpha": {"alpha": 0.5},
    "dataset": {"goals": "dataset", "strict": False},
    "random-action": {"goals": "random-action", "strict": False},
}


@pytest.mark.parametrize("name", [*PROTOCOLS, *HONEST])
def test_the_planner_is_never_told_a_state_or_a_success(
    run_path: Path, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = options_of(name, tiny_plan) if name in PROTOCOLS else replace(tiny_plan, **HONEST[name])
    setting = EvalContext(run_path, replace(options, budget=12))
    received = []
    for env in (TruthfulEnv, LyingEnv):
        env.received = []
        monkeypatch.setattr(evaluate_module, "PointMazeVectorEnv", env)
        run_episodes(setting, options, range(3))
        received.append(np.concatenate(env.received, axis=1))
    assert received[0].shape == (3, 12, 2)
    assert received[0].any()
    np.testing.assert_array_equal(received[0], received[1])


@pytest.mark.parametrize(("alpha", "differs"), [(0.0, False), (0.5, True)])
def test_a_goal_is_an_image_unless_alpha_says_otherwise(
    setting: EvalContext, tiny_plan: PlanOptions, alpha: float, differs: bool
) -> None:
    options = replace(tiny_plan, alpha=alpha)
    goal = torch.randn(2, *setting.store.card.frame_shape)
    seen, here = torch.randn(2, 1, *setting.store.card.frame_shape), torch.zeros(2, 1, 4)
    actions = torch.rand(2, 8, 2, 10) * 2 - 1
    costs = [
        setting.make_mpc(options, goal, np.full((2, 4), proprio, np.float32)).cost_of(seen, here)(actions)
        for proprio in (0, 1)
    ]
    assert torch.equal(*costs) != differs


def test_gradients_leave_nothing_on_the_model(run_path: Path, tiny_plan: PlanOptions) -> None:
    options = replace(tiny_plan, solver="gd", search=QUICK["gd"])
    setting = EvalContext(run_path, options)
    run_episodes(setting, options, range(2))
    assert all(parameter.grad is None for parameter in setting.model.parameters())


@pytest.fixture(scope="module")
def other_weights(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("encoders") / "other.safetensors"
    save_file({name: value + 0.3 * torch.randn_like(value) for name, value in load_file(tcn_weights).items()}, path)
    return path


def test_live_encoding_reproduces_the_store(store: TokenStore, encoder: Encoder) -> None:
    drift = live_drift(store, encoder)
    assert 0.999 < drift["cosine"] <= 1 + 1e-6
    assert 0 <= drift["relative_error"] < 0.05


def test_an_encoder_with_other_weights_is_noticed_by_what_it_computes(store: TokenStore, other_weights: Path) -> None:
    other = encoders.create("tcn", weights=other_weights, device="cpu")
    with pytest.raises(UserError, match=r"smallest cosine [-\d.]+, allowed 0\.999"):
        live_drift(store, other)


def test_a_store_with_other_tokens_is_noticed_by_what_it_holds(
    store: TokenStore, store_path: Path, encoder: Encoder, tmp_path: Path
) -> None:
    copy = copytree(store_path, tmp_path / "store.zarr")
    tokens = store.gather(np.arange(64))
    # The right tokens at the wrong frames, as after a shift of the step table.
    StoreWriter.resume(copy, store.identity).write_shard(0, np.roll(tokens, 20, axis=0))
    with pytest.raises(UserError, match="encoding cached frames live"):
        live_drift(TokenStore.open(copy), encoder)


def test_other_weights_are_refused_by_name(run_path: Path, tiny_plan: PlanOptions, other_weights: Path) -> None:
    with pytest.raises(UserError, match=r"weights_sha256.*pass the right --weights"):
        EvalContext(run_path, tiny_plan, weights=other_weights)


def test_weights_and_store_may_have_moved(
    run_path: Path, store_path: Path, tcn_weights: Path, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    weights = tmp_path / "moved.safetensors"
    weights.write_bytes(tcn_weights.read_bytes())
    cache = copytree(store_path, tmp_path / "moved.zarr")
    setting = EvalContext(run_path, tiny_plan, weights=weights, cache=cache)
    assert setting.store.path == cache
    assert setting.drift["cosine"] > 0.999


def rewritten(run: Path, to: Path, **changed: Any) -> Path:
    copy = copytree(run, to, symlinks=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changed))
    return copy


def test_a_store_that_is_gone_is_named(run_path: Path, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    run = rewritten(run_path, tmp_path / "run", cache=str(tmp_path / "gone.zarr"))
    with pytest.raises(UserError, match=r"gone\.zarr, the store of .*--cache") as refusal:
        EvalContext(run, tiny_plan)
    assert "extract" not in str(refusal.value)
    with pytest.raises(UserError, match=r"lost\.zarr, the store of .*--cache"):
        EvalContext(run, tiny_plan, cache=tmp_path / "lost.zarr")


def test_weights_that_are_gone_are_named(run_path: Path, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    run = copytree(run_path, tmp_path / "run", symlinks=True)
    saved = json.loads((run / "identity.json").read_text())
    saved["card"]["encoder"]["weights"] = str(tmp_path / "gone.safetensors")
    (run / "identity.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"gone\.safetensors.*--weights") as refusal:
        EvalContext(run, tiny_plan)
    assert "fit" not in str(refusal.value)


def test_a_run_of_a_model_that_is_not_registered_is_not_to_be_trained_again(
    run_path: Path, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    run = rewritten(run_path, tmp_path / "run", model="my-own")
    with pytest.raises(UserError, match=r"no world model .my-own.") as refusal:
        EvalContext(run, tiny_plan)
    assert "train again" not in str(refusal.value)


def test_the_store_of_another_run_is_refused_by_name(
    run_path: Path, store: TokenStore, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    columns = {"action": store.action, "state": store.state, "episode": store.episode, "step": store.step}
    identity = replace(store.identity, dataset_fingerprint="another")
    writer = StoreWriter.create(tmp_path / "other.zarr", store.card, identity, columns)
    for shard in range(store.card.num_shards):
        writer.write_shard(shard, store.gather(np.array(store.card.shard_frames(shard))))
    writer.finish()
    with pytest.raises(UserError, match=r"dataset_fingerprint.*pass the right --cache"):
        EvalContext(run_path, tiny_plan, cache=writer.path)


@pytest.mark.parametrize("file", ["config.json", "identity.json"])
@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["none", "cut", "other"])
def test_a_folder_that_is_no_run_is_refused(
    run_path: Path, tiny_plan: PlanOptions, tmp_path: Path, file: str, content: str | None
) -> None:
    run = copytree(run_path, tmp_path / "run", symlinks=True)
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        EvalContext(run, tiny_plan)


def bad_options() -> Iterator[tuple[str, Any]]:
    for name, value in asdict(PlanOptions()).items():
        if isinstance(value, int | float) and name not in ("seed", "alpha", "mask", "strict"):
            yield name, 0
            yield name, -1
    for name in ("context", "observed", "goal_steps"):
        yield name, 0
        yield name, -1
    yield "alpha", -1
    yield "alpha", float("nan")
    yield "threshold", float("nan")
    yield "execute", 6
    yield "objective", "first"
    yield "distance", "far"
    yield "proprio", "some"
    yield "solver", "guess"
    for name, wrong in (("elites", 1), ("elites", 65), ("sigma", float("nan")), ("sample", 3)):
        yield name, {name: wrong}
    yield "device", "abacus"
    yield "dtype", "float8"


@pytest.mark.parametrize(("name", "value"), list(bad_options()))
def test_options_that_make_no_sense_are_refused_by_name(run_path: Path, name: str, value: Any) -> None:
    changed = {"search": value} if isinstance(value, dict) else {name: value}
    with pytest.raises(UserError, match=name.replace("_", ".")) as refusal:
        EvalContext(run_path, replace(PlanOptions(device="cpu"), **changed))
    assert "\n" not in str(refusal.value)


OTHER_VALUES: dict[str, list[Any]] = {
    "episodes": [5, 500],
    "budget": [5, 1000],
    "threshold": [0.3, 0.31],
    "goals": ["dataset", "random-action"],
    "goal_steps": [3, 30],
    "strict": [True, False],
    "horizon": [7, 70],
    "execute": [2, 3],
    "objective": ["last", "all"],
    "distance": ["graph"],
    "alpha": [0.1, 1.0],
    "mask": [True],
    "proprio": ["none"],
    "context": [2, 4],
    "observed": [2, 3],
    "solver": ["gd", "icem", "mppi"],
    "batch": [1, 10],
    "seed": [1, 10],
    "env": ["Medium", "Large", "wmcache/PointMaze-Large-v0"],
    "device": ["cpu", "cuda", "cuda:1"],
    "dtype": ["float32", "bfloat16"],
}


def options_by(protocol: str | None, changed: dict[str, Any]) -> PlanOptions:
    """The settings of a protocol, and what is given beside it."""
    known = PROTOCOLS.get(protocol or "", {})
    own = {name: value for name, value in known.items() if name in asdict(PlanOptions())}
    search = {name: value for name, value in known.items() if name not in own}
    options = replace(PlanOptions(), **{**own, "search": search})
    return replace(options, **{**changed, "search": {**search, **changed.get("search", {})}})


def test_every_setting_is_tried() -> None:
    assert set(OTHER_VALUES) == set(asdict(PlanOptions())) - {"search"}


class TestDefaultFolders:
    @pytest.mark.parametrize(
        ("protocol", "changed", "name"),
        [
            (None, {}, "plan-all-x1-50x100"),
            (None, {"objective": "last", "execute": 5}, "plan-last-x5-50x100"),
            ("dino-wm", {}, "plan-dino-wm-50x100"),
            (None, {"solver": "gd"}, "plan-all-x1-gd-50x100"),
            (None, {"distance": "graph"}, "plan-all-x1-graph-50x100"),
            (None, {"goals": "dataset"}, "plan-all-x1-dataset-50x100"),
            (None, {"env": "Medium"}, "plan-all-x1-50x100-Medium"),
            (None, {"env": "wmcache/PointMaze-Medium-v0"}, "plan-all-x1-50x100-PointMaze-Medium-v0"),
            ("dino-wm", {"solver": "icem", "distance": "graph", "episodes": 8}, "plan-dino-wm-icem-graph-8x100"),
            (None, {"search": {"samples": 32}}, "plan-all-x1-samples32-50x100"),
            (None, {"search": {"samples": 32, "optimiser": "adam"}}, "plan-all-x1-samples32-optimiser-adam-50x100"),
            (None, {"strict": False}, "plan-all-x1-no-strict-50x100"),
            ("dino-wm", {"strict": True}, "plan-dino-wm-strict-50x100"),
            ("dino-wm", {"execute": 2, "objective": "all"}, "plan-dino-wm-x2-all-50x100"),
            ("mpc-100", {}, "plan-mpc-100-50x100"),
            (None, {"horizon": 6, "seed": 50, "threshold": 1.0}, "plan-all-x1-threshold1.0-horizon6-seed50-50x100"),
            (None, {"device": "cuda:1"}, "plan-all-x1-device-cuda1-50x100"),
        ],
    )
    def test_each_kind_of_evaluation_has_its_own(
        self, protocol: str | None, changed: dict[str, Any], name: str
    ) -> None:
        assert default_out(Path("run"), protocol, options_by(protocol, changed)) == Path("run") / name

    def test_no_two_evaluations_share_one(self) -> None:
        changes: list[dict[str, Any]] = [
            {},
            *({name: value} for name, values in OTHER_VALUES.items() for value in values),
            *(
                {"search": {name: value}}
                for name, value in (("samples", 32), ("samples", 320), ("steps", 7), ("lr", 0.7))
            ),
            {"goals": "a/far.parquet"},
            {"goals": "b/far.parquet"},
            {"goals": "far"},
            {"env": "a/Spiral.txt"},
            {"env": "b/Spiral.txt"},
            {"horizon": 7, "seed": 5},
            {"horizon": 75},
        ]
        for protocol in (None, *PROTOCOLS):
            usual = options_by(protocol, {})
            different = [options for change in changes if (options := options_by(protocol, change)) != usual]
            names = {default_out(Path("run"), protocol, options).name for options in (usual, *different)}
            assert len(names) == 1 + len(different)
            assert max(map(len, names)) < 100

    def test_a_name_of_very_many_settings_stays_a_name(self) -> None:
        options = replace(PlanOptions(), **{name: values[0] for name, values in OTHER_VALUES.items()})
        other = replace(options, env="Large")
        names = [default_out(Path("run"), None, known).name for known in (options, other)]
        assert len(set(names)) == 2
        assert max(map(len, names)) < 150


@pytest.fixture(scope="module")
def mazeless(store: TokenStore, train_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a store of frames of which nobody knows in what maze they were taken, as imported ones are."""
    folder = tmp_path_factory.mktemp("mazeless")
    card = replace(store.card, dataset={**store.card.dataset, "maze": []})
    columns = {"action": store.action, "state": store.state, "episode": store.episode, "step": store.step}
    writer = StoreWriter.create(folder / "store.zarr", card, store.identity, columns)
    for shard in range(card.num_shards):
        writer.write_shard(shard, store.gather(np.array(card.shard_frames(shard))))
    writer.finish()
    return train_run(folder / "store.zarr")


@pytest.mark.parametrize("env", [None, "UMaze"])
def test_a_run_on_frames_of_no_known_maze_is_refused(mazeless: Path, tiny_plan: PlanOptions, env: str | None) -> None:
    with pytest.raises(UserError, match="no known maze") as refusal:
        EvalContext(mazeless, replace(tiny_plan, env=env))
    assert "\n" not in str(refusal.value)
