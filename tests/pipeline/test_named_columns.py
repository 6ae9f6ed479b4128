"""Stores with other columns than those of PointMaze, from the frame dataset to a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from upath import UPath

from wmcache.cache import TokenStore
from wmcache.cache.verify import verify
from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.pipeline import encoders
from wmcache.pipeline.derive import derive_change_maps
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import DatasetCard, FrameDataset, FrameDatasetWriter, write_shard
from wmcache.pipeline.probe import probe
from wmcache.pipeline.repair import repair
from wmcache.pipeline.steps import Steps
from wmcache.trainer.feed import Feed
from wmcache.trainer.models import rollout
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import train

LENGTHS = (22, 3, 20, 9, 16)
FRAMES = sum(LENGTHS)
ACTION = Column(("action",), "float32", (3,), (-2.0, 0.0, -1.0), (2.0, 1.0, 1.0))
RICH = {
    "push": ACTION,
    "turn": Column(("action",), "float64"),
    "velocity": Column(("proprio",), "float32", (2,)),
    "angle": Column(("proprio",), "float64"),
    "grid": Column(("state",), "int32", (2, 2)),
    "reward": Column(("reward",), "float64"),
    "terminated": Column(("terminated",), "bool"),
    "lives": Column(("extra",), "uint8"),
}
CPU = torch.device("cpu")
SMALL = {"width": 8, "depth": 1, "heads": 2, "dropout": 0.0}
LOCATOR = {"locator_width": 12, "locator_depth": 1, "locator_mlp": 16, "labels": "features"}
SIZES: dict[str, dict[str, Any]] = {
    "dino-wm": SMALL,
    "ddp-wm": {**SMALL, **LOCATOR},
    "mdn-rnn": {"hidden": 8, "sequence": 3},
    "rssm": {"deter": 8, "hidden": 8, "sequence": 3},
    "rwm": {"hidden": 8, "head": 8, "observed_steps": 1, "forecast": 2},
    "vjepa2-ac": {**SMALL, "width": 16},
}


def make_store(folder: Path, described: dict[str, Column]) -> Path:
    """Write a frame dataset of uneven episodes that end, and its store of pixels."""
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(len(LENGTHS), dtype=np.int32), LENGTHS)
    step = np.concatenate([np.arange(length, dtype=np.int32) for length in LENGTHS])
    columns = {
        name: rng.integers(0, 9, (FRAMES, *column.shape)).astype(column.dtype) for name, column in described.items()
    }
    if "terminated" in columns:
        columns["terminated"] = np.append(np.diff(episode) > 0, True)
    steps, path = Steps(episode, step, columns, described), folder / "frames"
    card = DatasetCard("frames", "made-up", [], 16, "random", 0, len(LENGTHS), FRAMES, 25, 10)
    writer, images = FrameDatasetWriter(path, card, steps), rng.integers(0, 256, (FRAMES, 16, 16, 3)).astype(np.uint8)
    for shard in writer.pending():
        write_shard(path, shard, [(steps.key(frame), images[frame]) for frame in card.shard_frames(shard)])
    writer.finish()
    out = folder / "pixels-16.zarr"
    extract(FrameDataset.open(path), encoders.create("pixels", image_size=16, device="cpu"), out)
    return out


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("rich"), RICH)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with actions alone."""
    return make_store(tmp_path_factory.mktemp("bare"), {"push": ACTION})


def options(model: str, **changes: Any) -> TrainOptions:
    known = {"frameskip": 2, "history": 2, "batch": 4, "steps": 4, "dtype": "float32", "device": "cpu"}
    return TrainOptions(
        **{**known, "log_every": 1, "validate_every": 4, "model": model, "model_options": SIZES[model], **changes}
    )


