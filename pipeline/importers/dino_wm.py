"""DINO-WM's published PointMaze folder -> frame dataset (arXiv 2411.04983; datasets/point_maze_dset.py in its repository).

    states.pth                  (E, T, 4): x, y, vx, vy
    actions.pth                 (E, T, 2)
    seq_lengths.pth             (E,): how many steps of each episode count
    obses/episode_XXX.pth       uint8 (T, S, S, 3) of an episode

These are pickles, and a pickle may be a program. They are read by PyTorch's own unpickler of nothing but tensors, and by no other.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.torch_version import TorchVersion
from tqdm import tqdm

from wmcache.common.device import CPU
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, cause_outside, unreadable
from wmcache.common.progress import seconds_between_updates
from wmcache.common.tensors import can_map
from wmcache.envs import ENV_PREFIX, FPS, Maze, find_maze, maze_names
from wmcache.pipeline.frames import DatasetCard
from wmcache.pipeline.importers import Source, require_finite, write_dataset
from wmcache.pipeline.steps import Steps
from wmcache.pipeline.tars import Frames

AGAIN = "save it again as one plain tensor with torch.save, or get the published file again"


def import_dino_wm(folder: Path, out: AnyPath, *, maze: str = "UMaze", frames_per_shard: int) -> DatasetCard:
    """Import a folder in DINO-WM's format; every frame, action and state stays the same to the bit.

    Args:
        folder: with states.pth, actions.pth, seq_lengths.pth and obses/.
        out: the dataset's folder.
        maze: layout that the data was collected in; planning builds the environment from it.
        frames_per_shard: frames in each tar.

    Raises:
        UserError: files that are missing, no tensors, or do not fit each other or the maze; everything that `write_dataset` raises.
        MazeError: unknown maze.
    """
    require_safe_torch(torch.__version__)
    layout = find_maze(maze)
    state, action = _series(folder / "states.pth", 4), _series(folder / "actions.pth", 2)
    episodes, longest = state.shape[:2]
    if action.shape[:2] != (episodes, longest):
        raise UserError(
            f"{folder / 'actions.pth'} has {action.shape[0]} episodes of {action.shape[1]} steps, "
            f"{folder / 'states.pth'} has {episodes} of {longest}; get both files again"
        )
    lengths = _lengths(folder / "seq_lengths.pth", episodes, longest)
    files = _episode_files(folder / "obses", episodes)
    steps = _steps(folder, state, action, lengths)
    if len(outside := np.flatnonzero(~layout.is_clear(steps.state[:, :2], 0.0))):
        frame = outside[0]
        x, y = steps.state[frame, :2]
        raise UserError(
            f"{folder / 'states.pth'} does not fit maze {layout.name}: episode {steps.episode[frame]} is inside a wall "
            f"at step {steps.step[frame]} (x {x:.3f}, y {y:.3f}); pass the maze of the data with --maze"
        )
    size = _common_size(files, lengths, longest)

    def read(episode: int, wanted: range) -> Iterator[Frames]:
        frames = _frames(files[episode], int(lengths[episode]), longest)
        if frames.shape[1] != size:
            raise UserError(f"{files[episode]} has changed while it was imported; run the same command again")
        yield from frames[wanted.start : wanted.stop]

    source = Source(folder, steps, size, read, _env_id(layout), layout.rows, "imported from dino-wm", FPS)
    return write_dataset(source, out, frames_per_shard=frames_per_shard)


def require_safe_torch(version: str) -> None:
    """Refuse, as a UserError, a PyTorch whose `weights_only` can be made to run code (CVE-2025-32434: below 2.6)."""
    if TorchVersion(version) < "2.6":
        raise UserError(
            f"PyTorch {version} can be made to run code by a .pth file (CVE-2025-32434); pip install 'torch>=2.6'"
        )


def load_tensor(path: Path) -> torch.Tensor:
    """The tensor in a file of `torch.save`, by memory map where the file allows it; nothing in the file is run.

    Raises:
        UserError: the file is missing, asks for anything but tensors, is no such file, or claims more numbers than it holds.
    """
    try:
        is_zip = _is_plain_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to those who wrote the file; what matters comes as an error
            tensor = torch.load(path, weights_only=True, map_location=CPU, mmap=is_zip and can_map(path))
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; get the published folder again") from None
    except MemoryError:
        raise
    except Exception as error:  # (whatever torch makes of a file that may be anything)
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        raise UserError(f"{path} cannot be read ({_reason(error)}); {AGAIN}") from error
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise UserError(f"{path} holds no plain tensor but {type(tensor).__name__}; {AGAIN}")
    if tensor.numel() * tensor.element_size() > size:
        raise UserError(f"{path} claims {tensor.numel()} numbers, more than the file holds; {AGAIN}")
    return tensor


def _is_plain_zip(path: Path) -> bool:
    """Whether a file is a zip, as `torch.save` writes them; raises ValueError where it is one that unpacks to more than it is."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is a compressed zip, which torch.save never writes")
    return True


