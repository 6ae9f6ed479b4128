"""Draw return against env steps over seeds: python online_seeds.py OUT.png FOLDER FOLDER ..., folders of `wmcache online`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np

from wmcache.common.jsonfiles import read_json
from wmcache.planner.judge import mean_of
from wmcache.study import curve


def main(picture: Path, folders: list[Path]) -> None:
    """Print and draw mean returns of the evaluations, with Student's 95 % intervals over the seeds."""
    parts = [read_json(folder / "online.json", "name a folder of wmcache online")["parts"] for folder in folders]
    rows = [[row for row in found if "return" in row] for found in parts]
    at = [row["env_steps"] for row in rows[0]]
    if any([row["env_steps"] for row in found] != at for found in rows):
        sys.exit("the folders have parts of other env steps")
    over = [mean_of(np.array([found[k]["return"]["mean"] for found in rows])) for k in range(len(at))]
    baselines = {
        name: float(np.mean([found[0]["baselines"][name]["mean"] for found in rows]))
        for name in rows[0][0]["baselines"]
    }
    line = curve.Line(f"{len(rows)} seeds", at, [one["mean"] for one in over], [one["ci95"] for one in over], baselines)
    picture.write_bytes(curve.draw([line], "env steps", None, by_return=True))
    for step, one in zip(at, over, strict=True):
        click.echo(
            f"{step:>9} env steps: {one['mean']:.1f}, 95 % interval {one['ci95'][0]:.1f} to {one['ci95'][1]:.1f}"
        )
    click.echo(", ".join(f"{name} actions {value:.1f}" for name, value in baselines.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
