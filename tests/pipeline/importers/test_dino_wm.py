from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wmcache.common.errors import UserError
from wmcache.envs import MazeError
from wmcache.pipeline.frames import FrameDataset, Frames
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.dino_wm import DinoWmImporter, require_safe_torch

KINDS = ("states.pth", "actions.pth", "seq_lengths.pth", "obses/episode_002.pth")
EPISODES, LENGTH = 6, 60


class Evil:
    """A pickle that makes a file when it is opened."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def published(dataset: FrameDataset, everything: Frames, tmp_path: Path) -> Path:
    """The shared dataset as DINO-WM publishes one."""
    folder = tmp_path / "point_maze"
    (folder / "obses").mkdir(parents=True)
    torch.save(torch.tensor(dataset.steps.state).reshape(EPISODES, LENGTH, 4), folder / "states.pth")
    torch.save(torch.tensor(dataset.steps.action).reshape(EPISODES, LENGTH, 2), folder / "actions.pth")
    torch.save(torch.full((EPISODES,), LENGTH), folder / "seq_lengths.pth")
    for episode, frames in enumerate(everything.reshape(EPISODES, LENGTH, 32, 32, 3)):
        torch.save(torch.from_numpy(frames.copy()), folder / "obses" / f"episode_{episode:03d}.pth")
    return folder


def edit(path: Path, change: Callable[[Any], object]) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path)


def import_again(folder: Path, out: Path, *, frames_per_shard: int = 64, **options: str) -> FrameDataset:
    write_dataset(DinoWmImporter(str(folder), **options).open(), out, frames_per_shard=frames_per_shard)
    return FrameDataset.open(out)


def test_frames_actions_and_states_keep_their_exact_values(
    published: Path, dataset: FrameDataset, everything: Frames, tmp_path: Path
) -> None:
    found = import_again(published, tmp_path / "out", frames_per_shard=50)
    np.testing.assert_array_equal(found.read_frames(range(360)), everything)
    for name, values in dataset.steps.store_columns().items():
        np.testing.assert_array_equal(found.steps.store_columns()[name], values)
        assert found.steps.store_columns()[name].dtype == values.dtype
    card = found.card
    assert (card.env, card.maze, card.fps) == (dataset.card.env, dataset.card.maze, dataset.card.fps)
    assert card.policy == "imported from dino-wm"


def other_files(folder: Path) -> None:
    """Other numbers of digits, files that are no zip, and actions in double precision."""
    for file in sorted((folder / "obses").iterdir()):
        number = int(file.stem[-3:])
        file.rename(file.with_name(f"episode_{number:0{1 + 4 * (number % 2)}d}.pth"))
    for file in folder.rglob("*.pth"):
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    edit(folder / "actions.pth", lambda actions: actions.double())


@pytest.mark.parametrize("change", [None, other_files])
def test_the_format_of_the_files_does_not_change_the_fingerprint(
    published: Path, dataset: FrameDataset, tmp_path: Path, change: Callable[[Path], None] | None
) -> None:
    if change:
        change(published)
    assert import_again(published, tmp_path / "out").card.fingerprint == dataset.card.fingerprint


def test_float32_states_are_kept_exactly(published: Path, tmp_path: Path) -> None:
    edit(published / "states.pth", lambda states: states.float())
    states = torch.load(published / "states.pth", weights_only=True).double().reshape(-1, 4)
    np.testing.assert_array_equal(import_again(published, tmp_path / "out").steps.state, states.numpy())


def test_episodes_end_at_their_seq_lengths(published: Path, everything: Frames, tmp_path: Path) -> None:
    lengths = [60, 1, 30, 60, 59, 2]
    behind = torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]
    torch.save(torch.tensor(lengths), published / "seq_lengths.pth")
    # Padding may be anything, or, in the images, missing.
    for kind in ("actions.pth", "states.pth"):
        edit(published / kind, lambda values: values.masked_fill(behind[..., None], float("nan")))
    edit(published / "obses" / "episode_002.pth", lambda frames: frames[:30].clone())
    found = import_again(published, tmp_path / "out")
    assert np.bincount(found.steps.episode).tolist() == lengths
    rows = np.concatenate([episode * LENGTH + np.arange(length) for episode, length in enumerate(lengths)])
    np.testing.assert_array_equal(found.read_frames(range(len(rows))), everything[rows])


@pytest.mark.parametrize("format", ["zip", "no zip", "plain pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_malicious_file_runs_nothing_and_is_named(
    published: Path, tmp_path: Path, run_import: Callable[..., Any], kind: str, format: str
) -> None:
    canary = tmp_path / "canary"
    if format == "plain pickle":
        (published / kind).write_bytes(pickle.dumps(Evil(canary)))
    else:
        torch.save(Evil(canary), published / kind, _use_new_zipfile_serialization=format == "zip")
    result = run_import("dino-wm", published, "--out", tmp_path / "out")
    assert not canary.exists()
    assert result.exit_code == 1
    assert str(published / kind) in result.stderr
    assert format == "plain pickle" or "posix.system" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("version", "safe"),
    [("2.5.1+cu121", False), ("1.13", False), ("2.6.0a0", False), ("2.6.0", True), ("2.10.1+cpu", True)],
)
def test_a_pytorch_that_can_be_made_to_run_code_is_refused(version: str, safe: bool) -> None:
    if safe:
        require_safe_torch(version)
    else:
        with pytest.raises(UserError, match="CVE-2025-32434"):
            require_safe_torch(version)


def damage(kind: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / kind, change)


def put(kind: str, index: tuple[int, ...], value: float) -> Callable[[Path], None]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return damage(kind, change)


def compress(folder: Path) -> None:
    path = folder / KINDS[3]
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def another(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "obses" / name).write_bytes(b"")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no states": (lambda folder: (folder / "states.pth").unlink(), r"states\.pth"),
    "no folder of images": (lambda folder: (folder / "obses").rename(folder / "images"), r"episode_000\.pth"),
    "an episode less": (lambda folder: (folder / KINDS[3]).unlink(), r"episode_002\.pth"),
    "an episode more": (another("episode_006.pth"), r"episode_006\.pth"),
    "an episode twice": (another("episode_2.pth"), r"episode_2\.pth"),
    "fewer actions": (damage("actions.pth", lambda t: t[:5].clone()), r"actions\.pth .*5.* 60"),
    "wider actions": (damage("actions.pth", lambda t: t.repeat(1, 1, 2)), r"actions\.pth .*\(6, 60, 4\)"),
    "flat states": (damage("states.pth", lambda t: t.flatten(0, 1)), r"states\.pth .*\(360, 4\)"),
    "whole states": (damage("states.pth", lambda t: t.long()), r"states\.pth .*int64"),
    "fewer lengths": (damage("seq_lengths.pth", lambda t: t[:5].clone()), r"seq_lengths\.pth .*\(5,\)"),
    "a length too long": (put("seq_lengths.pth", (3,), 61), r"seq_lengths\.pth .*3 .*61"),
    "half a length": (damage("seq_lengths.pth", lambda t: t - 0.5), r"seq_lengths\.pth .*0 .*59\.5"),
    "a dictionary": (damage("states.pth", lambda t: {"states": t}), r"states\.pth .*dict"),
    "a NaN state": (put("states.pth", (1, 5, 2), float("nan")), r"states\.pth at \[1, 5, 2\]"),
    "finer actions": (damage("actions.pth", lambda t: t.double() / 3), r"actions\.pth .*float32"),
    "a state in a wall": (put("states.pth", (4, 7, 0), -0.5), r"UMaze.* 4 .* 7 .*--maze"),
    "float images": (damage(KINDS[3], lambda t: t.float()), r"episode_002\.pth .*float32"),
    "channels first": (damage(KINDS[3], lambda t: t.permute(0, 3, 1, 2)), r"episode_002\.pth .*\(60, 3, 32, 32\)"),
    "oblong images": (damage(KINDS[3], lambda t: t[:, :30].clone()), r"episode_002\.pth .*32 x 30"),
    "other images": (damage(KINDS[3], lambda t: t[:, :30, :30].clone()), r"episode_002\.pth .*30 .*32"),
    "fewer images": (damage(KINDS[3], lambda t: t[:59].clone()), r"episode_002\.pth .*59"),
    "images without bytes": (
        damage(KINDS[3], lambda t: t[:1, :1, :1, :1].expand(60, 2048, 2048, 3)), r"episode_002\.pth .*754974720"
    ),
    "a compressed zip": (compress, r"episode_002\.pth .*zip"),
    "a cut file": (lambda folder: os.truncate(folder / KINDS[3], 5000), r"episode_002\.pth"),
    "an empty file": (lambda folder: os.truncate(folder / "actions.pth", 0), r"actions\.pth"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_data_that_does_not_fit_is_refused_by_file(published: Path, tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    change(published)
    with pytest.raises(UserError, match=message):
        import_again(published, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_maze_of_the_data_can_be_named(published: Path, tmp_path: Path) -> None:
    with pytest.raises(MazeError, match="Labyrinth"):
        import_again(published, tmp_path / "out", maze="Labyrinth")
    with pytest.raises(UserError, match=r"Large.*--maze"):
        import_again(published, tmp_path / "out", maze="Large")
    # A hall without inner walls contains the ball of any maze.
    hall = tmp_path / "Hall.txt"
    hall.write_text("\n".join(["#" * 5, *["#OOO#"] * 3, "#" * 5]))
    card = import_again(published, tmp_path / "out", maze=str(hall)).card
    assert (card.env, card.maze) == ("Hall", ["#####", "#OOO#", "#OOO#", "#OOO#", "#####"])


def test_a_killed_import_continues_where_it_stopped(published: Path, dataset: FrameDataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = """
import os, signal, sys
from pathlib import Path
from wmcache.pipeline.importers import base, write_dataset
from wmcache.pipeline.importers.dino_wm import DinoWmImporter

