"""Trains world models on cached latents. Opens no image and loads no encoder."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows, batch_windows
from wmcache.common.device import choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import not_written, write_json
from wmcache.common.paths import AnyPath, absolute
from wmcache.engine import loop
from wmcache.engine.checkpoint import Progress, checkpoints, last_checkpoint, load_weights
from wmcache.engine.optimisers import decay_groups
from wmcache.engine.ranks import SINGLE, Ranks
from wmcache.engine.schedules import warmup_constant_decay
from wmcache.trainer.feed import Feed, choose_residence
from wmcache.trainer.models import MODELS, DataShape, WorldModel, build, read_options
from wmcache.trainer.options import TrainOptions, check_options
from wmcache.trainer.resume import (
    MAY_CHANGE,
    MAY_CHANGE_ON_RESUME,
    MAY_CHANGE_WITH_THE_STAGE,
    check_settings,
    find_progress,
    stage_index,
    stages_left,
    stages_of,
)
from wmcache.trainer.runs import is_run, lock_run, read_config, write_settings

ROLLOUT_STEPS = 5
UNDEFINED = (
    "no skill (null in metrics.jsonl): the tokens of the held-out windows do not change, so copying the observed "
    "frame has no error to compare with, or the rollout is not finite"
)
Batch = Mapping[str, Tensor]


def train(
    cache: AnyPath,
    out: Path,
    options: TrainOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ranks: Ranks = SINGLE,
) -> dict[str, float | None]:
    """Train a world model on a store; the same call again continues where it was stopped.

    Several ranks cut each micro-batch into equal slices and average their gradients, so they train what a single process does, up to the
    order of sums. Batches do not depend on the number of ranks, and a run may continue with another number. Dropout and noise do depend
    on it: a single process continues with the generator in the checkpoint, ranks draw by seed, rank and step.

    Args:
        cache: the store, which all ranks read.
        out: the run's folder, which only rank 0 writes.
        options: see `TrainOptions`.
        resume: require a run to continue; allows other `steps` and another `learning_rate`.
        overwrite: start from scratch where a run exists.
        ranks: the processes that train together, which all call this, see `engine.ranks.joined`.

    Returns:
        The last validation's figures; empty where nothing was left to do, and on other ranks than 0.

    Raises:
        UserError: unusable store, a run with other settings, no checkpoint to resume, another process at work on the run, a batch that
            the ranks cannot share, or a loss that is not finite; `not-finite.json` in the run's folder then names its windows.
    """
    check_options(options)
    check_slices(options.batch, ranks.world)
    store = TokenStore.open(cache, mirrored=True)
    with lock_run(out) if ranks.is_main else nullcontext(), _readable_errors(out, compiled=options.compile):
        return _train(store, cache, out, options, ranks, resume=resume, overwrite=overwrite)


def _train(
    store: TokenStore, cache: AnyPath, out: Path, options: TrainOptions, ranks: Ranks, *, resume: bool, overwrite: bool
) -> dict[str, float | None]:
    windows = store.windows(
        options.history, 1, options.frameskip, "train", seed=options.split_seed, fraction=options.episodes_fraction
    )
    kind = MODELS.get(options.model)
    chosen = kind.configure(store, windows, read_options(options.model, options.model_options))
    extras = kind.extras(store, windows, chosen)
    options = replace(options, model_options=asdict(chosen))
    if options.epochs:
        options = replace(options, steps=max(1, options.epochs * len(windows) // (options.batch * options.accumulate)))
    device, shape = ranks.device(options.device), data_shape(store, options)
    dtype = choose_dtype(options.dtype, device)
    torch.manual_seed(options.seed)
    model = build(options.model, shape, options.model_options, statistics_of(store, options.frameskip)).to(device)
    model.check_pool(options.pool)
    config = {**asdict(options), "cache": absolute(cache), "shape": asdict(shape)}
    stages = stages_of(model.stages, options.stage)
    start = None if options.start is None else Path(options.start)
    progress = find_progress(out, model, stages, store.identity, config, start=start, overwrite=overwrite)
    if progress.stage in stages and not progress.finished and progress.step >= progress.begun + options.steps:
        raise UserError(
            f"stage {progress.stage} of {out} has had {progress.step - progress.begun} steps and is not finished; --steps must be more"
        )
    left = stages_left(model, stages, progress, options.steps)
    begins = stage_index(options.stage, model) > stage_index(progress.stage, model) >= 0
    free = MAY_CHANGE_WITH_THE_STAGE if begins else MAY_CHANGE_ON_RESUME if resume else MAY_CHANGE
    # Written only now: an option that is refused must not cost a run.
    if ranks.is_main:
        _write_settings(out, config, store, free, resume=resume, overwrite=overwrite, finished=not left)
    ranks.wait()
    if checkpoints(out):
        load_weights(last_checkpoint(out), model)
    windows, held_out = windows.with_extras(extras), validation_windows(store, options).with_extras(extras)
    result: dict[str, float | None] = {}
    for part in left:
        task = WorldModelTask(model, store, windows, held_out, out, options, ranks, device, dtype, part)
        result = task.train() or result
    if not left:
        ranks.log(f"{out}: all of its steps are done")
    return result


def _write_settings(
    out: Path,
    config: dict[str, Any],
    store: TokenStore,
    free: Collection[str],
    *,
    resume: bool,
    overwrite: bool,
    finished: bool,
) -> None:
    """Start a run, from scratch where it is overwritten, or check that it may continue with these settings."""
    exists = is_run(out)
    if resume and not checkpoints(out):
        raise UserError(f"{out} has no checkpoint to resume; run without --resume")
    if exists and overwrite:
        shutil.rmtree(out)
    elif exists:
        check_settings(out, config, store, free)
        before = read_config(out)
        config = {**config, "start": config["start"] or before.get("start")}
        if finished:  # with the steps that it has had
            config |= {name: before[name] for name in ("steps", "epochs", "learning_rate") if name in before}
    write_settings(out, config, store)


@dataclass
class WorldModelTask(loop.Task[Batch]):
    """A stage of a world model, or all of a model without stages, for the training loop.

    Attributes:
        network: the model.
        store: its tokens.
        windows, held_out: of that store, to train on and to validate on.
        out, options, ranks: see `train`.
        device, dtype: of computation.
        progress: where this stage begins, or continues.
    """

    network: WorldModel
    store: TokenStore
    windows: Windows
    held_out: Windows
    out: Path
    options: TrainOptions
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    unit: str = "windows"
    hint: str = "the last checkpoint, if any, is good: continue from it with --resume and a lower --lr"
    title: str = field(init=False)
    residence: str = field(init=False)
    _warned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """Choose where tokens are kept, which all ranks do before one of them fills memory."""
        self.title = " ".join(filter(None, ("wmtrain", self.progress.stage)))
        self._compiled: Any = torch.compile(self.network.loss) if self.options.compile else self.network.loss

    def train(self) -> dict[str, float | None]:
        """Train the stage; returns the last validation's figures."""
        options, stage, first = self.options, self.progress.stage, self.progress.step
        if stage:
            self.network.begin(stage)
            if first == self.progress.begun:  # independent of what was drawn before
                torch.manual_seed(options.seed + self.network.stages.index(stage))
        self.residence, why = choose_residence(self.store, self.device, options.residence, self.ranks.local_world)
        self.ranks.wait()  # until all have measured free memory, which the next step fills
        self._describe(self.progress.begun + options.steps)
        self.ranks.log(why)
        how = loop.LoopOptions(
            options.steps,
            options.batch,
            self.device,
            self.dtype,
            accumulate=options.accumulate,
            clip=options.clip or math.inf,
            log_every=options.log_every,
            validate_every=options.validate_every,
            checkpoint_every=options.checkpoint_every,
        )
        return loop.run(self, how, self.out, self.progress, self.ranks)

    def _describe(self, last: int) -> None:
        count = sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)
        short = self.windows.dropped_episodes
        world = f"{self.ranks.world} x " if self.ranks.world > 1 else ""
        self.ranks.log(
            f"{self.options.model}{self.progress.stage and f', {self.progress.stage}'}: {count / 1e6:.2f} M parameters, "
            f"{len(self.windows)} windows of {self.windows.length} frames{f', {short} episodes too short' if short else ''}, "
            f"{world}{self.device.type} {str(self.dtype).removeprefix('torch.')}, steps {self.progress.step} to {last}"
        )

    def optimiser(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return make_optimiser(self.network, self.options)

    def learning_rate(self, step: int) -> float:
        """Return the rate of warmup-constant-decay, from where the stage began."""
        options = self.options
        return warmup_constant_decay(
            step - self.progress.begun, options.steps, options.learning_rate, options.warmup, options.decay
        )

    @contextmanager
    def batches(self, first: int) -> Iterator[Iterator[Batch]]:
        """Read windows of cached latents ahead of the training."""
        ranks, options = self.ranks, self.options
        with Feed(
            self.store,
            self.windows,
            options.batch,
            options.seed,
            self.device,
            first,
            self.residence,
            ranks.rank,
            ranks.world,
        ) as feed:
            yield iter(feed.next, None)

    def before_step(self, step: int) -> None:
        """Seed what the ranks draw."""
        self.ranks.seed(self.options.seed, step)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the model's loss, on averaged tokens in the first share `pool_until` of the steps."""
        coarse = step - self.progress.begun < self.options.pool_until * self.options.steps
        losses: dict[str, Tensor] = self._compiled(batch, self.options.pool if coarse else 1)
        return losses

    def after_step(self) -> None:
        """Update what no gradient moves."""
        self.network.after_step()

    def next_loss(self, batch: Batch) -> Tensor:
        """Return the loss of the updated weights on the last micro-batch."""
        return self.network.loss(batch)["loss"]

    def validate(self) -> dict[str, float | None]:
        """Measure the model on held-out windows."""
        figures = self.network.validate(self.held_out, self.device, self.dtype)
        undefined = None in figures.values()
        if undefined and not self._warned:
            self.ranks.log(UNDEFINED)
        self._warned = undefined
        return figures

    def on_not_finite(self, step: int) -> None:
        """Write the windows of the step to `not-finite.json`."""
        options = self.options
        numbers = range(step * options.accumulate, (step + 1) * options.accumulate)
        chosen = [batch_windows(len(self.windows), options.seed, number, options.batch) for number in numbers]
        first_frames = self.windows.starts[np.concatenate(chosen)].tolist()
        write_json(self.out / "not-finite.json", {"step": step, "first_frames_of_windows": first_frames})


@contextmanager
def _readable_errors(out: Path, *, compiled: bool) -> Iterator[None]:
    """Turn errors of the system and of torch.compile, which compiles in the first step, into one line."""
    try:
        yield
    except OSError as error:
        # The user knows the run's folder; other files, such as torch's cache of compiled code, are named.
        file = Path(os.fsdecode(error.filename or out))
        if file.is_relative_to(out):
            raise not_written(out, error) from error
        raise (_compile_error(error) if compiled else not_written(file, error)) from error
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # slow to import

        if not compiled or not isinstance(error, TorchDynamoException):
            raise
        raise _compile_error(error) from error


def _compile_error(error: Exception) -> UserError:
    return UserError(
        f"--compile does not work on this machine ({' '.join(str(error).split(chr(10) * 2)[0].split())[:240]}); install a C++ compiler "
        "(g++, or the variable CXX) or set TORCHINDUCTOR_CACHE_DIR to a folder that programs may write to and run from, or run the same "
        "command without --compile"
    )


def check_slices(batch: int, world: int) -> None:
    """Raise UserError for a batch that cannot be cut into equal slices for the ranks."""
    if batch % world:
        raise UserError(
            f"--batch-size {batch} is cut into equal slices for {world} devices; choose a multiple of {world}"
        )


def make_optimiser(model: WorldModel, options: TrainOptions) -> torch.optim.AdamW:
    """Return AdamW of the parameters that the model trains now."""
    groups = decay_groups(model.parameter_groups(), options.weight_decay, decay_all=options.decay_all)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, options.beta2), fused=True)


def data_shape(store: TokenStore, options: TrainOptions) -> DataShape:
    """Return the sizes of a store's data for a model."""
    return DataShape(
        store.card.tokens_per_frame,
        store.card.token_dim,
        store.state.shape[1],
        options.frameskip * store.action.shape[1],
        options.history,
        store.card.token_grid[1],
    )


def statistics_of(store: TokenStore, frameskip: int) -> dict[str, Tensor]:
    """Return mean and standard deviation of tokens, proprio and action, for a model's buffers."""
    values = {
        "tokens_mean": store.mean,
        "tokens_std": store.std,
        "proprio_mean": store.state.mean(0),
        "proprio_std": store.state.std(0, ddof=1),
        "action_mean": np.tile(store.action.mean(0), frameskip),
        "action_std": np.tile(store.action.std(0, ddof=1), frameskip),
    }
    return {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in values.items()}


def validation_windows(store: TokenStore, options: TrainOptions) -> Windows:
    """Return windows of one observed frame and up to 5 that follow, from the val episodes."""
    longest = store.longest_episode("val", seed=options.split_seed)
    steps = max(1, min(ROLLOUT_STEPS, longest // options.frameskip - 1))
    return store.windows(1, steps, options.frameskip, "val", seed=options.split_seed)
