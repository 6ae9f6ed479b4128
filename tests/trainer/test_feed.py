"""The feed returns the batches of the order, from any residence, rank and first step."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from wmcache.cache import TokenStore
from wmcache.cache.change_maps import open_change_maps
from wmcache.cache.layout import shard_file
from wmcache.cache.windows import Goals, batch_windows, goal_draws
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer import feed as feeding
from wmcache.trainer.feed import RESIDENCES, Feed, choose_residence

Has = Callable[[int, int], None]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = [CPU, pytest.param(CUDA, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_slice_with_the_rows_of_extra_stores(ddp_store_path: Path, rank: int) -> None:
    store = TokenStore.open(ddp_store_path)
    changes = open_change_maps(store, 5)
    windows = store.windows(3, 1, 5, "train").with_extras({"changes": changes})
    with Feed(store, windows, 8, 3, CPU, first=2, rank=rank, world_size=2) as feed:
        for step in (2, 3):
            chosen = batch_windows(len(windows), 3, step, 8, rank, 2)
            batch = feed.next()
            expected = np.stack([changes.gather(frames) for frames in windows.frames(chosen)])
            assert expected.shape == (4, 4, 4, 4)
            np.testing.assert_array_equal(batch["changes"].numpy(), expected)
            np.testing.assert_array_equal(batch["tokens"].numpy(), windows.batch(chosen)["tokens"])


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("residence", RESIDENCES)
def test_ranks_draw_the_goals_of_the_step(store_path: Path, residence: str, device: torch.device) -> None:
    store = TokenStore.open(store_path)
    windows = store.windows(0, 1, 5, "train", goals=Goals(horizon=4))
    feeds = [Feed(store, windows, 8, 3, device, 2, residence, rank, 2) for rank in (0, 1)]
    for step in (2, 3):
        expected = windows.batch(batch_windows(len(windows), 3, step, 8), draws=goal_draws(3, step, 8))
        parts = [{name: value.cpu().clone() for name, value in feed.next().items()} for feed in feeds]
        for name, value in expected.items():
            np.testing.assert_array_equal(torch.cat([part[name] for part in parts]).numpy(), value)
    for feed in feeds:
        feed.__exit__()


@pytest.fixture(scope="module")
def paths(
    dataset: FrameDataset, encoder: Encoder, store_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same tokens in each dtype, 360 frames in shards of 64; read only."""
    narrow = tmp_path_factory.mktemp("int8") / "int8.zarr"
    extract(dataset, encoder, narrow, dtype="int8")
    return {"float16": store_path, "int8": narrow}


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("residence", RESIDENCES)
@pytest.mark.parametrize(("dtype", "first"), [("float16", 0), ("float16", 7), ("int8", 4)])
def test_batches_follow_the_order_from_any_residence(
    paths: dict[str, Path], dtype: str, first: int, residence: str, device: torch.device
) -> None:
    store, reference = TokenStore.open(paths[dtype]), TokenStore.open(paths[dtype]).windows(3, 1, 5, "train")
    windows = store.windows(3, 1, 5, "train")
    with Feed(store, windows, batch=32, seed=5, device=device, first=first, residence=residence) as feed:
        for step in range(first, first + 2 * len(windows) // 32):  # more than an epoch
            expected = reference.batch(batch_windows(len(windows), 5, step, 32))
            batch = feed.next()
            assert batch.keys() == expected.keys()
            for name, value in expected.items():
                assert batch[name].device.type == device.type
                assert batch[name].dtype == torch.from_numpy(value).dtype
                np.testing.assert_array_equal(batch[name].cpu().numpy(), value, err_msg=f"{name} of step {step}")


@pytest.mark.parametrize("residence", RESIDENCES)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_batch_is_not_changed_while_the_next_one_is_read(paths: dict[str, Path], dtype: str, residence: str) -> None:
    store = TokenStore.open(paths[dtype])
    windows = store.windows(3, 1, 5, "train")
    with Feed(store, windows, batch=8, seed=0, device=CPU, residence=residence) as feed:
        for _ in range(2):
            batch = feed.next()
        before = {name: value.clone() for name, value in batch.items()}
    # Leaving waits for the read of the batch after it.
    assert all(torch.equal(batch[name], value) for name, value in before.items())


@pytest.mark.parametrize("residence", ["ram", "device"])
def test_tokens_in_memory_are_not_read_from_disk(
    store_path: Path, store: TokenStore, tmp_path: Path, residence: str
) -> None:
    copy = Path(copytree(store_path, tmp_path / "store.zarr"))
    moved = TokenStore.open(copy)
    windows = moved.windows(3, 1, 5, "train")
    with Feed(moved, windows, batch=8, seed=0, device=CPU, residence=residence) as feed:
        feed.next()
        shutil.rmtree(copy / "tokens")
        for step in range(1, 5):
            expected = store.gather(windows.frames(batch_windows(len(windows), 0, step, 8)).ravel())
            np.testing.assert_array_equal(feed.next()["tokens"].numpy(), expected.reshape(8, 4, 4, 32))


@pytest.mark.parametrize("residence", RESIDENCES)
def test_damage_is_found_before_the_first_step_where_tokens_are_loaded_and_else_by_next(
    store_path: Path, tmp_path: Path, residence: str
) -> None:
    copy = Path(copytree(store_path, tmp_path / "store.zarr"))
    for shard in range(6):
        data = bytearray(shard_file(copy, shard).read_bytes())
        data[3] ^= 1
        shard_file(copy, shard).write_bytes(data)
    store, started = TokenStore.open(copy), []

    def read() -> None:
        with Feed(store, store.windows(3, 1, 5, "train"), 8, 0, CPU, residence=residence) as feed:
            started.append(feed)
            feed.next()

    with pytest.raises(UserError, match=r"frame \d+ "):
        read()
    assert bool(started) == (residence == "disk")


def test_waiting_time_is_counted(store: TokenStore) -> None:
    windows = store.windows(3, 1, 5, "train")
    with Feed(store, windows, batch=8, seed=0, device=CPU) as feed:
        assert feed.waited == 0
        feed.next()
        first = feed.waited
        feed.next()
        assert 0 < first < feed.waited


SIZE = 360 * 4 * 32 * 2
"""Bytes of the store's tokens."""


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Has:
    """Set the bytes that are free on the device and in main memory."""

    def measure(on_device: int, in_ram: int) -> None:
        monkeypatch.setattr(feeding, "free_memory", lambda device: on_device)
        monkeypatch.setattr(feeding, "available_ram", lambda: in_ram)

    return measure


@pytest.mark.parametrize(
    ("dtype", "device", "on_device", "in_ram", "sharing", "chosen"),
    [
        ("float16", CUDA, 2 * SIZE, 0, 1, "device"),
        ("float16", CUDA, 2 * SIZE - 1, 2 * SIZE, 1, "ram"),
        ("float16", CUDA, 2 * SIZE - 1, 2 * SIZE - 1, 1, "disk"),
        ("int8", CUDA, SIZE, 0, 1, "device"),
        # The memory of the CPU is main memory.
        ("float16", CPU, 100 * SIZE, 2 * SIZE, 1, "ram"),
        ("float16", CPU, 100 * SIZE, 2 * SIZE - 1, 1, "disk"),
        # Processes share main memory and have a device each.
        ("float16", CUDA, 2 * SIZE, 2 * SIZE, 2, "device"),
        ("float16", CPU, 2 * SIZE, 4 * SIZE, 2, "ram"),
    ],
)
def test_auto_takes_the_fastest_residence_with_room_to_spare(
    paths: dict[str, Path],
    has: Has,
    dtype: str,
    device: torch.device,
    on_device: int,
    in_ram: int,
    sharing: int,
    chosen: str,
) -> None:
    has(on_device, in_ram)
    assert choose_residence(TokenStore.open(paths[dtype]), device, sharing=sharing)[0] == chosen


def test_a_given_residence_is_taken_and_an_unknown_one_refused_with_those_that_exist(
    store: TokenStore, has: Has
) -> None:
    for device, free, wanted in itertools.product((CPU, CUDA), (0, 100 * SIZE), RESIDENCES):
        has(free, free)
        assert choose_residence(store, device, wanted)[0] == wanted
    with pytest.raises(UserError, match=r"'Disk'.* auto, device, ram, disk"):
        choose_residence(store, CPU, "Disk")
