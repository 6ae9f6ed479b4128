"""The training loop, top to bottom: windows of cached latents in, checkpoints and metrics out. Opens no image, knows no encoder."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows, batch_windows
from wmcache.common.device import autocast, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import is_temporary, not_written
from wmcache.common.jsonfiles import dump_json, nulls, write_json
from wmcache.common.locks import exclusive
from wmcache.common.paths import AnyPath, absolute
from wmcache.common.progress import seconds_between_updates
from wmcache.engine.ranks import ALONE, STOPPING, Loss, Ranks, without_reduction
from wmcache.trainer.checkpoint import (
    Progress,
    checkpoints,
    last_checkpoint,
    load_training_state,
    load_weights,
    read_config,
    read_identity,
    save_checkpoint,
    settings_of,
    truncate_metrics,
)
from wmcache.trainer.feed import Feed, choose_residence
from wmcache.trainer.localization import localization, settle
from wmcache.trainer.models import DataShape, build, read_options
from wmcache.trainer.models.dino_wm import pool_grid
from wmcache.trainer.options import TrainOptions, check_options
from wmcache.trainer.stages import place_of, stages_of, take_up

ROLLOUT_STEPS = 5
VALIDATION_WINDOWS = 256
NOT_FINITE = (
    "the loss of step {step} is not finite; the last checkpoint in {run}, if any, is good: "
    "go on from it with --resume and a lower --lr"
)
NO_SKILL = (
    "no skill (null in metrics.jsonl): the tokens of the held-out windows do not change, so copying the observed "
    "frame has no error to compare with, or the rollout is not finite"
)
MAY_CHANGE = {
    *("cache", "device", "residence", "compile", "log_every", "validate_every", "checkpoint_every"),
    *("stage", "start"),
}
MAY_CHANGE_ON_RESUME = MAY_CHANGE | {"steps", "epochs", "learning_rate"}
MAY_CHANGE_WITH_THE_STAGE = MAY_CHANGE_ON_RESUME | {
    *("batch", "accumulate", "warmup", "decay", "beta2", "weight_decay", "decay_all", "clip"),
}


def train(
    cache: AnyPath,
    out: Path,
    options: TrainOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, float | None]:
    """Train a world model on a store; the same call again goes on where it was stopped.

    Several ranks cut each micro-batch into equal slices and average their gradients, so that they train what one process would, up to
    the order of sums, and a run goes on with any number of them: batches are the same. What dropout and noise draw is not: a process alone
    goes on with the generator that the checkpoint holds, ranks draw by seed, rank and step. So a resumed run is exact with the same number
    of ranks, and with another one where nothing is drawn. All ranks read the store and the run's folder, rank 0 alone writes.

    Args:
        cache: the store.
        out: the run's folder.
        options: see `TrainOptions`.
        resume: insist on going on; allows other `steps` and another `learning_rate`.
        overwrite: begin anew where a run exists.
        ranks: the processes that train together, which must all come here, see `engine.ranks.joined`.

    Returns:
        The last validation's metrics; none where there was nothing left to do, and none but on rank 0.

    Raises:
        UserError: unusable store, a run with other settings, no checkpoint to resume, somebody else at work on the run, a batch that the
            ranks cannot share, or a loss that is not finite; `not-finite.json` in the run's folder then says which windows gave it.
    """
    check_options(options)
    check_slices(options.batch, ranks.world)
    store = TokenStore.open(cache, mirrored=True)
    lock = out.with_name(f".{out.name}.lock")
    with exclusive(lock, out, wait=False) if ranks.leads else nullcontext(True) as alone:
        if not alone:
            raise UserError(f"another wmtrain is at work on {out}; wait for it, or choose another --out")
        try:
            return _train(store, cache, out, options, ranks, resume=resume, overwrite=overwrite)
        except OSError as error:
            # Of the run's own files a user knows the folder; others, as torch's cache of compiled code, are named.
            file = Path(os.fsdecode(error.filename or out))
            raise not_written(out if file.is_relative_to(out) else file, error) from error


@dataclass(frozen=True)
class _Job:
    """A training that is set up: what every stage of it uses."""

    store: TokenStore
    windows: Windows
    changes: TokenStore | None
    out: Path
    options: TrainOptions
    ranks: Ranks
    model: Any
    device: torch.device
    dtype: torch.dtype


def _train(
    store: TokenStore, cache: AnyPath, out: Path, options: TrainOptions, ranks: Ranks, *, resume: bool, overwrite: bool
) -> dict[str, float | None]:
    windows = store.windows(
        options.history, 1, options.frameskip, "train", seed=options.split_seed, fraction=options.episodes_fraction
    )
    # All of them, so that what a run says of itself does not depend on which were typed.
    changes, chosen = settle(store, windows, options.model, read_options(options.model, options.model_options))
    options = replace(options, model_options=asdict(chosen))
    if options.epochs:
        options = replace(options, steps=max(1, options.epochs * len(windows) // (options.batch * options.accumulate)))
    device = ranks.device(options.device)
    dtype = choose_dtype(options.dtype, device)
    shape = data_shape(store, options)
    config = {**asdict(options), "cache": absolute(cache), "shape": asdict(shape)}
    torch.manual_seed(options.seed)
    model = build(options.model, shape, options.model_options, statistics_of(store, options.frameskip)).to(device)
    if options.pool > 1 and not model.pools:
        raise UserError(f"{options.model} has no coarser grid of tokens; leave out --pool")
    pool_grid(torch.empty(1, 1, shape.tokens, 1), shape.columns, options.pool)  # refuses squares that do not fit
    stages = stages_of(model.stages, options.stage)
    start = None if options.start is None else Path(options.start)
    progress = take_up(out, model, stages, store.identity, config, start=start, overwrite=overwrite)
    if progress.stage in stages and not progress.finished and progress.step >= progress.begun + options.steps:
        raise UserError(
            f"stage {progress.stage} of {out} has had {progress.step - progress.begun} steps and is not finished; --steps must be more"
        )
    # Only now: an option that makes no sense must not cost a run that is there.
    begins = place_of(options.stage, model) > place_of(progress.stage, model) >= 0
    free = MAY_CHANGE_WITH_THE_STAGE if begins else MAY_CHANGE_ON_RESUME if resume else MAY_CHANGE
    if ranks.heard(ranks.leads and _prepare_folder(out, config, store, free, resume=resume, overwrite=overwrite)):
        load_weights(last_checkpoint(out), model)
    job = _Job(store, windows, changes, out, options, ranks, model, device, dtype)
    result: dict[str, float | None] = {}
    for stage in stages:
        if place_of(stage, model) < place_of(progress.stage, model):
            ranks.say(f"stage {stage} is done")
            continue
        result = _train_stage(job, stage, progress) or result
        begun = progress.begun if progress.stage == stage else progress.step
        # A stage that had more steps than are asked for now has had them.
        progress = Progress(max(progress.step, begun + options.steps), stage, begun, finished=True)
    return result


def _train_stage(job: _Job, stage: str, progress: Progress) -> dict[str, float | None]:
    """Train one stage of a model, or all of a model without stages, from where it is; returns the last validation's metrics."""
    out, options, ranks, model, device, dtype = job.out, job.options, job.ranks, job.model, job.device, job.dtype
    goes_on = progress.stage == stage and progress.step > progress.begun
    begun, first = (progress.begun if goes_on else progress.step), progress.step
    if stage:
        model.begin(stage)
    optimiser = make_optimiser(model, options)
    if goes_on:
        load_training_state(out, model, optimiser)
    elif stage:  # whatever has been drawn until now, in this process or in one before it
        torch.manual_seed(options.seed + model.stages.index(stage))
    if ranks.leads:
        truncate_metrics(out, first)
    compiling = _compile_errors if options.compile else nullcontext
    with compiling():
        forward = ranks.share(model, torch.compile(model.loss) if options.compile else model.loss)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    windows, last = job.windows, begun + options.steps
    dropped = f", {windows.dropped_episodes} episodes too short" if windows.dropped_episodes else ""
    residence, why = choose_residence(job.store, device, options.residence, ranks.local_world)
    ranks.wait()  # until all have measured, for the next thing is to fill that memory
    ranks.say(
        f"{options.model}{stage and f', {stage}'}: {count / 1e6:.2f} M parameters, {len(windows)} windows of {windows.length} frames"
        f"{dropped}, {f'{ranks.world} x ' if ranks.world > 1 else ''}{device.type} {str(dtype).removeprefix('torch.')}, "
        f"steps {first} to {last}"
    )
    ranks.say(why)
    validation = validation_windows(job.store, options)
    result: dict[str, float | None] = {}
    update, first_batch = seconds_between_updates(), first * options.accumulate
    with (
        Log(out) if ranks.leads else nullcontext() as log,
        Feed(
            job.store,
            windows,
            options.batch,
            options.seed,
            device,
            first_batch,
            residence,
            ranks.rank,
            ranks.world,
            job.changes,
        ) as feed,
        tqdm(
            total=options.steps,
            initial=first - begun,
            desc=" ".join(filter(None, ("wmtrain", stage))),
            unit=" steps",
            mininterval=update,
            disable=not ranks.leads,
        ) as bar,
        signals_between_steps() as stop,
    ):
        start, seen = time.perf_counter(), 0
        for step in range(first, last):
            rate = learning_rate(step - begun, options)
            ranks.seed(options.seed, step)
            with compiling():
                losses, batch = descend(
                    model, forward, optimiser, feed, rate, options, dtype, pool_at(step - begun, options)
                )
            # What ranks decide, they decide by the same values: none is left waiting for another that has ended.
            losses, stopping = ranks.agree(losses, signal.SIGTERM if ranks.orphaned else stop.number)
            if not torch.isfinite(losses["loss"] + losses["gradient_norm"]):
                if ranks.leads:
                    _tell_windows(out, windows, options, step)
                ranks.wait()
                raise UserError(NOT_FINITE.format(step=step, run=out))
            optimiser.step()
            done = step + 1
            seen += options.batch * options.accumulate
            bar.update()
            if log and (done % options.log_every == 0 or done == last):
                elapsed = time.perf_counter() - start
                values = {name: value.item() for name, value in losses.items()}
                speed = {"windows_per_second": seen / elapsed, "waiting_share": feed.waited / elapsed}
                log.write(done, {**values, "learning_rate": rate, **speed})
                bar.set_postfix_str(
                    f"loss {values['loss']:.4f}, {speed['windows_per_second']:.0f} windows/s, waiting {speed['waiting_share']:.1%}"
                )
            save = done % options.checkpoint_every == 0 or done == last or bool(stopping)
            if save:
                # The step may have left weights that the next loss would show to be bad: better not to keep them.
                with torch.no_grad(), autocast(device, dtype):
                    if not torch.isfinite(ranks.mean(model.eval().loss(batch))["loss"]):
                        raise UserError(NOT_FINITE.format(step=done, run=out))
            if log and (done % options.validate_every == 0 or done == last):
                before, result = result, validate(model, validation, device, dtype, stage, job.changes)
                log.write(done, result)
                ranks.say(f"step {done}: " + ", ".join(f"{name} {_shown(value)}" for name, value in result.items()))
                if None in result.values() and None not in before.values():
                    ranks.say(NO_SKILL)
            if save and ranks.leads:
                save_checkpoint(out, done, model, optimiser, stage=stage, begun=begun, finished=done == last)
            stop.now_if(stopping)
        ranks.wait()
        stop.now_if_wanted()  # by a signal that came while the last step was saved
    return result


