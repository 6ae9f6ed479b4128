"""Trains world models and policies on cached latents. Opens no image and loads no encoder."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from wmcache.cache.joined import open_stores
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Goals, Windows, batch_windows
from wmcache.common.device import choose_dtype, compile_errors
from wmcache.common.errors import UserError
from wmcache.common.files import not_written, write_whole
from wmcache.common.jsonfiles import write_json
from wmcache.common.options import check_options
from wmcache.common.paths import AnyPath
from wmcache.common.readme import NAME as README
from wmcache.engine import loop
from wmcache.engine.checkpoint import Progress, last_checkpoint, load_training_state, load_weights, read_progress
from wmcache.engine.optimisers import decay_groups, warmup_constant_decay
from wmcache.engine.ranks import SINGLE, Ranks
from wmcache.trainer.feed import Feed, choose_residence
from wmcache.trainer.models import MODELS, DataShape, Trainable, WorldModel, build, read_options
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.perturb import check_shifts, perturb, radii_of
from wmcache.trainer.readme import write_run_readme
from wmcache.trainer.runs import describe_caches, find_stages, lock_run, prepare_run, recorded_start

ROLLOUT_STEPS = 5
UNDEFINED = "no skill (null in metrics.jsonl): held-out tokens do not change, or the rollout is not finite"
Batch = Mapping[str, Tensor]


def train(
    cache: AnyPath,
    out: Path,
    options: TrainOptions,
    *,
    more: Sequence[AnyPath] = (),
    resume: bool = False,
    overwrite: bool = False,
    ranks: Ranks = SINGLE,
) -> loop.Figures:
    """Train a world model on a store; the same call again continues where it was stopped.

    Several ranks cut each micro-batch into equal slices and average their gradients, so they train what a single process does, up to the
    order of sums. A run may continue with another number of ranks. Dropout and noise depend on it: a single process continues with the
    generator in the checkpoint, ranks draw by seed, rank and step.

    Several stores are read as one (`JoinedStore`). A run that is resumed may have more of them, after those that it had: it keeps the
    statistics of its first stores, and from that step on its batches are drawn from all windows.

    Args:
        more: stores to read as one with `cache`.
        resume: require a run to continue; allows other `steps` and another schedule of the learning rate.
        overwrite: start from scratch where a run exists.

    Returns:
        The last validation's figures; empty where nothing was left to do, and on other ranks than 0.
    """
    check_options(options)
    check_slices(options.batch, ranks.world)
    store = open_stores([cache, *more], mirrored=True)
    with lock_run(out) if ranks.is_main else nullcontext():
        try:
            return _train(store, [cache, *more], out, options, ranks, resume=resume, overwrite=overwrite)
        except OSError as error:
            file = Path(os.fsdecode(error.filename or out))  # one of the run's own, or for example one of the store
            raise not_written(out if file.is_relative_to(out) else file, error) from error


def _train(
    store: TokenStore,
    caches: list[AnyPath],
    out: Path,
    options: TrainOptions,
    ranks: Ranks,
    *,
    resume: bool,
    overwrite: bool,
) -> loop.Figures:
    kind, given = MODELS.get(options.model), read_options(options.model, options.model_options)
    if not store.action.shape[1] and kind.needs_actions(given):
        raise UserError(
            f"{store.path} has no actions, which {options.model} needs; choose another store, or a model with the option --actions none"
        )
    windows = training_windows(store, options, kind, given)
    chosen = kind.configure(store, windows, given)
    extras = kind.extras(store, windows, chosen)
    start = options.start if kind.stages or overwrite else options.start or recorded_start(out)
    options = replace(options, model_options=asdict(chosen), start=start)
    if options.epochs:
        options = replace(options, steps=max(1, options.epochs * len(windows) // (options.batch * options.accumulate)))
    device, shape = ranks.device(options.device), data_shape(store, options)
    torch.manual_seed(options.seed)
    statistics = statistics_of(store, options.frameskip)
    model = build(options.model, shape, options.model_options, statistics).to(device)
    model.check_pool(options.pool)
    check_shifts(options)
    config = {**asdict(options), "cache": describe_caches(caches), "shape": asdict(shape)}
    left, begins = find_stages(out, model, config, store.identity, overwrite=overwrite)
    # Written only now: an option that is refused must not cost a run.
    resumes = ranks.is_main and prepare_run(
        out, config, store, resume=resume, overwrite=overwrite, begins=begins, finished=not left
    )
    if ranks.broadcast(resumes):
        load_weights(last_checkpoint(out), model)
    elif not start:
        model.initialise(given)
    if not left:
        load_training_state(out, model, make_optimiser(model, options))  # reports damage
        _write_products(out, model, store, ranks, again=True)
        ranks.log(f"{out}: all steps are done")
        return {}
    goals = None if issubclass(kind, WorldModel) else kind.goals(chosen)  # rollouts need several frames, and no goal
    held_out = validation_windows(store, options, goals).with_extras(extras)
    same = ("steps", "batch", "accumulate", "log_every", "validate_every", "checkpoint_every")
    shared = {name: getattr(options, name) for name in same}
    how = loop.LoopOptions(
        **shared, device=device, dtype=choose_dtype(options.dtype, device), clip=options.clip or math.inf
    )
    result: loop.Figures = {}
    windows, radii = windows.with_extras(extras), radii_of(options.perturbed, statistics, device)
    for begin in left:
        task = _WorldModelTask(model, store, windows, held_out, out, options, how, ranks, begin, radii)
        with compile_errors() if options.compile else nullcontext():
            result = task.train()
    _write_products(out, model, store, ranks)
    return result


def _write_products(out: Path, model: Trainable, store: TokenStore, ranks: Ranks, *, again: bool = False) -> None:
    """Write the run's card, and the encoder of its newest checkpoint under a name of its own, as stores of its tokens refer to the file.

    With `again`, the card is written where it is missing: earlier versions wrote none.
    """
    if not ranks.is_main:
        return
    if not (again and (out / README).exists()):
        write_run_readme(out)
    if found := model.trained_encoder(store):
        tensors, header = found
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        step = read_progress(last_checkpoint(out)).step
        write_whole(out / f"encoder-{step:08d}.safetensors", save(kept, metadata=header))


@dataclass
class _WorldModelTask(loop.Task[Batch]):
    """A stage of a world model, or all of a model without stages, for the training loop; `begin` is where it begins or continues."""

    network: Trainable
    store: TokenStore
    windows: Windows
    held_out: Windows
    out: Path
    options: TrainOptions
    how: loop.LoopOptions
    ranks: Ranks
    begin: Progress
    radii: Mapping[str, Tensor]
    unit: str = "windows"
    hint: str = "the last checkpoint, if any, is good: continue from it with --resume and a lower --lr"
    residence: str = "disk"
    warned: bool = False

    def __post_init__(self) -> None:
        self.title = f"wmtrain {self.begin.stage}".strip()
        self._loss: Any = torch.compile(self.network.loss) if self.options.compile else self.network.loss

    def train(self) -> loop.Figures:
        options, model, windows, ranks, stage = self.options, self.network, self.windows, self.ranks, self.begin.stage
        if stage:
            model.begin(stage)
            if self.begin.step == self.begin.begun:  # draw independently of what was drawn before
                torch.manual_seed(options.seed + model.stages.index(stage))
        self.residence, why = choose_residence(self.store, self.how.device, options.residence, ranks.local_world)
        ranks.wait()  # until all have measured free memory, which the next step fills
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        dropped = f", {windows.dropped_episodes} episodes too short" if windows.dropped_episodes else ""
        ranks.log(
            f"{options.model}{stage and f', {stage}'}: {count / 1e6:.2f} M parameters, {len(windows)} windows of {windows.length} frames"
            f"{dropped}, {ranks.world} x {self.how.device.type} {str(self.how.dtype).removeprefix('torch.')}, "
            f"steps {self.begin.step} to {self.begin.begun + options.steps}, {why}"
        )
        return loop.run(self, self.how, self.out, self.begin, ranks)

    def optimiser(self) -> torch.optim.Optimizer:
        return make_optimiser(self.network, self.options)

    def learning_rate(self, step: int) -> float:
        options, step = self.options, step - self.begin.begun
        return warmup_constant_decay(step, options.steps, options.learning_rate, options.warmup, options.decay)

    @contextmanager
    def batches(self, first: int) -> Iterator[Iterator[Batch]]:
        batch, seed, rank, world = self.options.batch, self.options.seed, self.ranks.rank, self.ranks.world
        with Feed(self.store, self.windows, batch, seed, self.how.device, first, self.residence, rank, world) as feed:
            yield iter(feed.next, None)

    def before_step(self, step: int) -> None:
        self.ranks.seed(self.options.seed, step)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        coarse = step - self.begin.begun < self.options.pool_until * self.options.steps
        pool = self.options.pool if coarse else 1
        if self.radii:
            batch = perturb(lambda shifted: self._loss(shifted, pool), batch, self.radii)
        losses: dict[str, Tensor] = self._loss(batch, pool)
        return losses

    def after_step(self) -> None:
        self.network.after_step()

    def next_loss(self, batch: Batch) -> Tensor:
        return self.network.loss(batch)["loss"]

    def validate(self) -> loop.Figures:
        figures = self.network.validate(self.held_out, self.how.device, self.how.dtype)
        if None in figures.values() and not self.warned:
            self.ranks.log(UNDEFINED)
        self.warned = None in figures.values()
        return figures

    def on_not_finite(self, step: int) -> None:
        options = self.options
        numbers = range(step * options.accumulate, (step + 1) * options.accumulate)
        chosen = [batch_windows(len(self.windows), options.seed, number, options.batch) for number in numbers]
        first_frames = self.windows.starts[np.concatenate(chosen)].tolist()
        write_json(self.out / "not-finite.json", {"step": step, "first_frames_of_windows": first_frames})


def check_slices(batch: int, world: int) -> None:
    """Raise UserError for a batch that cannot be cut into equal slices for the ranks."""
    if batch % world:
        raise UserError(f"--batch-size {batch} is not divisible by {world} devices; choose a multiple of {world}")


def make_optimiser(model: Trainable, options: TrainOptions) -> torch.optim.AdamW:
    """Return AdamW of the parameters that the model trains now."""
    groups = decay_groups(model.parameter_groups(), options.weight_decay, decay_all=options.decay_all)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, options.beta2), fused=True)


def data_shape(store: TokenStore, options: TrainOptions) -> DataShape:
    """Return the sizes of a store's data for a model."""
    card = store.card
    return DataShape(
        tokens=card.tokens_per_frame,
        token_dim=card.token_dim,
        proprio_dim=0 if store.proprio is None else store.proprio.shape[1],
        action_dim=options.frameskip * store.action.shape[1],
        history=options.history,
        columns=card.token_grid[1],
        has_reward=store.reward is not None,
        has_end=store.terminated is not None,
    )


