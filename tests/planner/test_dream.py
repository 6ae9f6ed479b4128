"""Episodes that a world model imagines: alone and in batches, as a gymnasium environment, and by the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders.vae import VaeOptions
from wmcache.pipeline.extract import extract
from wmcache.pipeline.fit import fit
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.controllers.options import ControllerOptions
from wmcache.planner.controllers.train import train_controller
from wmcache.planner.dream import Dream
from wmcache.planner.dream_env import ENV_ID
from wmcache.trainer.decoder import train_decoder
from wmcache.trainer.options import DecoderOptions, TrainOptions
from wmcache.trainer.train import train

TrainRun = Callable[..., Path]
TINY = TrainOptions(
    model="mdn-rnn",
    model_options={"hidden": 16, "mixtures": 2, "sequence": 5, "temperature": 1.0},
    batch=16,
    dtype="float32",
    device="cpu",
)
CHECKED = pytest.mark.filterwarnings("ignore:.*infinity", "ignore:.*we recommend using a symmetric")


def train_tiny(cache: Path, out: Path, **changes: object) -> Path:
    train(cache, out, TrainOptions(**{**vars(TINY), **changes}))
    return out


@pytest.fixture(scope="module")
def dots_run(user_package: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a dot that ends its episode at the right edge; its encoder has a decoder."""
    folder = tmp_path_factory.mktemp("dots")
    collect(f"{user_package}:Dots-v0", folder / "frames", episodes=150, length=20, image_size=16, policy="held")
    frames = FrameDataset.open(folder / "frames")
    options = VaeOptions(steps=10, batch=8, latent=4)
    weights = fit(frames, "vae", folder / "vae.safetensors", options, max_frames=200, device="cpu").weights
    extract(frames, encoders.create("vae", weights=weights, device="cpu"), folder / "vae.zarr")
    return train_tiny(folder / "vae.zarr", folder / "run", frameskip=1, steps=400, learning_rate=1e-2)


@pytest.fixture(scope="module")
def cart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of discrete actions, and a reward of 1 in every env step."""
    pytest.importorskip("pygame")
    folder = tmp_path_factory.mktemp("cart")
    collect("gym:CartPole-v1", folder / "frames", episodes=6, length=40, image_size=32)
    extract(FrameDataset.open(folder / "frames"), encoders.create("pixels", device="cpu"), folder / "pixels.zarr")
    return train_tiny(folder / "pixels.zarr", folder / "run", frameskip=2, steps=5)


@pytest.fixture(scope="module")
def maze_run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without reward and ends."""
    return train_tiny(store_path, tmp_path_factory.mktemp("maze") / "run", frameskip=5, steps=5)


