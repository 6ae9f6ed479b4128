"""Tests that `test_refusals.py` runs with `refuse.c` preloaded: file systems that refuse a system call, by path and errno."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from damage_tools import DESTROYS, flip, stamps
from fault_workers import Sample, command
from safetensors.torch import save_file

from wmcache.cache import TokenStore
from wmcache.common.errors import UnreadableError, UserError
from wmcache.common.files import sha256_of
from wmcache.common.jsonfiles import seal, write_json
from wmcache.common.tensors import load_tensors, open_tensors
from wmcache.engine import checkpoint

Refused = Callable[[str, int, Path], AbstractContextManager[None]]


@contextmanager
def refused(call: str, number: int, path: Path) -> Iterator[None]:
    """Let a system call fail for all files whose path contains this one."""
    os.environ.update(REFUSE_CALL=call, REFUSE_ERRNO=str(number), REFUSE_PATH=str(path))
    try:
        yield
    finally:
        os.environ["REFUSE_CALL"] = ""


@pytest.fixture
def sample(dataset_path: Path, tcn_weights: Path, store_path: Path, tmp_path: Path) -> Sample:
    """Copies of frames, weights and store."""
    dataset = Path(shutil.copytree(dataset_path, tmp_path / "frames"))
    weights = Path(shutil.copy(tcn_weights, tmp_path))
    return Sample(dataset, weights, {"float16": Path(shutil.copytree(store_path, tmp_path / "tcn.zarr"))})


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EACCES])
def test_a_store_that_cannot_be_mapped_is_read_and_its_damage_is_found(sample: Sample, number: int) -> None:
    path = sample.store
    frames = np.random.default_rng(0).permutation(len(TokenStore.open(path)))
    expected = TokenStore.open(path).load(quiet=True)
    with refused("mmap", number, path):
        store = TokenStore.open(path)
        store.prefetch(frames)
        np.testing.assert_array_equal(store.gather(frames), expected[frames])
        np.testing.assert_array_equal(TokenStore.open(path).load(quiet=True), expected)
        assert command("wmcache", "verify", path)[0] == 0
        flip(path / "tokens" / "c.1.0.0", 5)
        first = store.card.frames_per_shard
        with pytest.raises(UserError, match=f"frame {first} .*wmcache repair"):
            TokenStore.open(path).gather(np.array([first]))
        np.testing.assert_array_equal(TokenStore.open(path).gather(np.arange(first)), expected[:first])
        status, output = command("wmcache", "verify", path)
        assert status == 1
        assert f"frames {first}" in output


def check_unreadable(words: list[object], number: int, named: str) -> None:
    """The error names the file and the reason, and suggests nothing that would destroy a healthy file."""
    status, output = command("wmcache", *words)
    last = output.splitlines()[-1]
    assert status == 1, output
    assert os.strerror(number) in last
    assert named in last
    assert not [word for word in DESTROYS if word in last.partition(";")[2]], last


@pytest.mark.parametrize(
    "name", ["tokens/c.1.0.0", "zarr.json", "tokens/zarr.json", "action/c", "tokens/commits/000001.json"]
)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_store_that_the_system_cannot_read_is_not_called_damaged(sample: Sample, number: int, name: str) -> None:
    path, before, named = sample.store, stamps(sample.store), name.removesuffix("/c")
    with refused("open", number, path / name):
        check_unreadable(["verify", path], number, named)
        check_unreadable(["repair", path], number, named)
        if name == "tokens/c.1.0.0":
            with pytest.raises(UserError, match=os.strerror(number)):
                TokenStore.open(path).load(quiet=True)
        else:  # a finished extraction reads no tokens
            check_unreadable(["extract", *sample.words, "--out", path], number, named)
    assert stamps(path) == before


@pytest.mark.parametrize(
    "name", ["frames/dataset.json", "frames/steps.parquet", "frames/frames-000001.tar", "tcn.safetensors"]
)
def test_frames_and_weights_that_the_system_cannot_read_are_named(sample: Sample, tmp_path: Path, name: str) -> None:
    with refused("open", errno.EIO, tmp_path / name):
        check_unreadable(["extract", *sample.words, "--out", tmp_path / "other.zarr"], errno.EIO, Path(name).stem)


def test_checkpoints_are_read_without_maps_and_an_unreadable_one_is_not_to_be_deleted(tmp_path: Path) -> None:
    values = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(())}
    file = tmp_path / "model.safetensors"
    save_file(values, file, {"encoder": "tcn"})
    write_json(tmp_path / "state.json", seal({"sha256": {file.name: sha256_of(file)}}))
    with refused("mmap", errno.ENODEV, tmp_path):
        for found in (load_tensors(file), checkpoint.load_tensors(tmp_path, file.name)):
            assert found.keys() == values.keys()
            assert all(torch.equal(found[name], value) for name, value in values.items())
        with open_tensors(file) as opened:
            assert opened.metadata() == {"encoder": "tcn"}
    for name, number in ((file.name, errno.EIO), ("state.json", errno.ESTALE)):
        with refused("open", number, tmp_path / name), pytest.raises(UnreadableError) as refusal:
            checkpoint.load_tensors(tmp_path, file.name)
        assert "delete" not in str(refusal.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_file_locks_stores_are_read_and_none_is_written(sample: Sample, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "no-locks"
    folder.mkdir()
    with refused("flock", number, folder):
        status, output = command("wmcache", "extract", *sample.words, "--out", folder / "new.zarr")
        assert status == 1
        assert str(folder / "new.zarr") in output
        assert "locks" in output.splitlines()[-1]
        assert list(folder.iterdir()) == []
        copy = Path(shutil.copytree(sample.store, folder / "tcn.zarr"))
        assert command("wmcache", "verify", copy)[0] == 0
        assert command("wmcache", "extract", *sample.words, "--out", copy)[0] == 0  # nothing to write
        assert len(TokenStore.open(copy).gather(np.arange(9))) == 9
