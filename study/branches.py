"""The cells of a study, for each encoder, model and seed."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.envs import open_environment
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders.weights import require_weights, weights_file
from wmcache.planner.options import BASELINES, SOURCES, PlanOptions, absolute_file, recorded
from wmcache.study.cells import ENCODER_OPTIONS, Cell
from wmcache.study.models import UNTRAINED, ModelChoice
from wmcache.study.options import EncoderChoice, StudyOptions
from wmcache.trainer.options import ActorOptions, TrainOptions
from wmcache.trainer.options import recorded as recorded_training

FREE = ("device", "residence", "log_every", "validate_every", "checkpoint_every")
"""Settings of a training that change no result."""


@dataclass(frozen=True)
class Branch:
    """The cells of an encoder, a model and a seed.

    Attributes:
        label: of the system in tables.
        train, actor: by fraction. plan: by fraction and the evaluation's name.
        baselines: by the evaluation's name and their own, those that `plan` does not evaluate itself; at the largest fraction.
    """

    label: str
    choice: EncoderChoice
    model: ModelChoice
    seed: int
    extract: Cell
    probe: Cell
    train: dict[float, Cell] = field(default_factory=dict)
    actor: dict[float, Cell] = field(default_factory=dict)
    plan: dict[tuple[float, str], Cell] = field(default_factory=dict)
    baselines: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All of them, each after its inputs."""
        known = (self.train, self.actor, self.plan, self.baselines)
        return [*self.extract.ancestors(), self.probe, *(cell for part in known for cell in part.values())]


def make_branches(options: StudyOptions, fingerprint: str) -> list[Branch]:
    """Make the cells of a study of that dataset; raise UserError where weights, goals or an environment do not exist."""
    found: list[Branch] = []
    for label, encoder, model in options.systems:
        for seed in options.seeds:
            extract = _extract_cell(encoder, seed, options, fingerprint)
            what = f"probe {encoder.label}, seed {seed}"
            probe = Cell("probe", encoder.name, what, {"frames": options.probe_frames}, {"extract": extract})
            branch = Branch(label, encoder, model, seed, extract, probe)
            _add_models(branch, options)
            _add_baselines(branch, options, {key for other in found for key in other.baselines})
            found.append(branch)
    return found


def _add_models(branch: Branch, options: StudyOptions) -> None:
    name, model, extract = branch.choice.name, branch.model, branch.extract
    for fraction in reversed(options.fractions):
        settings, how = _split(recorded_training(model.train), TrainOptions(), FREE)
        settings |= {"seed": branch.seed, "episodes_fraction": fraction}
        label = f"{branch.label}, seed {branch.seed}, {fraction:.0%} of the episodes"
        branch.train[fraction] = Cell("train", name, f"train {label}", settings, {"extract": extract}, how=how)
        inputs = {"train": branch.train[fraction], "extract": extract}
        if model.actor is not None:
            settings, how = _split(asdict(model.actor), ActorOptions(), FREE)
            settings["seed"] = branch.seed
            branch.actor[fraction] = Cell("actor", name, f"actor {label}", settings, dict(inputs), how=how)
            inputs["actor"] = branch.actor[fraction]
        for plan in options.plan:
            if (options_of_plan := model.options(plan)) is not None:
                settings, files = _plan_settings(options_of_plan)
                settings, how = _split(settings, PlanOptions(), ("device", "batch"))
                what = f"{plan.name} {label}"
                branch.plan[fraction, plan.name] = Cell("plan", name, what, settings, inputs, files, how)


def _add_baselines(branch: Branch, options: StudyOptions, known: Collection[tuple[str, str]]) -> None:
    """Add the baselines that are the branch's own, and those of no model that are not `known` from another branch."""
    for plan in options.plan:
        if (evaluated := branch.plan.get((options.fractions[-1], plan.name))) is None:
            continue
        own = [UNTRAINED] if branch.model.actor is None else []
        for name in plan.baselines:
            if name in BASELINES or (name not in own and (name == UNTRAINED or (plan.name, name) in known)):
                continue
            changed: dict[str, Any] = {"baselines": "", "policy": name}
            if name == UNTRAINED:
                fewer = min(plan.options.episodes, plan.untrained_episodes or plan.options.episodes)
                changed = {"baselines": "", UNTRAINED: True, "episodes": fewer}
            branch.baselines[plan.name, name] = replace(
                evaluated,
                label=f"{name} {plan.name} {branch.label}, seed {branch.seed}",
                settings={**evaluated.settings, **changed},
                inputs={role: evaluated.inputs[role] for role in ("train", "extract")},
            )


def _split(settings: dict[str, Any], usual: Any, free: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings with the usual values of those that change no result, and these as they are."""
    how = {name: settings[name] for name in free if name in settings}
    return settings | {name: getattr(usual, name) for name in how}, how


def _extract_cell(choice: EncoderChoice, seed: int, options: StudyOptions, fingerprint: str) -> Cell:
    entry = encoders.get_entry(choice.name)
    inputs: dict[str, Cell] = {}
    if choice.weights is None and entry.load is None:
        inputs["base"] = _extract_cell(_base_of(choice, entry.base, options), seed, options, fingerprint)
    family = encoders.family_of(choice.name)
    if choice.weights is None and encoders.get_entry(family).fit:
        fit = asdict(encoders.fit_options(family, {**choice.fit, "seed": seed}))
        fitting = {"name": family, "options": fit, "max_frames": choice.max_frames, "dataset": fingerprint}
        inputs["fit"] = Cell("fit", family, f"fit {choice.label}, seed {seed}", fitting, dict(inputs))
    files = {"weights": choice.weights, "base_weights": choice.base_weights}
    settings = {
        "name": choice.name,
        **{name: path and _weights_digest(path) for name, path in files.items()},
        **{name: getattr(choice, name) for name in ENCODER_OPTIONS},
        "store_dtype": choice.store_dtype,
        "dataset": fingerprint,
    }
    known = {name: absolute_file(path) for name, path in files.items() if path}
    return Cell("extract", choice.name, f"extract {choice.label}", settings, inputs, known)


def _plan_settings(options: PlanOptions) -> tuple[dict[str, Any], dict[str, str]]:
    settings, files = recorded(options), {}
    if options.env:
        files["env"] = absolute_file(options.env)
        spec = open_environment(options.env).spec
        settings["env"] = list(spec.world) if spec.layout else options.env
    if options.goals not in SOURCES:
        files["goals"] = absolute_file(options.goals)
        if not Path(options.goals).is_file():
            raise UserError(f"goals {options.goals} are neither {', '.join(SOURCES)} nor a file; fix the study's file")
        settings["goals"] = sha256_of(Path(options.goals))
    return settings, files


def _base_of(choice: EncoderChoice, default: str, options: StudyOptions) -> EncoderChoice:
    """The base that an adapter is fitted on, with the settings of the study's own encoder of that family if there is one."""
    name = choice.base or default
    family = encoders.family_of(name)
    of_study = (other for other in (*options.encoders, *options.others) if other.name == family)
    known = next(of_study, EncoderChoice(name=family))
    shared = {part: getattr(choice, part) for part in ENCODER_OPTIONS}
    own = {"weights": choice.base_weights} if choice.base_weights else {"weights": known.weights, "fit": known.fit}
    return EncoderChoice(name=name, label=f"{name} for {choice.label}", max_frames=known.max_frames, **own, **shared)


@functools.lru_cache
def _weights_digest(path: str) -> str:
    return sha256_of(weights_file(require_weights(Path(path))))