def _reason(error: Exception) -> str:
    """PyTorch's answer on one line, without its advice to load the file unsafely."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {found[1]}, and nothing but tensors is read"
    return " ".join((text.partition("WeightsUnpickler error:")[2] or text).split())[:160] or type(error).__name__


def _series(path: Path, width: int) -> NDArray[Any]:
    """Float [episodes, steps, width]."""
    tensor = load_tensor(path)
    if tensor.dim() != 3 or tensor.shape[2] != width or 0 in tensor.shape:
        raise UserError(f"{path} has the shape {tuple(tensor.shape)}, not (episodes, steps, {width}); {AGAIN}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise UserError(f"{path} holds {tensor.dtype}, not float32 or float64; {AGAIN}")
    values: NDArray[Any] = tensor.detach().numpy()
    return values


def _lengths(path: Path, episodes: int, longest: int) -> NDArray[np.int64]:
    tensor = load_tensor(path)
    if tensor.shape != (episodes,):
        raise UserError(f"{path} has the shape {tuple(tensor.shape)} for {episodes} episodes; get all files again")
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise UserError(f"{path} holds {tensor.dtype}, not whole numbers; {AGAIN}")
    values = tensor.detach().to(torch.float64).numpy()
    wrong = np.flatnonzero(~((values >= 1) & (values <= longest) & (values == np.floor(values))))
    if len(wrong):
        raise UserError(
            f"{path} says that episode {wrong[0]} has {values[wrong[0]]:g} steps, not 1 to {longest}; get all files again"
        )
    return values.astype(np.int64)


def _steps(folder: Path, state: NDArray[Any], action: NDArray[Any], lengths: NDArray[np.int64]) -> Steps:
    counts = np.arange(state.shape[1]) < lengths[:, None]
    for name, values in (("states.pth", state), ("actions.pth", action)):
        # What lies behind an episode's end counts for nothing, so it may be anything.
        require_finite(np.where(counts[..., None], values, 0), f"value in {folder / name}")
    with np.errstate(over="ignore"):
        rounded = action.astype(np.float32)
    if len(inexact := np.argwhere((rounded != action) & counts[..., None])):
        place = ", ".join(map(str, inexact[0].tolist()))
        raise UserError(
            f"{folder / 'actions.pth'} holds float64 that float32 cannot hold, first at [{place}]; "
            "if rounding them is right, save them again with torch.save(actions.float(), ...)"
        )
    episode, step = np.nonzero(counts)
    return Steps(
        episode.astype(np.int32), step.astype(np.int32), rounded[counts], state[counts].astype(np.float64, copy=False)
    )


def _episode_files(folder: Path, episodes: int) -> list[Path]:
    found: dict[int, Path] = {}
    for file in sorted(folder.glob("episode_*.pth")):
        if number := re.fullmatch(r"episode_(\d{1,12})", file.stem):
            other = found.setdefault(int(number[1]), file)
            if other != file:
                raise UserError(f"{other} and {file} are the same episode; move one of them away")
    for episode in range(episodes):
        if episode not in found:
            raise UserError(f"{folder / f'episode_{episode:03d}.pth'} is missing; get the published folder again")
    if len(found) > episodes:
        raise UserError(
            f"{found[max(found)]} is an episode beyond the {episodes} of states.pth; get the published folder again"
        )
    return [found[episode] for episode in range(episodes)]


def _frames(path: Path, length: int, longest: int) -> Frames:
    """An episode's images, uint8 [length or longest, S, S, 3]."""
    tensor = load_tensor(path)
    if tensor.dtype != torch.uint8 or tensor.dim() != 4 or tensor.shape[3] != 3:
        raise UserError(
            f"{path} is {tensor.dtype} of shape {tuple(tensor.shape)}, not uint8 (steps, size, size, 3); {AGAIN}"
        )
    count, height, width = tensor.shape[:3]
    if height != width or not 0 < height <= 8192:
        raise UserError(f"{path} holds images of {width} x {height} pixels, not square ones; get the file again")
    if count not in (length, longest):
        raise UserError(
            f"{path} holds {count} frames for an episode of {length} steps (padded: {longest}); get the file again"
        )
    frames: Frames = tensor.numpy()
    return frames


def _common_size(files: list[Path], lengths: NDArray[np.int64], longest: int) -> int:
    """Side of all images; looks at the head of every file, so that the last one's fault is not found an hour later."""
    size = 0
    with tqdm(files, desc="check", unit=" episodes", mininterval=seconds_between_updates()) as bar:
        for file, length in zip(bar, lengths, strict=True):
            found = _frames(file, int(length), longest).shape[1]
            size = size or found
            if found != size:
                raise UserError(f"{file} holds images of {found} pixels, {files[0]} of {size}; get the file again")
    return size


def _env_id(layout: Maze) -> str:
    is_known = layout.name in maze_names() and find_maze(layout.name) == layout
    return f"{ENV_PREFIX}{layout.name}-v0" if is_known else layout.name