def test_a_store_has_the_columns_of_its_dataset_by_name_and_by_role(rich: Path) -> None:
    store, steps = TokenStore.open(rich), FrameDataset.open(rich.parent / "frames").steps
    assert store.columns == RICH
    for name, values in steps.store_columns().items():
        np.testing.assert_array_equal(store.column(name), values)
        assert store.column(name).dtype == values.dtype
    pushed, turned, given = (steps.columns[name] for name in ("push", "turn", "angle"))
    np.testing.assert_array_equal(store.action, np.column_stack([pushed, turned]).astype(np.float32))
    np.testing.assert_array_equal(store.proprio, np.column_stack([given, steps.columns["velocity"]]))
    assert store.action.dtype == store.proprio.dtype == store.reward.dtype == np.float32
    np.testing.assert_array_equal(store.state, steps.columns["grid"].reshape(FRAMES, 4))
    np.testing.assert_array_equal(store.reward, steps.columns["reward"])
    np.testing.assert_array_equal(store.terminated, steps.columns["terminated"])
    assert store.truncated is None
    np.testing.assert_array_equal(store.bounds, np.float32([[-2, 0, -1, turned.min()], [2, 1, 1, turned.max()]]))
    with pytest.raises(KeyError):
        store.column("sha256")


def test_xarray_names_the_dimensions_of_every_column(rich: Path) -> None:
    found = xr.open_zarr(rich)  # any warning fails a test
    assert found.push.dims == ("frame", "push_dim")
    assert found.grid.dims == ("frame", "grid_dim_0", "grid_dim_1")
    assert found.reward.dims == found.terminated.dims == ("frame",)
    assert found.tokens.dims == ("frame", "token", "channel")


def test_a_lost_column_is_written_again_by_a_repair(rich: Path, tmp_path: Path) -> None:
    folder = make_store(tmp_path, RICH)
    (folder / "grid" / "zarr.json").write_text("{")
    (folder / "lives" / "c" / "0").unlink()
    assert not verify(folder).sound
    repair(folder, device="cpu")
    assert verify(folder).sound
    np.testing.assert_array_equal(TokenStore.open(folder).column("grid"), TokenStore.open(rich).column("grid"))


def test_rewards_and_ends_of_windows_are_those_of_env_steps_that_were_taken(rich: Path, tmp_path: Path) -> None:
    # The last row of an episode is that of an env step only where it ended the episode.
    store, last = TokenStore.open(rich), np.cumsum(LENGTHS) - 1
    assert {*last[np.array(LENGTHS) >= 6]} <= {*(store.windows(1, 1, 3, measured=True).starts + 5)}
    path = make_store(tmp_path, {name: column for name, column in RICH.items() if name != "terminated"})
    unended = TokenStore.open(path).windows(1, 1, 3, measured=True)
    assert not {*last} & {*(unended.starts + 5)}
    assert {*(last - 1)[np.array(LENGTHS) >= 7]} <= {*(unended.starts + 5)}


def test_int8_stores_change_maps_and_object_stores_have_the_columns(rich: Path, tmp_path: Path, bucket: UPath) -> None:
    dataset, whole = FrameDataset.open(rich.parent / "frames"), TokenStore.open(rich)
    pixels = encoders.create("pixels", image_size=16, device="cpu")
    extract(dataset, pixels, bucket / "pixels.zarr", dtype="int8")
    maps = derive_change_maps(whole, 2)
    for store in (TokenStore.open(bucket / "pixels.zarr"), TokenStore.open(maps)):
        assert store.columns == RICH
        for name in RICH:
            np.testing.assert_array_equal(store.column(name), whole.column(name))


def test_a_column_of_another_shape_than_the_card_says_is_refused(tmp_path: Path) -> None:
    folder = make_store(tmp_path, {"push": ACTION})
    other = make_store(tmp_path / "other", {"push": Column(("action",), "float64", (3,))})
    (folder / "push" / "zarr.json").write_bytes((other / "push" / "zarr.json").read_bytes())
    with pytest.raises(UserError, match="push"):
        TokenStore.open(folder)