@pytest.fixture(scope="module")
def proprio_run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an ensemble that imagines proprio alone."""
    options = {"tokens": "none", "hidden": 16, "ensemble": 2, "forecast": 3, "temperature": 1.0}
    out = tmp_path_factory.mktemp("proprio") / "run"
    return train_tiny(store_path, out, model="rwm", model_options=options, frameskip=5, steps=5)


@pytest.fixture
def each_run(request: pytest.FixtureRequest) -> Path:
    run: Path = request.getfixturevalue(request.param)
    return run


every_run = pytest.mark.parametrize("each_run", ["dots_run", "cart_run", "maze_run", "proprio_run"], indirect=True)


def actions_of(dream: Dream, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    shape = (dream.length, dream.frameskip)
    if dream.action.discrete:
        values = np.eye(dream.action.width)[rng.integers(dream.action.width, size=shape)]
    else:
        values = rng.uniform(dream.action.low, dream.action.high, (*shape, dream.action.width))
    return torch.from_numpy(values.reshape(dream.length, -1)).float()


def watch(dream: Dream, seeds: list[int]) -> list[Tensor]:
    """Return latents, rewards, ends and each of the features of episodes, [steps, E, ...]."""
    actions = torch.stack([actions_of(dream, seed) for seed in seeds], 1)
    dream.reset(seeds, goals=dream.needs_goals)
    found = []
    for action in actions:
        features, reward, ended = dream.step(action)
        found.append((dream.latents, reward, ended, *features.values()))
    return [torch.stack(values) for values in zip(*found, strict=True)]


@every_run
def test_an_episode_depends_on_its_seed_alone(each_run: Path) -> None:
    dream = Dream(each_run)
    seeds = list(range(70))
    together = watch(dream, seeds)
    for seed in (3, 69):
        for one, all_of_them in zip(watch(dream, [seed]), together, strict=True):
            assert torch.equal(one[:, 0], all_of_them[:, seed])
    frames = together[3]
    assert len({tuple(row.tolist()) for row in frames[-1]}) == len(seeds)
    still = watch(Dream(each_run, temperature=0.0), [3])
    assert not torch.equal(still[3], frames[:, 3:4])
    assert torch.isfinite(frames).all()


def test_an_episode_ends_where_the_model_imagines_its_end_and_then_stays(dots_run: Path) -> None:
    dream = Dream(dots_run, temperature=0.0, split="all")
    seeds = range(20)
    right, left = (torch.tensor([[speed, 0.0]]).expand(len(seeds), -1) for speed in (2.0, -2.0))
    dream.reset(seeds)
    for _ in range(dream.length):
        *_, ended = dream.step(left)
    at_left = ended.float().mean()
    features = dream.reset(seeds)
    ended, frozen = torch.zeros(len(seeds), dtype=torch.bool), dream.latents
    lengths = torch.zeros(len(seeds))
    for _ in range(dream.length):
        before, kept = ended, features
        features, reward, ended = dream.step(right)
        lengths += ~before
        assert (ended | ~before).all()
        for name, values in features.items():
            assert torch.equal(values[before], kept[name][before])
        assert torch.equal(dream.latents[before], frozen[before])
        assert (reward[before] == 0).all()
        assert (reward[~before] != 0).all()
        frozen = dream.latents
    # How many end depends on the training, and with it on the processor.
    assert ended.float().mean() > at_left + 0.2
    assert 2 < lengths.mean() < dream.length


def test_a_reward_that_never_changes_is_not_imagined(cart_run: Path) -> None:
    dream = Dream(cart_run)
    dream.reset(range(3))
    _, reward, _ = dream.step(torch.tensor([[1.0, 0.0, 0.0, 1.0]]).expand(3, -1))
    assert reward.tolist() == [2.0] * 3  # of two env steps


def test_without_rewards_and_ends_a_dream_has_goals(maze_run: Path) -> None:
    dream = Dream(maze_run)
    assert dream.needs_goals
    features = dream.reset(range(4), goals=True)
    train_starts = np.searchsorted(dream.store.episode, dream.store.split("train"))
    assert set(dream.starts) <= set(train_starts)
    seen = torch.from_numpy(dream.store.gather(dream.store.frames_of("train"))).float()
    assert all((seen == goal).flatten(1).all(1).any() for goal in dream.goal_latents)
    goal, std = dream.goal_latents, dream.model.tokens_std
    torch.testing.assert_close(features["goal"], ((goal - dream.model.tokens_mean) / std).flatten(1))
    _, reward, ended = dream.step(torch.zeros(4, 10))
    torch.testing.assert_close(reward, -(dream.latents - goal).square().mean((1, 2)))
    assert not ended.any()
    before = dream.starts
    dream.reset(range(4))
    np.testing.assert_array_equal(dream.starts, before)
    _, reward, _ = dream.step(torch.zeros(4, 10))
    assert not reward.any()


@CHECKED
@every_run
def test_it_is_a_gymnasium_environment(each_run: Path) -> None:
    env = gym.make(ENV_ID, run=str(each_run))
    check_env(env.unwrapped, skip_render_check=True)
    dream = Dream(each_run)
    expected = dream.reset([7], goals=dream.needs_goals)
    seen, _ = env.reset(seed=7)
    action = env.action_space.sample()
    truncated = False
    for step in range(1, dream.length + 1):
        for name, values in expected.items():
            np.testing.assert_array_equal(seen[name], values[0])
        assert not truncated
        seen, reward, ended, truncated, _ = env.step(action)
        width = dream.action.width
        one = torch.eye(width)[int(action)] if dream.action.discrete else torch.from_numpy(action)
        expected, known, stops = dream.step(one.repeat(dream.frameskip)[None])
        assert (reward, ended, truncated) == (float(known[0]), bool(stops[0]), step == dream.length)
        if ended:
            break


@every_run
def test_many_episodes_at_once_start_again_by_themselves(each_run: Path) -> None:
    envs = gym.make_vec(ENV_ID, num_envs=3, run=str(each_run))
    dream = Dream(each_run)
    seen, _ = envs.reset(seed=5)
    expected = dream.reset([5, 6, 7], goals=dream.needs_goals)
    alone = [dream.reset([seed], goals=dream.needs_goals) for seed in (5, 6, 7)]
    for name, values in expected.items():
        np.testing.assert_array_equal(seen[name], values)
        np.testing.assert_array_equal(seen[name], torch.cat([one[name] for one in alone]))
    begun = 0
    over = np.zeros(3, bool)
    rngs = [np.random.default_rng(seed) for seed in (5, 6, 7)]
    envs.action_space.seed(0)
    for _ in range(2 * dream.length + 2):
        seen, reward, ended, truncated, _ = envs.step(envs.action_space.sample())
        assert not reward[over].any()
        assert not ended[over].any()
        for row in np.flatnonzero(
            over
        ):  # the first frame of another episode, whose seed is the next of its own generator
            first = dream.reset([int(rngs[row].integers(2**31))], goals=dream.needs_goals)
            for name, values in first.items():
                np.testing.assert_array_equal(seen[name][row], values[0])
            begun += 1
        over = ended | truncated
    assert begun >= 3
    envs.close()


def test_an_episode_is_truncated_at_another_length(maze_run: Path) -> None:
    env = gym.make(ENV_ID, run=str(maze_run), length=2)
    env.reset(seed=7)
    assert [env.step(env.action_space.sample())[3] for _ in range(2)] == [False, True]


@CHECKED
def test_frames_are_drawn_by_the_decoder_of_the_encoder(dots_run: Path, maze_run: Path) -> None:
    env = gym.make(ENV_ID, run=str(dots_run), render_mode="rgb_array")
    check_env(env.unwrapped)
    assert env.metadata["render_fps"] == 12
    env.reset(seed=0)
    frame = env.render()
    assert isinstance(frame, np.ndarray)
    assert (frame.dtype, frame.shape) == (np.uint8, (64, 64, 3))
    env.step(env.action_space.sample())
    assert not np.array_equal(frame, env.render())
    with pytest.raises(UserError, match="--decoder"):
        gym.make(ENV_ID, run=str(maze_run), render_mode="rgb_array")


def test_imagination_is_drawn_by_it_too(dots_run: Path, maze_run: Path, tmp_path: Path) -> None:
    flags = ("--steps", "1", "--device", "cpu", "--no-lpips")
    run = ("imagine", "--run", str(dots_run), "--windows", "10000", "--out", str(tmp_path), "--json")
    result = CliRunner().invoke(main, [*run, *flags])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["steps"]
    store, frames = TokenStore.open(dots_run.parent / "vae.zarr"), FrameDataset.open(dots_run.parent / "frames")
    windows = store.windows(1, 1, 1, "val")
    rows = windows.frames(np.arange(len(windows)))
    encoder = encoders.create("vae", weights=dots_run.parent / "vae.safetensors", device="cpu")
    real = frames.read_frames(rows[:, 1]).astype(float)
    drawn = resize(encoder.decode(torch.from_numpy(store.gather(rows[:, 1]).astype(np.float32))), real.shape[1])
    mean = frames.read_frames(np.unique(rows)).astype(float).mean(0)
    assert found["floor"]["mse"] / found["mean_frame"]["mse"] == pytest.approx(
        np.square(drawn - real).mean() / np.square(mean - real).mean(), rel=1e-2
    )
    assert (tmp_path / "rollouts.png").exists()
    refused = CliRunner().invoke(main, ["imagine", "--run", str(maze_run), *flags])
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "wmtrain decoder" in refused.stderr


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """[B, H, W, 3] -> [B, size, size, 3]."""
    drawn = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    found = torch.nn.functional.interpolate(drawn, (size, size), mode="bilinear", antialias=True)
    return found.permute(0, 2, 3, 1).double().numpy()


def test_a_model_of_proprio_alone_reaches_for_the_goals_proprio(proprio_run: Path) -> None:
    dream = Dream(proprio_run)
    goal = dream.reset(range(4), goals=True)["goal"]
    features, reward, _ = dream.step(torch.zeros(4, 10))
    torch.testing.assert_close(reward, -(features["latent"] - goal).square().mean(1))
    with pytest.raises(UserError, match="--pictured 0"):
        gym.make(ENV_ID, run=str(proprio_run), render_mode="rgb_array")


def test_the_command_plays_draws_and_counts(dots_run: Path, tmp_path: Path) -> None:
    words = f"dream --run {dots_run} --episodes 12 --temperature 0.5 --split all --device cpu --out {tmp_path} --json"
    done = CliRunner().invoke(main, words.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "dream.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == {"dream.json", "dream.mp4", "dream.png"}
    assert found["options"]["temperature"] == 0.5
    assert found["steps"]["ci95"][0] <= found["steps"]["mean"] <= found["steps"]["ci95"][1]
    assert found["most_steps"] == Dream(dots_run).length >= found["steps"]["highest"]
    assert found["ended"]["share"] == found["ended"]["episodes"] / 12
    assert found["return"]["lowest"] < found["return"]["mean"] < found["return"]["highest"]
    again = CliRunner().invoke(main, [*words.split(), "--pictured", "0"], catch_exceptions=False)
    assert json.loads(again.stdout)["return"] == found["return"]


def test_a_controller_acts_in_dreams(dots_run: Path, maze_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "controller"
    options = ControllerOptions(generations=6, population=12, rollouts=4, sigma=1.0, check_every=0, device="cpu")
    train_controller(dots_run, options, folder)
    found = {}
    for policy in ("random", str(folder)):
        words = f"dream --run {dots_run} --policy {policy} --episodes 20 --pictured 0 --device cpu --json --out"
        done = CliRunner().invoke(main, [*words.split(), str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        found[policy] = json.loads(done.stdout)["return"]["mean"]
    assert found[str(folder)] > found["random"]
    for run, policy in ((maze_run, str(folder)), (dots_run, "mpc")):
        refused = CliRunner().invoke(main, ["dream", "--run", str(run), "--policy", policy, "--pictured", "0"])
        assert refused.exit_code == 1
        assert policy in refused.output


def test_a_decoder_that_is_trained_on_the_store_draws_too(
    maze_run: Path, store_path: Path, dataset: FrameDataset, tmp_path: Path
) -> None:
    decoder = tmp_path / "decoder"
    sizes = {"channels": 8, "residual": 4, "blocks": 1}
    options = DecoderOptions(
        decoder="vqvae", decoder_options=sizes, steps=2, batch=4, max_frames=40, device="cpu", lpips=False
    )
    train_decoder(store_path, dataset, decoder, options)
    words = f"dream --run {maze_run} --episodes 2 --steps 3 --device cpu --out {tmp_path / 'out'}"
    done = CliRunner().invoke(main, [*words.split(), "--decoder", str(decoder)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "dream.mp4").exists()
    refused = CliRunner().invoke(main, words.split())
    assert refused.exit_code == 1
    assert "--decoder" in refused.output


def test_a_model_that_cannot_be_stepped_is_refused(store_path: Path, train_run: TrainRun) -> None:
    with pytest.raises(UserError, match="dino-wm"):
        Dream(train_run(store_path))
