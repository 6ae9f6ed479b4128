"""DINO-WM's published PointMaze folder -> frame dataset (arXiv 2411.04983; datasets/point_maze_dset.py in its repository).

    states.pth                  (E, T, 4): x, y, vx, vy
    actions.pth                 (E, T, 2)
    seq_lengths.pth             (E,): how many steps of each episode count
    obses/episode_XXX.pth       uint8 (T, S, S, 3) of an episode

These are pickles, which may run code. Only PyTorch's own unpickler for nothing but tensors reads them.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.torch_version import TorchVersion
from tqdm import tqdm

from wmcache.common.device import CPU
from wmcache.common.errors import UserError, reason
from wmcache.common.options import option
from wmcache.common.paths import cause_outside, unreadable
from wmcache.common.progress import seconds_between_updates
from wmcache.common.tensors import can_map
from wmcache.envs import FPS, Maze, env_id, find_maze
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.base import IMPORTERS, Importer, Source
from wmcache.pipeline.steps import Steps

AGAIN = "save it again as one plain tensor with torch.save, or get the published file again"
FLOATS = frozenset({torch.float32, torch.float64})


@IMPORTERS.register("dino-wm")
@dataclass(frozen=True, kw_only=True)
class DinoWmImporter(Importer):
    """Import DINO-WM's PointMaze FOLDER: states.pth, actions.pth, seq_lengths.pth, obses/episode_XXX.pth."""

    maze: str = option("UMaze", "Layout that the data was collected in, or a .txt grid.")

    def open(self) -> Source:
        """See `Importer.open`; every frame, action and state keeps its exact value."""
        require_safe_torch(torch.__version__)
        folder, layout = Path(self.source), find_maze(self.maze)
        state = _load_tensor(folder / "states.pth", (None, None, 4), FLOATS).numpy()
        episodes, longest = state.shape[:2]
        action = _load_tensor(folder / "actions.pth", (episodes, longest, 2), FLOATS).numpy()
        lengths = _lengths(folder / "seq_lengths.pth", episodes, longest)
        files = _episode_files(folder / "obses", episodes)
        steps = _steps(folder, state, action, lengths)
        _require_inside(layout, steps, folder)
        size = _common_size(files, lengths, longest)

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            frames = _frames(files[episode], int(lengths[episode]), longest)
            if frames.shape[1] != size:
                raise UserError(f"{files[episode]} was replaced during the import; run the command again")
            yield from frames[wanted.start : wanted.stop]

        return Source(folder, steps, size, read, env_id(layout), layout.rows, "imported from dino-wm", FPS)


def require_safe_torch(version: str) -> None:
    """Raise UserError for a PyTorch whose `weights_only` can be made to run code (CVE-2025-32434: below 2.6)."""
    if TorchVersion(version) < "2.6":
        raise UserError(f"a .pth file can run code in PyTorch {version} (CVE-2025-32434); pip install 'torch>=2.6'")


def _load_tensor(path: Path, shape: tuple[int | None, ...], dtypes: frozenset[torch.dtype]) -> torch.Tensor:
    """Load the tensor in a file of `torch.save` without running code, by memory map if the file allows it; in `shape`, None is any size."""
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("it is a compressed zip, which torch.save never writes")  # noqa: TRY301 (refused below)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for the file's author
            tensor = torch.load(path, weights_only=True, map_location=CPU, mmap=is_zip and can_map(path))
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; get the published folder again") from None
    except MemoryError:
        raise
    except Exception as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        raise UserError(f"{path} cannot be read ({_torch_reason(error)}); {AGAIN}") from error
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise UserError(f"{path} contains no plain tensor but {type(tensor).__name__}; {AGAIN}")
    if tensor.numel() * tensor.element_size() > size:
        raise UserError(f"{path} claims {tensor.numel()} numbers, more than it has bytes for; {AGAIN}")
    found = tuple(tensor.shape)
    expected = tuple(wanted or size for size, wanted in zip(found, shape, strict=False))
    if len(found) != len(shape) or found != expected or 0 in found:
        raise UserError(f"{path} has the shape {found}, not {shape} (None: any size); {AGAIN}")
    if tensor.dtype not in dtypes:
        raise UserError(f"{path} has dtype {tensor.dtype}, not {' or '.join(sorted(map(str, dtypes)))}; {AGAIN}")
    return tensor.detach()


