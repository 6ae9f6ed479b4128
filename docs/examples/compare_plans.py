"""Compare success of two groups of plans over the same episodes: python compare_plans.py THRESHOLD FOLDER,FOLDER,... FOLDER,FOLDER,...

Each folder is of `wmplan`; the n-th ones of both groups are of one seed. Prints the rates, their difference, and its 95 % interval by a
bootstrap over seeds and episodes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray


def reached(folders: str, threshold: str) -> NDArray[np.float64]:
    """Return whether each episode reached its goal, [seeds, episodes]."""
    tables = [pq.read_table(Path(folder) / "episodes.parquet") for folder in folders.split(",")]
    return np.array([table[f"env_steps_{threshold}"].to_numpy() >= 0 for table in tables], float)


def main(threshold: str, first: str, second: str) -> None:
    """Print the comparison."""
    before, after = reached(first, threshold), reached(second, threshold)
    rng, (seeds, episodes) = np.random.default_rng(0), before.shape
    difference = after - before
    drawn = [
        difference[rng.integers(0, seeds, seeds)][:, rng.integers(0, episodes, episodes)].mean() for _ in range(10_000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    click.echo(f"{before.mean():.2f} {after.mean():.2f} difference {difference.mean():.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
