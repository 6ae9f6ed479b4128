"""All settings of an evaluation and of drawing what a model imagines, and the folders of results that are named by them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.common.options import Natural, Positive, Weight, option
from wmcache.common.options import check_options as validate_options
from wmcache.planner.protocols import PROTOCOLS

DRAWN = ("random-state", "dataset", "random-action")
"""Sources of starts and goals that are drawn again where they are too close."""
TASKS = "tasks"
SOURCES = (*DRAWN, TASKS)
"""Of starts and goals, beside files."""
BASELINES = ("random", "zero")
"""Of every evaluation that names no others."""
LONGEST_NAME = 120
EARLIER_THRESHOLD = 0.5
"""What options without a threshold are recorded with, as before it depended on the environment."""
NEWER = ("policy", "subgoals", "judge_columns", "model_temperature", "draw", "min_distance", "keep_tokens")
"""Options that earlier versions had not; at their defaults they are not recorded."""
PLAIN = str.maketrans({":": None, ",": "+"})
"""Characters that no folder's name has, and what replaces them."""
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class PlanOptions:
    """All settings of an evaluation.

    Every episode uses all of its budget: the planner does not learn whether it has arrived. Episode n starts, ends and searches by seed
    99 n + 1 (DINO-WM, plan.py). `context` and `observed` are 1, or for a model without proprio, and so without velocity, its history.
    """

    episodes: Positive = option(50, "Episodes to plan.", group="Evaluation")
    budget: Positive = option(100, "Env steps of each episode.")
    threshold: Annotated[float, Gt(0)] | None = option(
        None,
        "Distance below which a goal is reached; the environment's are always reported.  [default: the environment's largest]",
    )
    goals: str = option(
        "random-state",
        "Starts and goals: random-state, dataset, random-action, tasks (the environment's fixed ones in turn), or a Parquet file.",
    )
    goal_steps: Positive | None = option(
        None, "Env steps from start to goal (dataset, random-action).  [default: the horizon's]"
    )
    judge_columns: str = option(
        "",
        "Success is a Euclidean distance below --threshold on these columns: position,angle, or observation:8-9 for some numbers of "
        "one. Goals are frames of held-out episodes, --goal-steps after the start.  [default: the environment's distance, or the return]",
    )
    strict: bool = option(
        True,
        "Draw start and goal at least the largest reported threshold and one model step apart, or anywhere (DINO-WM).",
    )
    min_distance: Weight = option(
        0.0,
        "Draw start and goal at least so far apart, in the units of --threshold; strict pairs may be farther apart.",
    )
    policy: str | None = option(
        None,
        "Who acts: {names}, or the folder of a trained controller or actor; expert reads the simulator's state.  [default: mpc for a world "
        "model, actor for a trained policy]",
        group="Policy",
    )
    draw: bool = option(False, "Draw an actor's actions, to explore, instead of the most probable ones.", flag="--draw")
    subgoals: Literal["graph", "none"] = option(
        "graph", "What an actor steers to: frames along the cached ones, for goals beyond its reach, or the goal alone."
    )
    baselines: str = option(
        ",".join(BASELINES),
        "Baselines in the same episodes, separated by commas: untrained, or a policy that sees no frame.",
    )
    horizon: Positive = option(5, "Model steps of a plan.", group="Planning")
    execute: Positive = option(1, "Model steps before the next plan.")
    objective: Literal["last", "all", "return"] = option(
        "all",
        "Score the last imagined frame (DINO-WM), all, or the predicted rewards; return where an environment has no goal.",
    )
    distance: Literal["latent", "graph"] = option(
        "latent",
        "Distance to the goal: between latents (DINO-WM), or along the cached frames, for goals beyond the horizon.",
    )
    alpha: Weight = option(0.0, "Weight of proprio; above 0 the goal is more than an image.")
    mask: bool = option(
        False, "Score only tokens in which the present frame and the goal's differ (DDP-WM).", flag="--mask"
    )
    keep_tokens: Annotated[float, Gt(0), Le(1)] = option(
        1.0,
        "Share of the tokens that are imagined, drawn at random for each plan (Sparse Imagination, arXiv 2506.01392).",
        flag="--keep",
    )
    proprio: Literal["auto", "none"] = option("auto", "none: refuse a model that sees proprio.")
    context: Positive | None = option(None, "Frames that an imagined step sees.  [default: 1; without proprio all]")
    observed: Positive | None = option(None, "Live frames that a plan starts from.  [default: 1; without proprio all]")
    model_temperature: Weight | None = option(
        None, "Temperature of what the model draws; 0: nothing is drawn.  [default: the run's]"
    )
    solver: str = option("cem", "Solver: {names}.", group="Solver")
    search: dict[str, Any] = field(default_factory=dict)
    batch: Positive = option(50, "Episodes planned at once.", flag="--batch-size", group="Run")
    seed: Natural = option(0, "Number of the first episode.", group="Evaluation")
    env: str | None = option(None, "Environment to plan in, instead of the data's.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.", group="Run")
    dtype: Precision = option("auto", "Precision of the model.")


