from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from wmcache.common import frames as module
from wmcache.common.errors import UserError
from wmcache.common.frames import load_frames

IMAGES = np.random.default_rng(0).integers(0, 256, (360, 8, 8, 3), np.uint8)


class Source:
    """Frames that remember which were read together."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def read_frames(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        self.read.append(frames.tolist())
        return IMAGES[frames]


def test_each_shard_is_read_once() -> None:
    source, wanted = Source(), np.array([3, 5, 64, 200, 359])
    np.testing.assert_array_equal(load_frames(source, wanted, 64, 8, "hint"), IMAGES[wanted])
    assert source.read == [[3, 5], [64], [200], [359]]


def test_frames_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    monkeypatch.setattr(module, "available_ram", lambda: 359 * 8 * 8 * 3)
    with pytest.raises(UserError, match="lower --max-frames"):
        load_frames(source, np.arange(360), 64, 8, "lower --max-frames")
    assert source.read == []
