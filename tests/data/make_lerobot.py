"""Writes `lerobot-0.4.4.tar.xz` by lerobot's own library, which requires other versions of PyTorch and NumPy than wmcache.

Run in an environment of its own: `pip install lerobot==0.4.4`, then `python make_lerobot.py FOLDER`, then tar that folder.
"""

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

LENGTHS, SIDE, FPS = (5, 9, 6), 32, 10
FEATURES = {
    "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
    "observation.force": {"dtype": "float64", "shape": (2, 2), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
}


def frame(number: int, camera: int) -> np.ndarray:
    """A grey image that is brighter in each frame, with a white square in one corner; uint8 [SIDE, SIDE, 3]."""
    image = np.full((SIDE, SIDE, 3), 40 + 8 * number, np.uint8)
    corner = slice(0, 8) if camera == 0 else slice(-8, None)
    image[corner, corner] = 255
    return image


def write(root: Path, kind: str, cameras: tuple[str, ...]) -> None:
    """Write one dataset; `kind` is video or image."""
    images = {
        name: {"dtype": kind, "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]} for name in cameras
    }
    dataset = LeRobotDataset.create(
        "tests/ball", FPS, {**FEATURES, **images}, root=root, use_videos=kind == "video", robot_type="ball"
    )
    rng, number = np.random.default_rng(0), 0
    for episode, length in enumerate(LENGTHS):
        for step in range(length):
            values = {
                "action": rng.uniform(-1, 1, 2).astype(np.float32),
                "observation.state": rng.normal(size=3).astype(np.float32),
                "observation.force": rng.normal(size=(2, 2)),
                "next.reward": np.float32([number / 4]),
                "next.done": np.array([step == length - 1]),
            }
            dataset.add_frame(
                {
                    **values,
                    **{name: frame(number, camera) for camera, name in enumerate(cameras)},
                    "task": f"task {episode % 2}",
                }
            )
            number += 1
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    write(Path(sys.argv[1]) / "video", "video", ("observation.images.top", "observation.images.wrist"))
    write(Path(sys.argv[1]) / "image", "image", ("observation.image",))
