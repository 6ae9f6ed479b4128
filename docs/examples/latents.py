"""What the latents of td-mpc2 runs keep: python latents.py RUN...

Prints their deviation, a linear R² of x and y, and the rank correlation of latent and straight distance, on 1 000 held-out frames.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression

from wmcache.common.device import CPU
from wmcache.trainer.runs import load_model, open_store

FRAMES = 1000


def describe(run: Path) -> str:
    """Return the figures of a run."""
    model, store = load_model(run, CPU), open_store(run)
    frames = np.random.default_rng(0).choice(store.frames_of("val"), FRAMES, replace=False)
    tokens, proprio = torch.from_numpy(store.gather(frames)).float(), torch.from_numpy(store.proprio[frames]).float()
    with torch.no_grad():
        latents = model.observe(model.start(FRAMES), tokens, proprio, None)["latent"].double().numpy()
    half, xy = FRAMES // 2, store.state[frames, :2]
    probe = LinearRegression().fit(latents[:half], xy[:half])
    error = np.square(probe.predict(latents[half:]) - xy[half:]).mean(0)
    distances = [np.linalg.norm(x[:half, None] - x[None, half:], axis=-1).ravel() for x in (latents, xy)]
    return (
        f"{run}: deviation {(latents - latents.mean(0)).std():.4f}, R² {(1 - error / xy[half:].var(0)).round(2)}, "
        f"rank correlation {spearmanr(*distances).statistic:.2f}"
    )


if __name__ == "__main__":
    for path in sys.argv[1:]:
        click.echo(describe(Path(path)))