@contextmanager
def _compile_errors() -> Iterator[None]:
    """Errors of torch.compile, which compiles in the first step, as one line."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (TorchDynamoException, OSError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())[:240]
        raise UserError(
            f"--compile does not work on this machine ({reason}); install a C++ compiler (g++, or the variable CXX) or set "
            "TORCHINDUCTOR_CACHE_DIR to a folder that programs may write to and run from, or run the same command without --compile"
        ) from error


class _Stop:
    """The signal that has asked for the end, 0 before one has, and the handlers that such are meant for."""

    def __init__(self) -> None:
        self.number = 0
        self.handlers: dict[int, Any] = {}

    @property
    def wanted(self) -> bool:
        return self.number != 0

    def note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.number = number

    def now_if_wanted(self) -> None:
        self.now_if(self.number)

    def now_if(self, number: int) -> None:
        if number:
            self.handlers.get(number, signal.default_int_handler)(number, None)


@contextmanager
def signals_between_steps() -> Iterator[_Stop]:
    """Hold back Ctrl-C and the signals of batch systems until a step is done and saved: nothing is lost, and no lock is left held."""
    stop = _Stop()
    if threading.current_thread() is threading.main_thread():
        # Whoever left a signal to the system's default, or ignores it, wants just that.
        stop.handlers = {number: handler for number in STOPPING if callable(handler := signal.getsignal(number))}
    for number in stop.handlers:
        signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in stop.handlers.items():
            signal.signal(number, handler)


def check_slices(batch: int, world: int) -> None:
    """Refuse, as a UserError, a batch that cannot be cut into equal slices for that many ranks."""
    if batch % world:
        raise UserError(
            f"--batch-size {batch} is cut into equal slices for {world} devices; choose a multiple of {world}"
        )


def descend(
    model: Any,
    forward: Loss,
    optimiser: torch.optim.Optimizer,
    feed: Feed,
    rate: float,
    options: TrainOptions,
    dtype: torch.dtype,
    pool: int = 1,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of one step, accumulated over micro-batches and clipped, ready for the optimiser.

    Returns:
        The losses, averaged over the micro-batches, with the `gradient_norm` before clipping; and the last micro-batch. With several ranks
        the losses are those of this one's slices, the gradients already those of all.
    """
    model.train()
    optimiser.zero_grad(set_to_none=True)
    for group in optimiser.param_groups:
        group["lr"] = rate
    parts: list[dict[str, Tensor]] = []
    for left in reversed(range(options.accumulate)):
        batch = feed.next()
        with without_reduction(forward) if left else nullcontext():
            with autocast(feed.device, dtype):
                losses = forward(batch, pool)
            (losses["loss"] / options.accumulate).backward()  # type: ignore[no-untyped-call]
        parts.append({name: value.detach() for name, value in losses.items()})
    norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
    means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    return {**means, "gradient_norm": norm}, batch


