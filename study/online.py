"""Online training: an actor collects, only its new frames are encoded, model and actor go on training; until enough is collected.

run/, actor/                          world model and actor, which go on in place
frames/part-K, stores/part-K.zarr     what is collected in part K; the stores of all parts so far are the replay
encoder.safetensors                   of an encoder that is fitted, on the frames of the prefill's last part
plans/part-K/                         evaluations
online.json                           settings and figures
metrics.jsonl, tensorboard/           figures by env steps
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from wmcache.cache.store import TokenStore
from wmcache.cluster.tasks import log
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.video import ffmpeg
from wmcache.engine.checkpoint import checkpoints, last_checkpoint, read_progress
from wmcache.engine.log import Log, truncate_metrics
from wmcache.pipeline.frames import FrameDataset, is_complete
from wmcache.planner.collect import collect
from wmcache.planner.judge import mean_of
from wmcache.study.online_options import OnlineOptions
from wmcache.study.parts import HINT, Row, alone, encode, evaluate_part, figures_of, refuse_other_settings
from wmcache.study.rounds_options import SEEDS
from wmcache.trainer.actor import train_actor
from wmcache.trainer.train import train

VIDEOS = 1
"""Of each evaluation."""
LEAST_EPISODES = 2
"""Of a part: one of them is held out."""


def run_online(options: OnlineOptions, out: Path) -> list[Row]:
    """Do the parts that are not done yet; returns a row of figures for each part that was trained on.

    The prefill's policy collects until that is enough, then the actor. A part has as many episodes as its env steps take if they are as
    long as those of the part before; no part depends on `options.steps`.

    Args:
        out: folder, for one process at a time, see the module.

    Raises:
        UserError: the folder was started with other settings, apart from the env steps, device, cluster and batch.
    """
    ffmpeg()  # a missing program is reported before any work
    with alone(out, "wmcache online"):
        file = out / "online.json"
        refuse_other_settings(options, file, ["steps"])
        rows: list[Row] = []
        known: list[Row] = read_json(file, HINT)["parts"] if file.exists() else []
        if not known:
            write_json(file, {"options": asdict(options), "parts": []})
        done = known[-1]["env_steps"] if known else 0
        truncate_metrics(out, done)
        # Lowering `steps` does not undo what is done.
        options = replace(options, steps=max(options.steps, done))
        with Log(out, "online (env steps)", "env steps", 1, steps=options.steps, initial=done) as progress:
            for part in _parts(options, out.absolute()):
                rows.append(part.do())
                if len(rows) > len(known):
                    progress.step_done(rows[-1]["env_steps"] - done)
                    progress.write(done := rows[-1]["env_steps"], _logged(rows[-1]))
                    write_json(file, {"options": asdict(options), "parts": rows})
        write_json(file, {"options": asdict(options), "parts": rows})
        return rows


def _logged(row: Row) -> dict[str, float | None]:
    """Return the figures of a part for the log, by name."""
    found = {"updates": row["updates"]}
    if row["collected"] is not None:
        found["collected/return"] = row["collected"]["mean"]
    if "return" in row:
        found["evaluation/return"] = row["return"]["mean"]
    for judged in row.get("by_threshold", []):
        found[f"evaluation/success within {judged['threshold']}"] = judged["success_rate"]
    return found


def _parts(options: OnlineOptions, out: Path) -> Iterator[_Part]:
    """Collect one part after another; yields those after which model and actor are trained."""
    part = _Part(options, out)
    while part.begun < options.steps:
        part.collect()
        trains, following = part.end >= options.prefill, part.following()
        first = part.first or (part.number if trains else 0)
        if trains:
            yield replace(part, first=first)
        part = replace(following, first=first)


@dataclass(frozen=True)
class _Part:
    """A part, counted from 1.

    Attributes:
        begun: env steps of the parts before.
        episode_steps: env steps of an episode in the part before, on average; None of the first part.
        first: number of the first part after which model and actor are trained; 0 before it.
    """

    options: OnlineOptions
    out: Path
    number: int = 1
    begun: int = 0
    episode_steps: float | None = None
    first: int = 0

    def path(self, folder: str, suffix: str = "", number: int | None = None) -> Path:
        """Return where this part of a folder is, or another one."""
        return self.out / folder / f"part-{number or self.number}{suffix}"

    @property
    def end(self) -> int:
        """Env steps of all parts so far."""
        card = FrameDataset.open(self.path("frames")).card
        return self.begun + card.frames - card.episodes

    def following(self) -> _Part:
        """Return the part after this one, which is collected."""
        steps = self.end - self.begun
        length = steps / FrameDataset.open(self.path("frames")).card.episodes
        return replace(self, number=self.number + 1, begun=self.end, episode_steps=length)

    def collect(self) -> None:
        """Collect by the prefill's policy, or by the actor as it is after the part before."""
        options, frames = self.options, self.path("frames")
        if is_complete(frames):
            return
        missing = options.prefill - self.begun
        length = self.episode_steps or options.collect.length - 1
        episodes = math.ceil((missing if missing > 0 else options.every) / length)
        settings = {**asdict(options.collect), "episodes": max(LEAST_EPISODES, episodes)}
        settings["seed"] = SEEDS * options.seed + self.number - 1
        if missing <= 0:
            settings["policy"] = str(self.out / "actor")
        log(f"part {self.number}: {self.begun} of {options.steps} env steps are collected")
        collect(out=frames, plan=options.policy, cluster=options.cluster, **settings)

    def do(self) -> Row:
        """Do what is not done; returns the part's figures."""
        options, updates = self.options, self.options.updates(self.end)
        if _step(self.out / "run") < updates:
            self.extract()
            self.train(updates)
        if _step(self.out / "actor") < updates:
            train_actor(self.out / "run", self.out / "actor", replace(options.actor, steps=updates), follow=True)
        results = self.path("plans") / "results.json"
        wanted = self.end >= options.steps or (self.number - self.first + 1) % options.evaluate_every == 0
        # Of a part before the last one, what would be evaluated does not exist any more.
        if wanted and _step(self.out / "actor") == updates:
            plan = replace(options.plan, policy=str(self.out / "actor"))
            first = not list(self.out.glob("plans/*/results.json"))
            evaluate_part(self.out / "run", plan, results.parent, options.cluster, baselines=first, videos=VIDEOS)
        return self.figures(updates, read_json(results, HINT) if results.exists() else None)

    def extract(self) -> None:
        """Encode the frames of this part; of the first one that is trained on also those of the parts before."""
        options = self.options
        for number in range(1 if self.number == self.first else self.number, self.number + 1):
            encode(
                self.path("frames", number=number),
                self.path("stores", ".zarr", number),
                options.encoder,
                self.path("frames", number=self.first),
                self.out / "encoder.safetensors",
                device=options.device,
                batch=options.batch,
                cluster=options.cluster,
            )

    def train(self, updates: int) -> None:
        """Go on training the model on the stores of all parts so far."""
        run, how = self.out / "run", replace(self.options.train, steps=updates)
        first, *more = (self.path("stores", ".zarr", number) for number in range(1, self.number + 1))
        train(first, run, how, more=more, resume=bool(checkpoints(run)))

    def figures(self, updates: int, results: Row | None) -> Row:
        """Return the row of a part that is done."""
        card, store = FrameDataset.open(self.path("frames")).card, TokenStore.open(self.path("stores", ".zarr"))
        returns = None
        if store.reward is not None:
            returns = np.bincount(store.episode, store.reward.astype(np.float64)).astype(np.float64)
        return {
            "part": self.number,
            "policy": card.policy,
            "collected_episodes": card.episodes,
            "env_steps": self.end,
            "updates": updates,
            "collected": None if returns is None else mean_of(returns),
            **(figures_of(results) | {"baselines": results["baselines"]} if results else {}),
        }


def _step(run: Path) -> int:
    """Return the updates that a folder's newest checkpoint has had."""
    return read_progress(last_checkpoint(run)).step if checkpoints(run) else 0
