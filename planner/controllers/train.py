"""Train a linear controller by CMA-ES, in the dream of a world model or in the real environment (arXiv 1803.10122, section 4)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.common.errors import UserError
from wmcache.common.figures import png_bytes
from wmcache.common.files import make_folder, write_whole
from wmcache.common.jsonfiles import dump_json, write_json
from wmcache.common.options import check_options
from wmcache.common.progress import seconds_between_updates
from wmcache.planner.controllers.folder import (
    ControllerConfig,
    read_controller,
    read_start,
    write_solution,
)
from wmcache.planner.controllers.options import ControllerOptions
from wmcache.planner.controllers.search import Search
from wmcache.planner.controllers.trial import Trial, open_trial
from wmcache.planner.judge import mean_of
from wmcache.planner.report import COLOURS, RC
from wmcache.trainer.runs import differences, lock_run, weights_checksum

MAY_CHANGE = frozenset({"generations", "check_every", "check_episodes", "device"})
FIRST_EPISODE, CHECKS = 1_000_000, 500_000
"""Numbers of a seed's first episode, and from there of the first one of its checks. Evaluations have smaller numbers."""


def train_controller(
    run: Path, options: ControllerOptions, out: Path, *, cluster: str = "local:1", weights: Path | None = None
) -> dict[str, Any]:
    """Train a controller, or go on with the one in `out`.

    Args:
        cluster: where real episodes run, see `parse_cluster`.
        weights: of the encoder, where they have moved.

    Returns:
        The last line of generations.jsonl, `parameters`, and `stopped`, the criteria by which `cma` ended the search early.
    """
    check_options(options)
    make_folder(out.parent)
    unfinished = out / "unfinished"
    with (
        lock_run(out, "wmcache controller"),
        open_trial(run, options, unfinished, cluster=cluster, weights=weights) as trial,
    ):
        linear = trial.linear
        config = ControllerConfig(
            "controller",
            str(run.absolute()),
            weights_checksum(run),
            list(linear.inputs),
            linear.size,
            linear.choose,
            asdict(options),
        )
        start = torch.zeros(linear.parameters) if options.start is None else read_start(Path(options.start), linear)
        search = Search(start.double().numpy(), population=options.population, sigma=options.sigma, seed=options.seed)
        _prepare(out, config, search)
        with tqdm(
            total=options.generations,
            initial=min(search.generation, options.generations),
            desc="wmcache controller",
            unit=" generations",
            mininterval=seconds_between_updates(),
        ) as bar:
            while search.generation < options.generations and not search.stop():
                line = _generation(options, trial, search)
                with (out / "generations.jsonl").open("a", encoding="utf-8") as file:
                    file.write(dump_json(line) + "\n")
                search.save(out / "state.safetensors")
                write_solution(out, torch.from_numpy(search.mean))
                shutil.rmtree(unfinished, ignore_errors=True)
                bar.set_postfix_str(f"best {line['best']:.2f}, mean {line['mean']:.2f}", refresh=False)
                bar.update()
                if "check" in line:
                    _draw(out)
        shutil.rmtree(unfinished, ignore_errors=True)
        _draw(out)
        return {**read_generations(out)[-1], "parameters": linear.parameters, "stopped": search.stop()}


def _generation(options: ControllerOptions, trial: Trial, search: Search) -> dict[str, Any]:
    """Search for one generation; returns its line of generations.jsonl."""
    begun, number = time.perf_counter(), search.generation + 1
    first = FIRST_EPISODE * (options.seed + 1)
    episodes = range(first + search.generation * options.rollouts, first + number * options.rollouts)
    candidates = search.ask()
    fitness = _finite(trial.returns(candidates, episodes, f"generation-{number:05d}").mean(1))
    search.tell(candidates, fitness)
    line: dict[str, Any] = {
        "generation": number,
        "best": float(fitness.max()),
        "mean": float(fitness.mean()),
        "worst": float(fitness.min()),
        "sigma": search.sigma,
    }
    last = number == options.generations or search.stop()
    if trial.check is not None and (last or number % options.check_every == 0):
        checked = range(first + CHECKS, first + CHECKS + options.check_episodes)
        line["check"] = mean_of(trial.check(search.mean[None], checked, f"check-{number:05d}")[0])
    return {**line, "seconds": time.perf_counter() - begun}


def _finite(fitness: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give candidates whose dreams diverge the worst fitness; raises UserError where all do."""
    finite = np.isfinite(fitness)
    if not finite.any():
        raise UserError(
            "no candidate has a finite return: the model's predictions diverge; train it further, or lower --length"
        )
    return np.where(finite, fitness, fitness[finite].min())


def _prepare(out: Path, config: ControllerConfig, search: Search) -> None:
    """Write the settings into a new folder, or load the state of an old one; raises UserError where its settings differ."""
    if out.is_dir() and any(out.iterdir()):
        before = read_controller(out)
        usual = asdict(ControllerOptions())
        old, new = ({**asdict(one), **usual, **one.options} for one in (before, config))
        if different := differences(old, new, {*new} - {*MAY_CHANGE, "run", "options"}):
            found = "; ".join(different)
            raise UserError(f"{out} is a controller with other settings ({found}); choose another --out")
    make_folder(out)
    if (out / "state.safetensors").exists():
        search.load(out / "state.safetensors")
        write_solution(out, torch.from_numpy(search.mean))
    kept = [line for line in read_generations(out) if line["generation"] <= search.generation]
    write_whole(out / "generations.jsonl", "".join(dump_json(line) + "\n" for line in kept).encode())
    write_json(out / "config.json", asdict(config))


def _draw(out: Path) -> None:
    write_whole(out / "controller.png", draw_generations(read_generations(out)))


def read_generations(folder: Path) -> list[dict[str, Any]]:
    """Read generations.jsonl, without a line that a kill or a full disk has cut."""
    found: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        for line in (folder / "generations.jsonl").read_text(errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
    return found


@matplotlib.rc_context(RC)
def draw_generations(lines: Sequence[dict[str, Any]]) -> bytes:
    """Draw best and mean of each generation, and what the mean parameters reach in the real environment; returns a PNG."""
    figure = Figure(figsize=(5.6, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    generations = [line["generation"] for line in lines]
    for name, colour in zip(("best", "mean"), COLOURS, strict=False):
        axes.plot(generations, [line[name] for line in lines], color=colour, label=f"{name} of the population")
    if checks := [(line["generation"], line["check"]["mean"]) for line in lines if "check" in line]:
        axes.plot(*zip(*checks, strict=True), "o-", color=COLOURS[2], label="mean parameters, real environment")
    axes.set(xlabel="generation", ylabel="return")
    axes.legend()
    return png_bytes(figure)
