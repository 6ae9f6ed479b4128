"""Rounds: a model collects the data that it goes on training on. Only new frames are encoded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Le

from wmcache.cluster.tasks import log, parse_cluster
from wmcache.common.errors import UserError
from wmcache.common.files import sync, temporary_for
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.locks import exclusive
from wmcache.common.options import Natural, Positive, option, parse_options
from wmcache.pipeline import encoders
from wmcache.pipeline.extract import extract_together, with_log_variances
from wmcache.pipeline.fit import fit
from wmcache.pipeline.frames import FrameDataset, is_complete
from wmcache.pipeline.options import CollectOptions
from wmcache.planner.collect import collect
from wmcache.planner.context import EvalContext
from wmcache.planner.controllers.options import ControllerOptions
from wmcache.planner.controllers.train import train_controller
from wmcache.planner.evaluate import evaluate
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import write_episodes
from wmcache.study.cells import ENCODER_OPTIONS
from wmcache.study.options import EncoderChoice, errors_at, read_plan, read_toml
from wmcache.trainer.models import MODELS
from wmcache.trainer.models import read_options as read_model_options
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

SEEDS = 1000
"""Datasets of one seed; the last of `rounds` is below it."""
MAY_CHANGE = {
    "rounds",
    "cluster",
    "batch",
    "plan.batch",
    *(f"{part}device" for part in ("", "train.", "controller.", "policy.", "plan.")),
}
HINT = "restore it, or choose another --out"
Row = dict[str, Any]


@dataclass(frozen=True)
class FirstRound(CollectOptions):
    """How the first round collects, and all rounds but for policy and number of episodes."""

    episodes: Positive = option(20)
    image_size: Annotated[int, Le(2048)] = option(112)


@dataclass(frozen=True)
class RoundsOptions:
    """All settings of rounds.

    Attributes:
        later_episodes: of each round after the first; None: as many.
        encoder: fitted once, on the first round's frames, or with weights.
        train: `steps` are those of each round. Warm-up is in the first round only; each round ends with the decay of its own steps, and
            the next one begins at the learning rate of the constant phase.
        controller: trained on each round's model; then it collects and is evaluated (arXiv 1803.10122, section 5). None: the run itself.
        policy: how the run acts that collects, see `planner.collect.collect`.
        plan: the evaluation after each round.
        batch: frames in each call of the encoder.
    """

    encoder: EncoderChoice
    rounds: Annotated[Positive, Le(SEEDS)] = 3
    seed: Natural = 0
    collect: FirstRound = field(default_factory=FirstRound)
    later_episodes: Positive | None = None
    train: TrainOptions = field(default_factory=TrainOptions)
    controller: ControllerOptions | None = None
    policy: PlanOptions = field(default_factory=PlanOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    batch: Positive = 32
    device: str = "auto"
    cluster: str = "local:1"


def read_rounds(file: Path, flags: Mapping[str, Any] | None = None) -> RoundsOptions:
    """Read a TOML file of rounds; `flags` are values of its top level that win."""
    where = str(file)
    values = read_toml(file) | {name: value for name, value in (flags or {}).items() if value is not None}
    tables = {name: values.pop(name, {}) for name in ("collect", "encoder", "train", "policy", "plan")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{where}: {name} is not a table; write [{name}]")
    _refuse(tables["collect"], ("seed",), f"{where}: collect", "set the seed of all at the top")
    _refuse(tables["train"], ("seed", "epochs", "stage", "start"), f"{where}: train", "it is set by the rounds")
    _refuse(tables["policy"], ("episodes", "budget", "batch", "seed", "env"), f"{where}: policy", "no round uses it")
    controlled = values.pop("controller", None)
    bare = parse_options(RoundsOptions, {**values, "encoder": {"name": ""}}, where)
    with errors_at(f"{where}: cluster"):
        parse_cluster(bare.cluster)
    settings = {"device": bare.device, "seed": bare.seed, **tables["train"]}
    trained = parse_options(TrainOptions, settings, f"{where}: train")
    with errors_at(f"{where}: train"):
        read_model_options(trained.model, trained.model_options)
        if MODELS.get(trained.model).stages:
            raise UserError(f"model {trained.model} is trained in stages, which no round goes on with; choose another")
    return replace(
        bare,
        collect=parse_options(FirstRound, {**tables["collect"], "seed": bare.seed}, f"{where}: collect"),
        encoder=_encoder(tables["encoder"], bare.seed, f"{where}: encoder"),
        train=trained,
        controller=_controller(controlled, bare, f"{where}: controller"),
        policy=replace(read_plan(tables["policy"], f"{where}: policy"), device=bare.device),
        plan=replace(read_plan(tables["plan"], f"{where}: plan"), device=bare.device),
    )


def _controller(table: Any, bare: RoundsOptions, where: str) -> ControllerOptions | None:
    if isinstance(table, dict):
        _refuse(table, ("seed",), where, "set the seed of all at the top")
        table = {"device": bare.device, **table, "seed": bare.seed}
    return None if table is None else parse_options(ControllerOptions, table, where)


def _refuse(table: Mapping[str, Any], names: tuple[str, ...], where: str, hint: str) -> None:
    if given := [name for name in names if name in table]:
        raise UserError(f"{where} has {given[0]}; {hint}")


def _encoder(table: Mapping[str, Any], seed: int, where: str) -> EncoderChoice:
    choice = parse_options(EncoderChoice, dict(table), where)
    with errors_at(where):
        entry = encoders.get_entry(choice.name)
        if entry.load is None or choice.base or choice.base_weights:
            raise UserError(f"{choice.name} on a base is an adapter; choose an encoder of frames")
        if choice.weights and choice.fit:
            raise UserError("weights and fit exclude each other; leave out one")
        if choice.fit:
            encoders.fit_options(choice.name, choice.fit)
    if choice.weights:
        return replace(choice, weights=str(Path(choice.weights).absolute()))
    return replace(choice, fit={"seed": seed, **choice.fit}) if entry.fit else choice


def run_rounds(options: RoundsOptions, out: Path) -> list[Row]:
    """Do the rounds that are not done yet; returns a row of figures for each.

    Args:
        out: folder, for one process at a time: `frames/`, `stores/`, `runs/` and `plans/` with a part for each round, the encoder's
            weights, and `rounds.json` with settings and figures. A round is done when it has its evaluation's results.json.

    Raises:
        UserError: the folder was started with other settings, apart from the number of rounds, device, cluster and batch.
    """
    with exclusive(out / ".lock", out, wait=False) as alone:
        if not alone:
            raise UserError(f"another wmcache rounds is running in {out}; wait for it, or choose another --out")
        _refuse_other_settings(options, out)
        rows: list[Row] = []
        for number in range(1, options.rounds + 1):
            write_json(out / "rounds.json", {"options": asdict(options), "rounds": rows})
            rows.append(_Round(options, out.absolute(), number).do())
        write_json(out / "rounds.json", {"options": asdict(options), "rounds": rows})
        return rows


def _refuse_other_settings(options: RoundsOptions, out: Path) -> None:
    file = out / "rounds.json"
    if not file.exists():
        if out.exists() and any(path.name != ".lock" for path in out.iterdir()):
            raise UserError(f"{out} exists and has no rounds.json; choose another --out")
        return
    before, now = _flat(read_json(file, HINT).get("options", {})), _flat(asdict(options))
    different = [
        f"{name} {before.get(name)} != {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in MAY_CHANGE
    ]
    if different:
        raise UserError(f"{out} has rounds of other settings ({'; '.join(different)}); choose another --out")


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


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
        if not results.exists():
            log(f"round {self.number} of {self.options.rounds}")
            self.collect()
            self.extract()
            self.train()
            if (options := self.options).controller:
                train_controller(self.path("runs"), options.controller, self.actor(), cluster=options.cluster)
            self.evaluate(results)
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
        options, choice, store = self.options, self.options.encoder, self.path("stores", ".zarr")
        frames = FrameDataset.open(self.path("frames"))
        weights = choice.weights and Path(choice.weights)
        if weights is None and encoders.get_entry(choice.name).fit:
            weights = self.out / "encoder.safetensors"
            first = FrameDataset.open(replace(self, number=1).path("frames"))
            how = encoders.fit_options(choice.name, choice.fit)
            fit(first, choice.name, weights, how, max_frames=choice.max_frames, device=options.device, measure=False)
        own = {name: getattr(choice, name) for name in ENCODER_OPTIONS}
        encoder = encoders.create(choice.name, weights=weights, device=options.device, **own)
        dtype, batch = choice.store_dtype, options.batch
        extract_together(
            frames, with_log_variances([(encoder, store)]), dtype=dtype, batch=batch, cluster=options.cluster
        )

    def train(self) -> None:
        """Go on with the run of the round before, on the stores of all rounds so far."""
        run, own, rounds = self.path("runs"), self.options.train, self.number
        if rounds > 1 and not run.exists():
            temporary = temporary_for(run)
            shutil.copytree(
                self.before().path("runs"), temporary, symlinks=True, ignore=shutil.ignore_patterns("plan-*")
            )
            temporary.rename(run)
            sync(run.parent)
        first, *more = (replace(self, number=number).path("stores", ".zarr") for number in range(1, rounds + 1))
        # Shares of all steps so far.
        whole = replace(own, steps=rounds * own.steps, warmup=own.warmup / rounds, decay=own.decay / rounds)
        train(first, run, whole, more=more, resume=rounds > 1)

    def evaluate(self, results: Path) -> None:
        """Act in the episodes of the evaluation; baselines are the same in all rounds, so the first one has them."""
        plan, out = self.options.plan, results.parent
        if self.number > 1:
            plan = replace(plan, baselines="")
        if self.options.controller:
            plan = replace(plan, policy=str(self.actor()))
        context = EvalContext(self.path("runs"), plan)
        episodes, found = evaluate(context, plan, out, self.options.cluster)
        write_episodes(out / "episodes.parquet", episodes, context.env.spec.thresholds)
        for unfinished in out.glob("unfinished-*"):
            shutil.rmtree(unfinished)
        write_json(results, found)

    def figures(self, results: Row) -> Row:
        """Return the row of a round that is done."""
        cards = [FrameDataset.open(replace(self, number=n).path("frames")).card for n in range(1, self.number + 1)]
        names = (
            "episodes",
            "successes",
            "success_rate",
            "ci95",
            "held",
            "held_ci95",
            "mean_env_steps",
            "threshold",
            "return",
        )
        return {
            "round": self.number,
            "policy": cards[-1].policy,
            "collected_episodes": cards[-1].episodes,
            "frames": cards[-1].frames,
            "total_frames": sum(card.frames for card in cards),
            "steps": self.number * self.options.train.steps,
            **{name: results[name] for name in (*names, "by_threshold") if name in results},
            "baselines": results["baselines"],
        }
