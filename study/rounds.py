"""Rounds: a model collects the data that it goes on training on. Only new frames are encoded."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from wmcache.cluster.tasks import log
from wmcache.common.files import sweep, sync, temporary_for
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.pipeline.frames import FrameDataset, is_complete
from wmcache.planner.collect import collect
from wmcache.planner.controllers.options import ControllerOptions
from wmcache.planner.controllers.train import train_controller
from wmcache.planner.decode import load_encoder
from wmcache.planner.dream_play import play_dreams
from wmcache.planner.options import DreamOptions
from wmcache.study.parts import HINT, Row, alone, encode, evaluate_part, figures_of, refuse_other_settings
from wmcache.study.rounds_options import SEEDS, RoundsOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import train

DREAMED = 100
"""Imagined episodes of the score of a controller in its dream."""


def run_rounds(options: RoundsOptions, out: Path) -> list[Row]:
    """Do the rounds that are not done yet; returns a row of figures for each.

    Args:
        out: folder, for one process at a time: `frames/`, `stores/`, `runs/`, `controllers/`, `dreams/` and `plans/` with a part for
            each round, the encoder's weights, and `rounds.json` with settings and figures. A round is done when it has the results.json
            of its evaluations.

    Raises:
        UserError: the folder was started with other settings, apart from the number of rounds, device, cluster and batch.
    """
    with alone(out, "wmcache rounds"):
        refuse_other_settings(options, out / "rounds.json", ["rounds"])
        rows: list[Row] = []
        for number in range(1, options.rounds + 1):
            write_json(out / "rounds.json", {"options": asdict(options), "rounds": rows})
            rows.append(_Round(options, out.absolute(), number).do())
        write_json(out / "rounds.json", {"options": asdict(options), "rounds": rows})
        return rows


@dataclass(frozen=True)
class _Round:
    """A round, counted from 1."""

    options: RoundsOptions
    out: Path
    number: int

    def before(self) -> _Round:
        """Return the round before."""
        return replace(self, number=self.number - 1)

    def path(self, folder: str, suffix: str = "") -> Path:
        """Return where a part of the round is."""
        return self.out / folder / f"round-{self.number}{suffix}"

    def do(self) -> Row:
        """Do what is not done; returns the round's figures."""
        results = self.path("plans") / "results.json"
        if not all((self.path("plans", suffix) / "results.json").exists() for suffix in self.options.actors):
            log(f"round {self.number} of {self.options.rounds}")
            self.collect()
            self.extract()
            self.train()
            for suffix, chosen in self.options.actors.items():
                self.act(chosen, suffix)
        return self.figures(read_json(results, HINT))

    def actor(self) -> Path:
        """Return the folder of what acts after the round: the run, or its controller."""
        return self.path("controllers" if self.options.controller else "runs")

    def collect(self) -> None:
        """Collect by the first round's policy, or by what acts after the round before."""
        options, frames = self.options, self.path("frames")
        if is_complete(frames):
            return
        settings = {**asdict(options.collect), "seed": SEEDS * options.seed + self.number - 1}
        if self.number > 1:
            episodes = options.later_episodes or options.collect.episodes
            settings |= {"policy": str(self.before().actor()), "episodes": episodes}
        collect(out=frames, plan=options.policy, cluster=options.cluster, **settings)

    def extract(self) -> None:
        """Encode the round's frames."""
        options, first = self.options, replace(self, number=1).path("frames")
        encode(
            self.path("frames"),
            self.path("stores", ".zarr"),
            options.encoder,
            first,
            self.out / "encoder.safetensors",
            device=options.device,
            batch=options.batch,
            cluster=options.cluster,
        )

    def train(self) -> None:
        """Go on with the run of the round before, on the stores of all rounds so far."""
        run, own, rounds = self.path("runs"), self.options.train, self.number
        if rounds > 1 and not run.exists():
            sweep(run.parent)
            temporary = temporary_for(run)
            shutil.copytree(
                self.before().path("runs"), temporary, symlinks=True, ignore=shutil.ignore_patterns("plan-*")
            )
            for file in temporary.rglob("*"):
                sync(file)
            temporary.rename(run)
            sync(run.parent)
        first, *more = (replace(self, number=number).path("stores", ".zarr") for number in range(1, rounds + 1))
        # Shares of all steps so far.
        whole = replace(own, steps=rounds * own.steps, warmup=own.warmup / rounds, decay=own.decay / rounds)
        train(first, run, whole, more=more, resume=rounds > 1)

    def act(self, chosen: ControllerOptions | None, suffix: str) -> None:
        """Train a controller from that of the round before, and play it in its dream; evaluate it, or else the run."""
        actor = self.path("runs")
        if chosen is not None:
            actor = self.path("controllers", suffix)
            start = str(self.before().path("controllers", suffix)) if self.number > 1 else None
            train_controller(self.path("runs"), replace(chosen, start=start), actor, cluster=self.options.cluster)
            self.dream(chosen, actor, self.path("dreams", suffix))
        self.evaluate(actor, self.path("plans", suffix), baselines=self.number == 1 and not suffix)

    def dream(self, chosen: ControllerOptions, actor: Path, out: Path) -> None:
        """Play a controller where it was trained, if that is a dream."""
        if chosen.where == "dream" and not (out / "dream.json").exists():
            run, device = self.path("runs"), chosen.device
            model = load_model(run, torch.device("cpu"))
            drawn = model.has_latents and load_encoder(run, None, device).decoder is not None
            options = DreamOptions(
                episodes=DREAMED,
                steps=chosen.length,
                policy=str(actor),
                temperature=chosen.dream_temperature(draws=model.draws),
                pictured=DreamOptions.pictured if drawn else 0,
                device=device,
            )
            play_dreams(run, out, options)

    def evaluate(self, actor: Path, out: Path, *, baselines: bool) -> None:
        """Act in the episodes of the evaluation, which are the same in all rounds; baselines too, once."""
        plan = self.options.plan
        if actor != self.path("runs"):
            plan = replace(plan, policy=str(actor))
        evaluate_part(self.path("runs"), plan, out, self.options.cluster, baselines=baselines)

    def figures(self, results: Row) -> Row:
        """Return the row of a round that is done."""
        cards = [FrameDataset.open(replace(self, number=n).path("frames")).card for n in range(1, self.number + 1)]
        return {
            "round": self.number,
            "policy": cards[-1].policy,
            "collected_episodes": cards[-1].episodes,
            "frames": cards[-1].frames,
            "total_frames": sum(card.frames for card in cards),
            "steps": self.number * self.options.train.steps,
            **self.scores(results, ""),
            "variants": {
                name: self.scores(read_json(self.path("plans", f"-{name}") / "results.json", HINT), f"-{name}")
                for name in self.options.variants
            },
            "baselines": results["baselines"],
        }

    def scores(self, results: Row, suffix: str) -> Row:
        """Return the figures of what has acted: real episodes, and `dream`, the return in its dream, where it was trained there."""
        dreamed = self.path("dreams", suffix) / "dream.json"
        dream = {"dream": read_json(dreamed, HINT)["return"]} if dreamed.exists() else {}
        return figures_of(results) | dream