def check_options(options: PlanOptions) -> None:
    """Refuse, as a UserError, what no evaluation can be made of."""
    validate_options(options)
    if options.mask and options.distance != "latent":
        raise UserError(f"--mask weighs tokens, and --distance {options.distance} has none; leave one of them out")
    if options.keep_tokens < 1 and options.distance != "latent":
        raise UserError(
            f"--keep {options.keep_tokens} leaves out tokens that --distance {options.distance} needs; leave one of them out"
        )
    if options.judge_columns and options.threshold is None:
        raise UserError(
            f"--judge-columns {options.judge_columns} needs a --threshold, in units of these columns; add it"
        )
    if options.judge_columns and options.goals not in (PlanOptions().goals, "dataset"):
        raise UserError(
            f"--judge-columns {options.judge_columns} takes goals from frames; leave out --goals {options.goals}"
        )
    if options.min_distance and options.goals not in DRAWN:
        raise UserError(
            f"--min-distance {options.min_distance:g}: the pairs of --goals {options.goals} are taken as they are; leave one of them out"
        )
    if options.execute > options.horizon:
        raise UserError(f"--execute {options.execute} is more than the --horizon of {options.horizon} model steps")


@dataclass(frozen=True)
class ImagineOptions:
    """All settings of open-loop rollouts beside the real frames; saved in `metrics.json`."""

    steps: Positive = option(10, "Model steps from one observed frame.")
    windows: Positive = option(64, "Held-out windows that are compared.")
    videos: Natural = option(2, "Videos to write, each of 4 windows side by side.")
    context: Positive | None = option(None, "Frames that an imagined step sees.  [default: the history]")
    seed: Natural = option(0, "Seed of the sample of windows.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.")
    dtype: Precision = option("auto", "Compute precision.")
    lpips: bool = option(True, "Try to compute LPIPS; its network is fetched once, 244 MB.")


@dataclass(frozen=True)
class TraverseOptions:
    """All settings of a picture of latent traversals; saved beside it."""

    latents: Positive = option(10, "Latents to draw, those of the largest variance first.")
    frame: Natural = option(0, "Frame of the store whose latents are moved.")
    width: Annotated[float, Gt(0)] = option(
        2.0, "How far a latent is moved to each side, in standard deviations over the store."
    )


@dataclass(frozen=True)
class DreamOptions:
    """All settings of imagined episodes; saved in `dream.json`."""

    episodes: Positive = option(100, "Episodes to imagine.")
    steps: Positive | None = option(
        None, "Model steps of an episode, at most.  [default: those of the longest one in the store]"
    )
    policy: str = option(
        "random", "Who acts: random or zero, as in wmplan, or the folder of a trained controller or actor."
    )
    temperature: Weight | None = option(None, "Temperature of what the model draws.  [default: the run's]")
    split: Literal["train", "val", "all"] = option("val", "Episodes of the store whose first frames are the starts.")
    pictured: Natural = option(4, "Episodes in the video and the picture; 0 draws none.")
    seed: Natural = option(0, "Number of the first episode, which is its seed.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.")


