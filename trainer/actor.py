"""Trains actor and critic in the imagination of a world model, from cached tokens alone.

config.json, identity.json, metrics.jsonl, checkpoints/    as of a run, see `runs.py`
validation.json                                            imagined rewards from held-out frames
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.joined import grows
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.files import not_written
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.options import check_options
from wmcache.common.paths import AnyPath
from wmcache.common.schema import parse
from wmcache.engine import loop
from wmcache.engine.checkpoint import Progress, checkpoints, last_checkpoint, read_progress
from wmcache.trainer.actor_critic import ActorCritic, ActorShape, Trajectory
from wmcache.trainer.dreaming import require_model_of
from wmcache.trainer.imagination import NOISE, Batch, Imagination, Starts, open_imagination
from wmcache.trainer.models import Belief
from wmcache.trainer.options import ActorOptions
from wmcache.trainer.runs import (
    data_split,
    differences,
    foreign_identity,
    is_run,
    load_network,
    lock_run,
    open_store,
    read_config,
    read_identity,
    weights_checksum,
    write_settings,
)

POLICY: Literal["dream-actor"] = "dream-actor"
"""Registered name of the policy that acts with an actor's folder."""
HINT = "train an actor with: wmtrain actor --run RUN"
MAY_CHANGE = {"run", "device", "steps", "log_every", "validate_every", "checkpoint_every"}
VALIDATION_WINDOWS = 256


@dataclass(frozen=True)
class ActorConfig:
    """What config.json has.

    Attributes:
        run: path of the world model's run. model_sha256: of its weights.
        reward: what the actor is trained for.
    """

    policy: Literal["dream-actor"]
    run: str
    model_sha256: str
    inputs: Annotated[list[str], Field(min_length=1, max_length=16)]
    shape: ActorShape
    reward: Literal["goal", "model"]
    options: ActorOptions


def train_actor(
    run: Path,
    out: Path,
    options: ActorOptions,
    *,
    cache: AnyPath | Sequence[AnyPath] | None = None,
    overwrite: bool = False,
    follow: bool = False,
) -> dict[str, Any]:
    """Train an actor in a world model's imagination; the same call again continues where it was stopped.

    Args:
        cache: the store of the run, or its stores in order, if they have moved.
        overwrite: start from scratch where an actor exists.
        follow: go on where the run was trained further since, perhaps on more stores after those that it had.

    Returns:
        The content of `validation.json`: `step`, `return` and `random_return`, see `ActorTask.validate`, and `reward`.
    """
    check_options(options)
    with lock_run(out, "wmtrain actor"):
        try:
            return _train(run, out, options, cache, overwrite=overwrite, follow=follow)
        except OSError as error:
            raise not_written(out, error) from error


def _train(
    run: Path,
    out: Path,
    options: ActorOptions,
    cache: AnyPath | Sequence[AnyPath] | None,
    *,
    overwrite: bool,
    follow: bool,
) -> dict[str, Any]:
    store = open_store(run, cache)
    dream = open_imagination(run, store, options)
    low, high = (bound.astype(float).tolist() for bound in store.bounds)
    shape = ActorShape(dream.size, low, high, store.discrete, dream.frameskip)
    reward: Literal["goal", "model"] = "goal" if dream.has_goals else "model"
    run_path, checksum = str(run.absolute()), weights_checksum(run)
    config = asdict(ActorConfig(POLICY, run_path, checksum, list(dream.inputs), shape, reward, options))
    exists = is_run(out)
    if exists and not overwrite:
        _refuse_other_settings(out, config, store, follow=follow)
        same_model = read_actor_config(out).model_sha256 == checksum
        if same_model and checkpoints(out) and (out / "validation.json").exists():
            done = read_json(out / "validation.json", "move it away, then run the same command again")
            if done.get("step") == read_progress(last_checkpoint(out)).step >= options.steps:
                return done
    split = data_split(read_config(run))
    starts = Starts(store, dream.windows(store, options.observed, "train", *split), options, "train", *split)
    held_out = Starts(store, dream.windows(store, options.observed, "val", split[0]), options, "val", split[0])
    dream.scale = dream.mean_distance(starts)
    torch.manual_seed(options.seed)
    network = ActorCritic(shape, options).to(dream.device)
    # Deleted only now: an option that is refused must not cost an actor.
    if exists and overwrite:
        shutil.rmtree(out)
    write_settings(out, config, store)
    first = read_progress(last_checkpoint(out)).step if checkpoints(out) else 0
    last = max(first, options.steps)
    task = ActorTask(network, dream, starts, held_out, out, options)
    how = loop.LoopOptions(
        last,
        options.batch,
        dream.device,
        torch.float32,
        clip=options.clip or math.inf,
        log_every=options.log_every,
        validate_every=options.validate_every,
        checkpoint_every=options.checkpoint_every,
    )
    count = sum(parameter.numel() for parameter in network.actor.parameters())
    shown = f"{count / 1e6:.2f} M parameters, sees {', '.join(dream.inputs)}, {len(starts.windows)} windows"
    tqdm.write(f"actor: {shown}, {dream.device.type}, steps {first} to {last}", file=sys.stderr)
    loop.run(task, how, out, Progress(first))
    result = {"step": last, "reward": reward, **task.validate()}
    write_json(out / "validation.json", result)
    return result