def _torch_reason(error: Exception) -> str:
    """PyTorch's reason in one line, without its advice to load the file unsafely."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {found[1]}; only tensors are read"
    return reason(ValueError(text.partition("WeightsUnpickler error:")[2] or text))


def _lengths(path: Path, episodes: int, longest: int) -> NDArray[np.int64]:
    values = _load_tensor(path, (episodes,), FLOATS | {torch.int32, torch.int64}).to(torch.float64).numpy()
    wrong = np.flatnonzero(~((values >= 1) & (values <= longest) & (values == np.floor(values))))
    if len(wrong):
        raise UserError(f"{path} gives episode {wrong[0]} {values[wrong[0]]:g} steps, not 1 to {longest}; {AGAIN}")
    return values.astype(np.int64)


def _steps(folder: Path, state: NDArray[Any], action: NDArray[Any], lengths: NDArray[np.int64]) -> Steps:
    counts = np.arange(state.shape[1]) < lengths[:, None]
    for name, values in (("states.pth", state), ("actions.pth", action)):
        # Values after an episode's end do not count and may be anything.
        if len(wrong := np.argwhere(~np.isfinite(values) & counts[..., None])):
            raise UserError(f"a value is not a finite number: {folder / name} at {wrong[0].tolist()}; correct the file")
    with np.errstate(over="ignore"):
        rounded = action.astype(np.float32)
    if len(inexact := np.argwhere((rounded != action) & counts[..., None])):
        raise UserError(
            f"{folder / 'actions.pth'} has values beyond float32 at {inexact[0].tolist()}; to round them, save actions.float()"
        )
    episode, step = np.nonzero(counts)
    return Steps.plain(
        episode.astype(np.int32), step.astype(np.int32), rounded[counts], state[counts].astype(np.float64, copy=False)
    )


def _require_inside(layout: Maze, steps: Steps, folder: Path) -> None:
    xy = steps.columns["state"][:, :2]
    if len(outside := np.flatnonzero(~layout.is_clear(xy, 0.0))):
        frame = outside[0]
        x, y = xy[frame]
        raise UserError(
            f"{folder / 'states.pth'} does not fit maze {layout.name}: episode {steps.episode[frame]} is inside a wall "
            f"at step {steps.step[frame]} (x {x:.3f}, y {y:.3f}); pass the maze of the data with --maze"
        )


def _episode_files(folder: Path, episodes: int) -> list[Path]:
    found: dict[int, Path] = {}
    for file in sorted(folder.glob("episode_*.pth")):
        if number := re.fullmatch(r"episode_(\d{1,12})", file.stem):
            other = found.setdefault(int(number[1]), file)
            if other != file:
                raise UserError(f"{other} and {file} are the same episode; move one of them away")
    again = "get the published folder again"
    if missing := sorted(set(range(episodes)) - set(found)):
        raise UserError(f"{folder / f'episode_{missing[0]:03d}.pth'} is missing; {again}")
    if len(found) > episodes:
        raise UserError(f"{found[max(found)]} is an episode beyond the {episodes} of states.pth; {again}")
    return [found[episode] for episode in range(episodes)]


def _frames(path: Path, length: int, longest: int) -> Frames:
    """An episode's images, uint8 [length or longest, S, S, 3]."""
    tensor = _load_tensor(path, (None, None, None, 3), frozenset({torch.uint8}))
    count, height, width = tensor.shape[:3]
    if height != width or height > 8192:
        raise UserError(f"{path} has images of {width} x {height} pixels, not square ones; get the file again")
    if count not in (length, longest):
        raise UserError(f"{path} has {count} frames, its episode {length} (padded: {longest}); get the file again")
    frames: Frames = tensor.numpy()
    return frames


def _common_size(files: list[Path], lengths: NDArray[np.int64], longest: int) -> int:
    """Return the side of all images; opens every file now, because an import may take hours to reach the last."""
    size = 0
    with tqdm(files, desc="check", unit=" episodes", mininterval=seconds_between_updates()) as bar:
        for file, length in zip(bar, lengths, strict=True):
            found = _frames(file, int(length), longest).shape[1]
            size = size or found
            if found != size:
                raise UserError(f"{file} has images of {found} pixels, {files[0]} of {size}; get the file again")
    return size