def validate(
    model: Any,
    windows: Windows,
    device: torch.device,
    dtype: torch.dtype,
    stage: str = "",
    changes: TokenStore | None = None,
) -> dict[str, float | None]:
    """Open-loop rollouts from one observed frame, as a planner makes them.

    Returns:
        `skill_k` for k = 1 … 5 model steps, see `skills`. After a stage that teaches where something changes, how well that is known
        instead, see `localization`.
    """
    if stage == "localization":
        return {**localization(model, windows, changes, device, dtype)}
    found = skills(*rollout_errors(model, windows, device, dtype))
    return {f"skill_{k}": value for k, value in enumerate(found, start=1)}


def skills(error: Tensor, copying: Tensor) -> list[float | None]:
    """1 - MSE of the rollout / MSE of copying the observed frame, by model step: 1 is perfect, 0 useless.

    None where that is not defined: the frames do not change, or the rollout is not finite.
    """
    values = (1 - error / copying).tolist()
    return [value if math.isfinite(value) else None for value in values]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@torch.inference_mode()
def rollout_errors(model: Any, windows: Windows, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """MSE of open-loop rollouts from one observed frame, and of copying that frame, float64 [model steps] each, in the store's units."""
    model.eval()
    steps = windows.predict
    error, copying = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    chosen = np.random.default_rng(0).permutation(len(windows))[:VALIDATION_WINDOWS]
    for part in np.array_split(chosen, max(1, len(chosen) // 64)):
        data = {name: torch.from_numpy(value).to(device) for name, value in windows.batch(part).items()}
        tokens = data["tokens"].float()
        with autocast(device, dtype):
            imagined, _ = model.rollout(tokens[:, :1], data["proprio"][:, :1], data["action"][:, :steps])
        error += (imagined - tokens[:, 1:]).square().mean((0, 2, 3)).double().cpu() * len(part)
        copying += (tokens[:, :1] - tokens[:, 1:]).square().mean((0, 2, 3)).double().cpu() * len(part)
    return error / len(chosen), copying / len(chosen)


def pool_at(step: int, options: TrainOptions) -> int:
    """The side of the squares of tokens that are averaged at a step."""
    return options.pool if step < options.pool_until * options.steps else 1


def learning_rate(step: int, options: TrainOptions) -> float:
    """Warmup-constant-decay: linear up, constant, and down to 0 as 1 - sqrt (arXiv 2405.18392)."""
    warmup, decay = math.ceil(options.warmup * options.steps), math.ceil(options.decay * options.steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if step < options.steps - decay:
        return options.learning_rate
    return options.learning_rate * (1 - math.sqrt((step - (options.steps - decay)) / decay))


def make_optimiser(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors only where told."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in parameters if options.decay_all or parameter.ndim >= 2]
    others = [parameter for parameter in parameters if not (options.decay_all or parameter.ndim >= 2)]
    groups = [{"params": decaying, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, options.beta2), fused=True)


class Log:
    """metrics.jsonl and TensorBoard."""

    def __init__(self, run: Path) -> None:
        """Args: `run` the run's folder."""
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log the values of a step; what is not finite is null."""
        known = nulls(dict(values))
        self._file.write(dump_json({"step": step, **known}) + "\n")
        self._file.flush()
        for name, value in known.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        """For `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close both."""
        self._file.close()
        self._board.close()


def _prepare_folder(
    out: Path, config: dict[str, Any], store: TokenStore, free: set[str], *, resume: bool, overwrite: bool
) -> bool:
    """Write config and identity, or compare them with those that are there, but for what is `free` to change.

    Returns:
        Whether there is a checkpoint to go on from.
    """
    ours = (out / "config.json").exists() and (out / "identity.json").exists()
    there_is = {file.name for file in out.iterdir() if not is_temporary(file)} if out.exists() else set()
    if not ours and there_is - {"identity.json"}:  # which is what a run begins with
        raise UserError(f"{out} exists and is not a run of ours; choose another --out")
    if resume and not checkpoints(out):
        raise UserError(f"{out} has no checkpoint to resume; run without --resume")
    if ours and overwrite:
        shutil.rmtree(out)
    elif ours:
        # An option that is younger than a run had its default then.
        there, identity = {**asdict(TrainOptions()), **read_config(out)}, read_identity(out)[1]
        if there["model"] != config["model"]:  # whose options are others
            different, resumable, extends = [f"model {there['model']} != {config['model']}"], False, False
        else:
            before, now = settings_of(there), settings_of(config)
            names = [name for name in now if name not in free and before.get(name) != now[name]]
            different = [f"{name} {before.get(name)} != {now[name]}" for name in names]
            resumable = set(names) <= MAY_CHANGE_ON_RESUME and bool(checkpoints(out))
            extends = bool(set(names) & MAY_CHANGE_ON_RESUME) and bool(checkpoints(out))
        # What a run has started from stays known.
        config = {**config, "start": config["start"] or there["start"]}
        if differences := identity.differences(store.identity):
            different, resumable = [*different, *(f"the store's identity, {item}" for item in differences)], False
        if different:
            hint = "continue it with --resume, or choose another --out" if resumable else "choose another --out"
            if extends and not resumable and not differences:
                hint = "to continue it, repeat its other options and add --resume; or choose another --out"
            raise UserError(f"{out} is a run with other settings ({'; '.join(different)}); {hint}")
    write_json(out / "identity.json", {"identity": store.identity.to_json(), "card": asdict(store.card)})
    write_json(out / "config.json", config)
    return bool(checkpoints(out))


def data_shape(store: TokenStore, options: TrainOptions) -> DataShape:
    """What a model must know of a store."""
    return DataShape(
        store.card.tokens_per_frame,
        store.card.token_dim,
        store.state.shape[1],
        options.frameskip * store.action.shape[1],
        options.history,
        store.card.token_grid[1],
    )


def statistics_of(store: TokenStore, frameskip: int) -> dict[str, Tensor]:
    """Mean and standard deviation of tokens, proprio and action, for a model's buffers."""
    action_mean, action_std = store.action.mean(0), store.action.std(0, ddof=1)
    values = {
        "tokens_mean": store.mean,
        "tokens_std": store.std,
        "proprio_mean": store.state.mean(0),
        "proprio_std": store.state.std(0, ddof=1),
        "action_mean": np.tile(action_mean, frameskip),
        "action_std": np.tile(action_std, frameskip),
    }
    return {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in values.items()}


def _tell_windows(out: Path, windows: Windows, options: TrainOptions, step: int) -> None:
    batches = range(step * options.accumulate, (step + 1) * options.accumulate)
    chosen = [batch_windows(len(windows), options.seed, number, options.batch) for number in batches]
    first_frames = windows.starts[np.concatenate(chosen)].tolist()
    write_json(out / "not-finite.json", {"step": step, "first_frames_of_windows": first_frames})


def validation_windows(store: TokenStore, options: TrainOptions) -> Windows:
    """Windows of one observed frame and up to 5 that follow, from the val episodes."""
    longest = store.longest_episode("val", seed=options.split_seed)
    steps = max(1, min(ROLLOUT_STEPS, longest // options.frameskip - 1))
    return store.windows(1, steps, options.frameskip, "val", seed=options.split_seed)
