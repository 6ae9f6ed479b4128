"""A run loaded for planning: its model, encoder, environment and store, checked against each other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.common.columns import of_role
from wmcache.common.device import choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.common.jsonfiles import dump_json
from wmcache.common.paths import AnyPath
from wmcache.envs import Environment, find_environment
from wmcache.pipeline.encoders import COSINE_TOLERANCE, Encoder
from wmcache.pipeline.encoders.changes import LEAST_CHANGE, changes_for
from wmcache.planner.base import Observation
from wmcache.planner.decode import load_encoder
from wmcache.planner.goals import start_and_goal
from wmcache.planner.graph import LatentGraph
from wmcache.planner.options import (
    DRAWN,
    SOURCES,
    PlanOptions,
    Precision,
    check_options,
    is_policy_folder,
    policy_name,
    policy_weights,
    recorded,
)
from wmcache.planner.solvers import make_solver, option_names
from wmcache.planner.success import success_of
from wmcache.planner.world import draw_again, draw_states, open_world, world_name
from wmcache.trainer.models import WorldModel
from wmcache.trainer.runs import (
    data_split,
    load_trained,
    moved_caches,
    needs_world_model,
    open_store,
    read_config,
    read_identity,
    require_actions,
    weights_checksum,
)

CHECKED_FRAMES = 16
DISCRETE_SOLVER = "categorical-cem"


class EvalContext:
    """A run loaded for planning.

    Attributes:
        drift: see `live_drift`.
        blind: the model sees no proprio.
        context_frames: frames that an imagined step sees. With velocity in proprio a single frame is the whole state, and a longer
            context costs more and accumulates the model's own errors.
        observed: newest live frames of those between two plans that the model observes.
        graph: with `--distance graph`, else None.
        action_bounds: float32 [A] each, lowest and highest env actions. discrete: they are one-hot.
        success: what episodes are judged by.
        env: for its spec, geometry and distance; episodes run in others, see `open_env`.
    """

    def __init__(
        self,
        run: Path,
        options: PlanOptions,
        *,
        weights: Path | None = None,
        cache: AnyPath | Sequence[AnyPath] | None = None,
        untrained: bool = False,
    ) -> None:
        """Load a run, and check that live encoding reproduces its store.

        Args:
            weights, cache: the encoder's weights and the store, or its stores in order, if they have moved.
            untrained: use random weights in place of the run's, as a baseline.
        """
        check_options(options)
        self.run, self.weights, self.caches, self.untrained = run, weights, moved_caches(cache), untrained
        self.config = read_config(run)
        self.card, _ = read_identity(run)
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(options.dtype, self.device)
        self.model = load_trained(run, self.device, untrained=untrained)
        require_actions(self.model, run)
        if missing := self.model.stage_before_planning(self.model.stage_name):
            raise UserError(f"not ready for planning: {run}; train it with the same options and --stage {missing}")
        self.frameskip = int(self.config["frameskip"])
        self.encoder = self._load_encoder(options.device)
        self.store = open_store(run, self.caches)
        self._env_name = options.env
        self.env = self._open_checked()
        self.success = success_of(self.env, self.store, options.judge_columns)
        if self.by_return and not of_role(self.env.spec.columns, "reward"):
            raise UserError(f"environment {self.env.spec.id} has neither thresholds nor a reward; add --judge-columns")
        self.discrete = self.store.discrete
        options = self.settled(options)
        self.image_size = int(self.card.dataset["image_size"])
        self.drift = live_drift(self.store, self.encoder)
        self.blind = self.model.blind
        self.context_frames, self.observed = self._count_frames(options)
        if isinstance(self.model, WorldModel):
            self.model.context, self.model.observed = self.context_frames, self.observed
        self.temperature = self._set_temperature(options)
        own = {"frameskip": self.frameskip} if "frameskip" in option_names(options.solver) else {}
        self.solver = make_solver(options.solver, **{**own, **options.search})
        self.graph = self.cached_graph if options.distance == "graph" else None
        self.action_bounds = self.store.bounds
        if self.policy(options) == "mpc" and getattr(self.solver, "discrete", False) != self.discrete:
            kind = "one-hot, so choose --solver categorical-cem" if self.discrete else "not discrete; choose another"
            raise UserError(f"--solver {options.solver}: the actions of {self.run} are {kind}")
        self._changes = changes_for(self.card.token_grid, self.frameskip, options.device) if options.mask else None

    @property
    def precision(self) -> Precision:
        """The compute precision, as an option's value."""
        return cast(Precision, str(self.dtype).removeprefix("torch."))

    @property
    def by_return(self) -> bool:
        """Whether the environment has no goal, and success is its return."""
        return self.success.by_return

    def proprio(self, observation: Observation) -> Tensor:
        """Return the proprio that the model sees, float32 [E, P]; P is 0 where its store had none."""
        wanted, found = self.model.shape.proprio_dim, observation.proprio.shape[1]
        if wanted not in (0, found):
            raise UserError(f"{self.run} was trained with {wanted} numbers of proprio, its environment has {found}")
        return torch.from_numpy(observation.proprio[:, :wanted]).to(self.device)

    def open_env(self, count: int = 1, image_size: int | None = None) -> Environment:
        """Open `count` copies of the environment to plan in; arguments as for `open_world`."""
        return open_world(self.card, self._env_name, count=count, image_size=image_size)

    def draw(self, states: NDArray[np.float64], image_size: int | None = None) -> NDArray[np.uint8]:
        """Render frames [n, S, S, 3] of states [n, S] of the environment to plan in."""
        return draw_states(self.card, states, name=self._env_name, image_size=image_size)

    def _open_checked(self) -> Environment:
        env = self.open_env()
        if self._env_name and (different := self._kind_differs(env)):
            raise UserError(
                f"--env {self._env_name}: {different} of {self.store.path}; choose an environment of the same kind"
            )
        if env.spec.action.width != self.store.action.shape[1]:
            wanted = f"{env.spec.action.width} action values, not the {self.store.action.shape[1]} of {self.store.path}"
            raise UserError(f"environment {env.spec.id} has {wanted}; choose another --env")
        return env

    def _kind_differs(self, env: Environment) -> str:
        """Describe how an environment differs from the kind of the store's; "" where it does not."""
        recorded, layout = str(self.card.dataset.get("env")), self.card.layout
        assert self._env_name is not None
        if not issubclass(find_environment(self._env_name), find_environment(recorded, layout)):
            return f"another kind than {recorded}, the environment"
        for name, column in self.store.columns.items():
            if name in env.spec.columns and env.spec.columns[name].shape != column.shape:
                return f"its {name} has {env.spec.columns[name].width} numbers, not the {column.width}"
        return ""

    def _load_encoder(self, device: str) -> Encoder:
        encoder = load_encoder(self.run, self.weights, device)
        if encoder.lag > self.frameskip:
            raise UserError(
                f"the encoder's lag of {encoder.lag} env steps is more than the frameskip of {self.run}, {self.frameskip}; "
                f"train with --frameskip {encoder.lag} or more, or extract with a smaller --lag"
            )
        return encoder

    def _count_frames(self, options: PlanOptions) -> tuple[int, int]:
        if options.proprio == "none" and not self.blind:
            raise UserError(f"{self.run} was trained with proprio; train without: wmtrain --proprio none --out RUN")
        if options.alpha and self.blind:
            raise UserError(f"--alpha {options.alpha} weights proprio, which {self.run} has not; leave it at 0")
        if not isinstance(self.model, WorldModel):
            return 1, 1
        if self.model.recurrent:
            if options.context or options.observed:
                raise UserError(
                    f"--context and --observed: the model of {self.run} remembers all frames; leave them out"
                )
            return 1, options.execute
        history = self.model.shape.history
        usual = history if self.blind else 1  # a single frame shows no velocity
        context = min(options.context or usual, history)
        if (options.observed or 0) > context:
            raise UserError(f"--observed {options.observed} is more than the {context} frames of --context; raise it")
        return context, min(options.observed or usual, context)

    def _set_temperature(self, options: PlanOptions) -> float | None:
        """Set the model's temperature, and return it; None for a model that draws nothing."""
        if not isinstance(self.model, WorldModel) or not self.model.draws:
            if options.model_temperature is not None:
                raise UserError(f"--model-temperature: the model of {self.run} draws nothing; leave it out")
            return None
        if options.model_temperature is not None:
            self.model.temperature = options.model_temperature
        return self.model.temperature

    @cached_property
    def cached_graph(self) -> LatentGraph:
        """Graph of the frames that the run was trained on."""
        episodes = self.store.split("train", *data_split(self.config))
        return LatentGraph.from_store(self.store, self.frameskip, self.device, episodes)

    @property
    def world_model(self) -> WorldModel:
        """The model, to imagine with; raises UserError where the run is of a policy."""
        if not isinstance(self.model, WorldModel):
            raise needs_world_model(self.run)
        return self.model

    def policy(self, options: PlanOptions) -> str:
        """Return the registered name of the policy that acts."""
        if options.policy:
            return policy_name(options.policy)
        return "mpc" if isinstance(self.model, WorldModel) else "actor"

    def encode(self, observation: Observation) -> Tensor:
        """Encode live frames, float [E, N, D]."""
        image, earlier = observation.image, observation.earlier
        return self.encoder(image if earlier is None else np.stack([earlier, image], 1))

    def mask(self, images: NDArray[np.uint8], goal_images: NDArray[np.uint8]) -> Tensor:
        """Mark the tokens in which frames [E, S, S, 3] differ from the goal's, bool [E, N]; all tokens of equal frames."""
        assert self._changes is not None
        differs = (self._changes(np.stack([images, goal_images], 1)) > LEAST_CHANGE).any(-1)
        return differs | ~differs.any(1, keepdim=True)

    def settled(self, options: PlanOptions) -> PlanOptions:
        """Replace what depends on the environment: the threshold, and without a goal the objective; the solver of discrete actions.

        Raises:
            UserError: an option that needs a goal, where the environment has none.
        """
        if self.discrete and options.solver == PlanOptions().solver:
            known = option_names(DISCRETE_SOLVER)
            search = {name: value for name, value in options.search.items() if name in known}
            options = replace(options, solver=DISCRETE_SOLVER, search=search)
        if self.success.named:
            return replace(options, goals="dataset")
        if not self.by_return:
            return replace(options, threshold=options.threshold or self.success.thresholds[0])
        usual = PlanOptions()
        for name in ("threshold", "goals", "goal_steps", "min_distance", "distance", "alpha", "mask"):
            if getattr(options, name) != getattr(usual, name):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} needs a goal, and environment {self.env.spec.id} has none; leave it out")
        return replace(options, objective="return")

    def goal_steps(self, options: PlanOptions) -> int:
        """Return the env steps from start to goal, for sources of goals that need them."""
        return options.goal_steps or options.horizon * self.frameskip

    def resolved(self, options: PlanOptions) -> dict[str, Any]:
        """Return the options as they were used: with the values that `None` and `auto` stood for."""
        used = {
            **asdict(options),
            "policy": self.policy(options),
            "context": self.context_frames,
            "observed": self.observed,
            "model_temperature": self.temperature,
            "search": asdict(self.solver),
            "env": world_name(self.env),
            "goal_steps": self.goal_steps(options),
            "device": str(self.device),
            "dtype": self.precision,
        }
        unused = set() if isinstance(self.model, WorldModel) and not self.model.recurrent else {"context", "observed"}
        unused |= {"model_temperature"} if self.temperature is None else set()
        unused |= {"goal_steps"} if options.goals == "random-state" else set()
        unused |= set() if options.judge_columns else {"judge_columns"}
        unused |= set() if options.draw else {"draw"}
        unused |= set() if options.min_distance else {"min_distance"}
        unused |= set() if options.keep_tokens < 1 else {"keep_tokens"}
        unused |= {"goals", "threshold", "strict", "distance", "alpha", "mask", "subgoals"} if self.by_return else set()
        if options.goals not in DRAWN:
            unused |= {"goal_steps", "strict"}
        return {name: value for name, value in used.items() if name not in unused}

    def fingerprint(self, options: PlanOptions) -> str:
        """Hash all that the episodes depend on: options, the model's weights, goals, environment and the store's identity."""
        weights = weights_checksum(self.run)
        goals = "" if options.goals in SOURCES else sha256_of(Path(options.goals))
        parts = [recorded(options), weights, goals, self.store.identity.to_json(), self.env.spec.world]
        if options.policy and is_policy_folder(options.policy):
            parts.append(sha256_of(policy_weights(Path(options.policy))))
        known = dump_json([*parts, "untrained"] if self.untrained else parts)
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def live_drift(store: TokenStore, encoder: Encoder) -> dict[str, float]:
    """Render and encode some cached frames again, as live frames are; return the smallest cosine and the largest relative error.

    Raises:
        UserError: the cosine is below `COSINE_TOLERANCE`, so plans would be made in another latent space than the model's.
    """
    frames = np.linspace(0, len(store) - 1, CHECKED_FRAMES).astype(int)
    live = draw_again(store, frames)
    if encoder.lag:
        live = np.stack([draw_again(store, frames - np.minimum(encoder.lag, store.step[frames])), live], 1)
    drift = encoder.drift(live, store.gather(frames))
    if not drift["cosine"] > COSINE_TOLERANCE:
        raise UserError(
            f"live frames do not give the tokens of {store.path}: smallest cosine {drift['cosine']:.4f}, allowed {COSINE_TOLERANCE}; "
            f"use the renderer and libraries of {store.path / 'zarr.json'}, or extract a store on this machine and train on it"
        )
    return drift


def random_episode(context: EvalContext, number: int) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Return states [2, S] of the random start and goal of an episode, and frames [2, S, S, 3] of them.

    Raises:
        UserError: the environment has no goal.
    """
    if not context.env.spec.thresholds:
        raise UserError(f"environment {context.env.spec.id} has no goal; choose a run of another environment")
    states = np.concatenate(start_and_goal("random-state", [number], context.env, context.store, 0))
    return states, context.draw(states)