write = base.write_shard
def mortal(path, shard, samples):
    write(path, shard, samples)
    if shard == 2:
        os.kill(os.getpid(), signal.SIGKILL)

base.write_shard = mortal
write_dataset(DinoWmImporter(sys.argv[1]).open(), Path(sys.argv[2]), frames_per_shard=64)
"""
    died = subprocess.run([sys.executable, "-c", script, published, out], capture_output=True, check=False)
    assert died.returncode == -9, died.stderr
    times = {tar.name: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    assert sorted(times) == [f"frames-{shard:06d}.tar" for shard in range(3)]
    with pytest.raises(UserError, match=str(out)):
        FrameDataset.open(out)
    assert import_again(published, out).card.fingerprint == dataset.card.fingerprint
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times


def test_the_command_imports_and_prints_the_result(
    published: Path, dataset: FrameDataset, tmp_path: Path, run_import: Callable[..., Any]
) -> None:
    out = tmp_path / "données"
    for _ in range(2):  # run again, it changes nothing
        result = run_import("dino-wm", published, "--out", out, "--frames-per-shard", 64)
        assert result.exit_code == 0, result.output
        assert f"{out}: 6 episodes, 360 frames, 6 shards" in result.stdout
        assert f"fingerprint {dataset.card.fingerprint}" in result.stdout
    result = run_import("dino-wm", tmp_path / "nothing", "--out", tmp_path / "other")
    assert str(tmp_path / "nothing" / "states.pth") in result.stderr
