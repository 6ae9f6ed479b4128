"""Compare two groups of plans over the same episodes: python compare_plans.py THRESHOLD|return FOLDER,FOLDER,... FOLDER,FOLDER,...

Each folder is of `wmplan`; the n-th ones of both groups are of one seed. Prints the success rates within a threshold, or the mean returns,
their difference, and its 95 % interval by a bootstrap over seeds and episodes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray


def outcomes(folders: str, measure: str) -> NDArray[np.float64]:
    """Return whether each episode reached its goal, or its return, [seeds, episodes]."""
    tables = [pq.read_table(Path(folder) / "episodes.parquet") for folder in folders.split(",")]
    if measure == "return":
        return np.array([table["return"].to_numpy() for table in tables], float)
    return np.array([table[f"env_steps_{measure}"].to_numpy() >= 0 for table in tables], float)


def main(measure: str, first: str, second: str) -> None:
    """Print the comparison."""
    before, after = outcomes(first, measure), outcomes(second, measure)
    rng, (seeds, episodes) = np.random.default_rng(0), before.shape
    difference = after - before
    drawn = [
        difference[rng.integers(0, seeds, seeds)][:, rng.integers(0, episodes, episodes)].mean() for _ in range(10_000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    click.echo(f"{before.mean():.2f} {after.mean():.2f} difference {difference.mean():.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