@pytest.mark.parametrize("residence", ["disk", "ram"])
def test_batches_have_the_reward_and_the_end_of_the_env_steps_between_frames(rich: Path, residence: str) -> None:
    store = TokenStore.open(rich)
    windows = store.windows(history=2, predict=1, frameskip=3)
    assert windows.dropped_episodes == 1
    assert len(windows) == sum(max(0, length - 9 + 1) for length in LENGTHS)
    with Feed(store, windows, 6, 0, CPU, residence=residence) as feed:
        batch = feed.next()
    assert batch["reward"].shape == batch["terminated"].shape == (6, 3)
    every = windows.batch(np.arange(len(windows)))
    for number, start in enumerate(windows.starts):
        for t in range(3):
            steps = slice(start + 3 * t, start + 3 * t + 3)
            assert every["reward"][number, t] == store.reward[steps].sum()
            assert every["terminated"][number, t] == store.terminated[steps].any()
    ends = np.cumsum(LENGTHS)
    assert every["terminated"].sum() == sum(start + 9 in ends for start in windows.starts)
    assert every["reward"].dtype == np.float32


def test_whole_episodes_have_their_end_at_each_phase_of_the_frameskip(rich: Path) -> None:
    store = TokenStore.open(rich)
    windows = store.windows(history=31, predict=1, frameskip=3, whole=True)
    batch = windows.batch(np.arange(len(windows)))
    assert windows.lengths is not None
    # The episode of 3 frames is too short for two frames.
    assert len(windows) == 3 * (len(LENGTHS) - 1) == batch["terminated"].any(1).sum()
    for number, (start, length) in enumerate(zip(windows.starts, windows.lengths, strict=True)):
        end = np.cumsum(LENGTHS)[store.episode[start]]
        assert start + 3 * (length - 1) < end <= start + 3 * length
        assert batch["terminated"][number, length - 1]
        last = np.arange(start + 3 * (length - 1), end)
        assert batch["reward"][number, length - 1] == store.reward[last].sum()
        repeated = np.concatenate([last, np.full(3 - len(last), end - 1)])
        np.testing.assert_array_equal(batch["action"][number, length - 1], store.action[repeated].ravel())


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("columns", ["rich", "bare"])
def test_a_model_trains_on_any_columns_and_resumes(
    columns: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cache, out = request.getfixturevalue(columns), tmp_path / "run"
    train(cache, out, options(model))
    shape = json.loads((out / "config.json").read_text())["shape"]
    rich = columns == "rich"
    assert (shape["proprio_dim"], shape["action_dim"]) == ((3, 8) if rich else (0, 6))
    assert (shape["has_reward"], shape["has_end"]) == (rich, rich)
    assert read_json(out / "config.json", "")["model_options"]["proprio"] == ("raw" if rich else "none")
    assert load_model(out, CPU).shape.proprio_dim == shape["proprio_dim"]
    train(cache, out, options(model, steps=6), resume=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == {"ddp-wm": 14}.get(model, 6)


@pytest.mark.parametrize("name", ["mdn-rnn", "rssm"])
def test_a_model_imagines_reward_and_whether_the_episode_goes_on(rich: Path, tmp_path: Path, name: str) -> None:
    train(rich, tmp_path / "run", options(name))
    windows = TokenStore.open(rich).windows(history=1, predict=2, frameskip=2)
    batch = {name: torch.from_numpy(value) for name, value in windows.batch(np.arange(4)).items()}
    model = load_model(tmp_path / "run", CPU)
    imagined = rollout(model, batch["tokens"][:, :1], batch["proprio"][:, :1], batch["action"])
    assert imagined.reward is not None
    assert imagined.continues is not None
    assert imagined.reward.shape == imagined.continues.shape == (4, 1, 3)
    assert ((imagined.continues > 0) & (imagined.continues < 1)).all()


def test_a_probe_without_a_state_has_the_figures_that_need_none(bare: Path) -> None:
    found = probe(bare)
    assert found.linear == found.mlp == {}
    assert (found.spearman, found.nearest) == (None, None)
    assert found.effective_rank > 1