def statistics_of(store: TokenStore, frameskip: int) -> dict[str, Tensor]:
    """Return mean and standard deviation of tokens, proprio and action, for a model's buffers."""
    proprio = store.role("proprio")  # at its own precision
    proprio = np.zeros((len(store), 0)) if proprio is None else proprio
    values = {
        "tokens_mean": store.mean,
        "tokens_std": store.std,
        "proprio_mean": proprio.mean(0),
        "proprio_std": proprio.std(0, ddof=1),
        "action_mean": np.tile(store.action.mean(0), frameskip),
        "action_std": np.tile(store.action.std(0, ddof=1), frameskip),
    }
    return {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in values.items()}


def training_windows(store: TokenStore, options: TrainOptions, kind: type[Trainable], chosen: Any) -> Windows:
    """Return the windows of the train episodes, as a kind of model with options `chosen` needs them."""
    seen, goals = kind.window(chosen, options.history) - 1, kind.goals(chosen)
    settings: dict[str, Any] = {"seed": options.split_seed, "fraction": options.episodes_fraction, "goals": goals}
    whole = kind.whole_episodes(chosen)
    return store.windows(seen, 1, options.frameskip, "train", whole=whole, measured=True, **settings)


def validation_windows(store: TokenStore, options: TrainOptions, goals: Goals | None = None) -> Windows:
    """Return windows of one observed frame and up to 5 that follow, from the val episodes; with `goals`, of one frame and a goal."""
    longest = store.longest_episode("val", seed=options.split_seed)
    seen, steps = (0, 1) if goals else (1, max(1, min(ROLLOUT_STEPS, longest // options.frameskip - 1)))
    return store.windows(seen, steps, options.frameskip, "val", seed=options.split_seed, goals=goals)
