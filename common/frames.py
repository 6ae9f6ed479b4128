"""Frames by their number, for code that must not know where they come from."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.common.errors import UserError
from wmcache.common.memory import available_ram
from wmcache.common.progress import seconds_between_updates
from wmcache.common.space import human_bytes


class Frames(Protocol):
    """The frames that a store's tokens were made of; `pipeline.frames.FrameDataset` is one."""

    def read_frames(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read frames [B], ascending, as uint8 [B, S, S, 3]."""
        ...


def load_frames(
    source: Frames, frames: NDArray[np.int64], frames_per_shard: int, image_size: int, hint: str
) -> NDArray[np.uint8]:
    """Read frames [B], ascending, of `image_size` S, into memory as uint8 [B, S, S, 3]; each shard once.

    Raises:
        UserError: not enough memory; `hint` ends the message.
    """
    needed, free = len(frames) * image_size**2 * 3, available_ram()
    if needed > free:
        raise UserError(
            f"{len(frames)} frames of {image_size} px need {human_bytes(needed)} of memory, {human_bytes(free)} are free; {hint}"
        )
    images = np.empty((len(frames), image_size, image_size, 3), np.uint8)
    shard_of = frames // frames_per_shard
    with tqdm(total=len(frames), desc="read frames", unit=" frames", mininterval=seconds_between_updates()) as bar:
        for shard in np.unique(shard_of):
            rows = np.flatnonzero(shard_of == shard)
            images[rows] = source.read_frames(frames[rows])
            bar.update(len(rows))
    return images
