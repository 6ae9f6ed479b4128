"""How long a policy that sees nothing survives in ViZDoom's take cover: it walks from side to side, turning every so many env steps.

`python docs/examples/blind_sweep.py 80` prints the mean of 100 episodes and its 95 % interval. A policy that looks must do better.
"""

from __future__ import annotations

import click
import gymnasium
import numpy as np
import vizdoom.gymnasium_wrapper  # noqa: F401 (registers the game)

from wmcache.planner.judge import mean_of

EPISODES, LONGEST = 100, 2100


def survival(period: int, seed: int) -> int:
    """Return the env steps that an episode lasts."""
    env = gymnasium.make("VizdoomTakeCover-v1")
    env.reset(seed=seed)
    steps, ended = 0, False
    while steps < LONGEST and not ended:
        _, _, terminated, truncated, _ = env.step(1 + steps // period % 2)
        steps, ended = steps + 1, terminated or truncated
    env.close()
    return steps


@click.command()
@click.argument("period", type=click.IntRange(1))
def main(period: int) -> None:
    """Play with a turn after every PERIOD env steps."""
    click.echo(mean_of(np.array([survival(period, seed) for seed in range(EPISODES)], np.float64)))


if __name__ == "__main__":
    main()