def recorded(options: PlanOptions) -> dict[str, Any]:
    """Return the options by which an evaluation is known: not the baselines, nor those at their defaults that are newer than others."""
    known, usual = asdict(options), asdict(PlanOptions())
    del known["baselines"]
    known["threshold"] = known["threshold"] or EARLIER_THRESHOLD
    for name in NEWER:
        if known[name] == usual[name]:
            del known[name]
    if not options.strict or options.goals not in DRAWN:  # evaluations from before it existed keep their fingerprint
        del known["strict"]
    return known


def is_policy_folder(policy: str) -> bool:
    """Return whether `--policy` is a folder, and no registered name."""
    return (Path(policy) / "config.json").is_file()


def policy_name(policy: str) -> str:
    """Return the registered name of `--policy`, which the config.json of a folder has; raises UserError where it has none."""
    if not is_policy_folder(policy):
        return policy
    hint = f"name a policy, or act with a run by: wmplan --run {policy}"
    name = read_json(Path(policy) / "config.json", hint).get("policy")
    if not isinstance(name, str):
        raise UserError(f"--policy {policy}: the folder is not a policy's; {hint}")
    return name


def policy_run(folder: Path) -> Path | None:
    """Return the run that the policy of a folder acts with; None for the folder of a run or any other."""
    if not is_policy_folder(str(folder)):
        return None
    run = read_json(folder / "config.json", "restore it from a copy").get("run")
    return Path(run) if isinstance(run, str) else None


def policy_weights(folder: Path) -> Path:
    """Return the file of a policy's parameters in its folder; raises UserError where it has no checkpoint yet."""
    from wmcache.engine.checkpoint import FILES, last_checkpoint  # here, because every command imports this module

    if (folder / "checkpoints").is_dir():
        return last_checkpoint(folder) / FILES[0]
    return folder / f"{policy_name(str(folder))}.safetensors"


def absolute_file(name: str) -> str:
    """Return a file's absolute path; a name that is not a file's stays as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def default_out(run: Path, protocol: str | None, options: PlanOptions, threshold: float | None = None) -> Path:
    """Return the folder of an evaluation in its run: named by protocol, sizes and every option that differs from the protocol's.

    Args:
        threshold: the environment's, which `None` stands for.
    """
    usual = {**asdict(PlanOptions()), "threshold": threshold, **(PROTOCOLS.get(protocol) if protocol else {})}
    known = {**asdict(options), **options.search}
    in_every_name = {
        "search",
        "episodes",
        "budget",
        "env",
        "baselines",
        *(() if protocol else ("objective", "execute")),
    }
    differ = {name: value for name, value in known.items() if name not in in_every_name and value != usual.get(name)}
    # Folders of earlier versions have these first.
    first = [name for name in ("policy", "solver", "mask", "distance", "goals") if name in differ]
    parts = [protocol or f"{options.objective}-x{options.execute}"]
    parts += [_name_part(name, differ[name]) for name in dict.fromkeys([*first, *differ])]
    parts += [f"{options.episodes}x{options.budget}", _name_part("env", options.env) if options.env else ""]
    name = "-".join(["plan", *filter(None, parts)])
    return run / (name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{_digest(name)}")


def _name_part(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    if (name == "goals" and value not in SOURCES) or (name == "env" and Path(value).suffix):
        return f"{Path(value).stem}-{_digest(value)}"  # files of several folders may have the same name
    if name in ("policy", "solver", "distance", "objective", "goals", "env"):
        return Path(value).name
    if name == "execute":
        return f"x{value}"
    return f"{flag}-{value.translate(PLAIN)}" if isinstance(value, str) else f"{flag}{value}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def refuse_other_results(out: Path, options: PlanOptions) -> None:
    """Raise UserError where `out` has results of other options."""
    if not (out / "results.json").exists():
        return
    usual = {"strict": False, **{name: getattr(PlanOptions(), name) for name in NEWER}}
    kept = {**usual, **read_json(out / "results.json", "choose another --out").get("options", {})}
    kept["threshold"] = kept.get("threshold") or EARLIER_THRESHOLD
    wanted = {**usual, **recorded(options)}
    if options.goals not in DRAWN:
        kept["strict"] = False
    different = [f"{name} {kept.get(name)} != {wanted[name]}" for name in wanted if kept.get(name) != wanted[name]]
    if different:
        raise UserError(f"{out} has results of other options: {'; '.join(different)}; choose another: --out {out}-2")