def _refuse_other_settings(out: Path, config: Mapping[str, Any], store: TokenStore, *, follow: bool) -> None:
    before = asdict(read_actor_config(out))
    old, new = ({**one, **one["options"]} for one in (before, config))
    free = MAY_CHANGE | {"options", *(["model_sha256"] if follow else [])}
    different = differences(old, new, new.keys() - free)
    if not (follow and grows(read_identity(out)[1], store.identity)):
        different += foreign_identity(out, store.identity)
    if different:
        raise UserError(f"{out} is an actor with other settings ({'; '.join(different)}); choose another --out")


@dataclass
class ActorTask(loop.Task[Batch]):
    """Actor and critic for the training loop; the world model stays as it is."""

    network: ActorCritic
    dream: Imagination
    starts: Starts
    held_out: Starts
    out: Path
    options: ActorOptions
    title: str = "wmtrain actor"
    unit: str = "windows"
    hint: str = "the last checkpoint, if any, is good; train with a lower --lr into another --out"

    def optimiser(self) -> torch.optim.Optimizer:
        """See `Task`."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.options.learning_rate, eps=1e-5)

    def learning_rate(self, step: int) -> float:  # noqa: ARG002
        """See `Task`."""
        return self.options.learning_rate

    def batches(self, first: int) -> AbstractContextManager[Iterator[Batch]]:
        """See `Task`."""
        return nullcontext(self.starts.batch(step, self.options.batch) for step in itertools.count(first))

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Task`."""
        beliefs, goals = self.dream.observe(batch)
        count = len(beliefs)
        belief = {name: torch.cat([one[name] for one in beliefs]) for name in beliefs[0]}
        goals = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in goals.items()}
        generator = generator_of(batch["seed"])
        with nullcontext() if self.network.dynamics else torch.no_grad():
            seen = self.imagine(belief, goals, generator)
        return self.network.loss(seen)

    def imagine(self, belief: Belief, goals: Mapping[str, Tensor], generator: torch.Generator) -> Trajectory:
        """Imagine what the actor draws."""
        actor, dream = self.network.actor, self.dream
        inputs = [dream.see(belief, goals)]
        drawn: list[Tensor] = []
        rewards: list[Tensor] = []
        continues: list[Tensor] = []
        for _ in range(self.options.horizon):
            actions = actor(inputs[-1].detach()).sample(generator)
            belief, reward, goes_on = dream.step(belief, actor.to_env(actions), goals, generator)
            inputs.append(dream.see(belief, goals))
            for values, value in ((drawn, actions), (rewards, reward), (continues, goes_on)):
                values.append(value)
        return Trajectory(*map(torch.stack, (inputs, drawn, rewards, continues)))

    def after_step(self) -> None:
        """See `Task`."""
        self.network.follow()

    def next_loss(self, batch: Batch) -> Tensor:
        """See `Task`."""
        return self.loss(batch, 0)["loss"]

    @torch.no_grad()
    def validate(self) -> loop.Figures:
        """Return the sum of rewards that the most probable actions reach from held-out frames, on average, and random actions."""
        self.network.eval()
        beliefs, goals = self.dream.observe(self.held_out.batch(0, VALIDATION_WINDOWS))
        actor, generator = self.network.actor, generator_of((self.options.seed, 0, NOISE))

        def drawn(_: Tensor) -> Tensor:
            return actor.random(VALIDATION_WINDOWS, generator)

        found: loop.Figures = {}
        for name, act in (("return", lambda seen: actor(seen).mode), ("random_return", drawn)):
            belief, total = beliefs[-1], torch.zeros(VALIDATION_WINDOWS, device=self.dream.device)
            going = torch.ones_like(total)
            for _ in range(self.options.horizon):
                belief, reward, continues = self.dream.step(
                    belief, actor.to_env(act(self.dream.see(belief, goals))), goals
                )
                total += going * reward
                going *= continues
            found[name] = float(total.mean())
        return found


def generator_of(seed: Sequence[int]) -> torch.Generator:
    """Return a generator on the CPU that depends on all numbers of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(tuple(seed)).generate_state(1, np.uint64)[0] >> 1))


def read_actor_config(folder: Path) -> ActorConfig:
    """Read the settings of an actor; raises UserError where the folder is not an actor's."""
    file = folder / "config.json"
    return parse(ActorConfig, read_json(file, HINT), file, HINT, fault="is not an actor's")


def load_actor(folder: Path, run: Path, device: torch.device) -> tuple[tuple[str, ...], ActorCritic]:
    """Load the newest actor of a folder, frozen, and the inputs that it sees.

    Raises:
        UserError: it was trained with another model than that of the run.
    """
    config = read_actor_config(folder)
    require_model_of(folder, config.run, config.model_sha256, run)
    return tuple(config.inputs), load_network(folder, lambda _: ActorCritic(config.shape, config.options), device)
