"""Draw the start and the goal of a random task of some environments, side by side.

`python docs/examples/draw_tasks.py OUT.png Wall-random Teleport Rope Granular`
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image

from wmcache.envs import open_environment


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, required=True)
def main(out: Path, names: tuple[str, ...]) -> None:
    """Write the picture."""
    frames = []
    for name in names:
        env = open_environment(name)
        task = env.sample_task(np.random.default_rng(0))
        frames += [*env.render(np.stack([np.asarray(task.start), np.asarray(task.goal)]))]
        env.close()
    Image.fromarray(np.concatenate(frames, 1)).save(out, optimize=True)


if __name__ == "__main__":
    main()
