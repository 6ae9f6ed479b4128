"""What the latents of td-mpc2 runs keep: python latents.py RUN...

Prints their deviation, a linear R² of x and y, and the rank correlation of latent and straight distance, on 1 000 held-out frames.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import spearmanr

from wmcache.common.device import CPU
from wmcache.common.errors import UserError
from wmcache.pipeline.probe import fit_linear
from wmcache.trainer.runs import load_model, open_store

FRAMES = 1000


def describe(run: Path) -> str:
    """Return the figures of a run; raises UserError where it is of another model, or has too few held-out frames."""
    model, store = load_model(run, CPU), open_store(run)
    held_out = store.frames_of("val")
    if "latent" not in model.start(1) or len(held_out) < FRAMES:
        raise UserError(
            f"{run} has no latents, or less than {FRAMES} held-out frames; name a run of td-mpc2 on a larger store"
        )
    frames = np.random.default_rng(0).choice(held_out, FRAMES, replace=False)
    tokens, proprio = torch.from_numpy(store.gather(frames)).float(), torch.from_numpy(store.proprio[frames]).float()
    with torch.no_grad():
        latents = model.observe(model.start(FRAMES), tokens, proprio, None)["latent"].double().numpy()
    half, xy = FRAMES // 2, store.state[frames, :2]
    error = np.square(fit_linear(latents[:half], xy[:half], latents[half:]) - xy[half:]).mean(0)
    distances = [np.linalg.norm(x[:half, None] - x[None, half:], axis=-1).ravel() for x in (latents, xy)]
    return (
        f"{run}: deviation {(latents - latents.mean(0)).std():.4f}, R² {(1 - error / xy[half:].var(0)).round(2)}, "
        f"rank correlation {spearmanr(*distances).statistic:.2f}"
    )


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(runs: tuple[Path, ...]) -> None:
    """Print the figures of runs."""
    for run in runs:
        try:
            click.echo(describe(run))
        except UserError as error:
            raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
