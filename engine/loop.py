"""The training loop. World models, decoders, encoder fits and adapters are tasks that it runs; it knows none of them."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import Progress, load_training_state, save_checkpoint
from wmcache.engine.log import Log, truncate_metrics
from wmcache.engine.ranks import SINGLE, Loss, Ranks, without_reduction
from wmcache.engine.signals import delay_signals

B = TypeVar("B")
Figures = dict[str, float | None]
"""Measured on held-out data; None where a figure is not defined."""


class Task(Protocol[B]):
    """What differs between trainings. `unit`: what a batch consists of; `hint`: what to do about a loss that is not finite."""

    network: nn.Module
    title: str
    unit: str
    out: Path
    hint: str

    def optimiser(self) -> Optimizer:
        """Return a new optimiser of the parameters that are trained."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""

    def batches(self, first: int) -> AbstractContextManager[Iterator[B]]:
        """Open the stream of micro-batches from number `first` on; batch k depends on k alone."""

    def loss(self, batch: B, step: int) -> dict[str, Tensor]:
        """Return `loss` to minimise, and parts of it to log; scalars."""

    def before_step(self, step: int) -> None:  # noqa: ARG002
        """Prepare a step, for example seed what it draws."""
        return

    def after_step(self) -> None:
        """Follow the optimiser's step, for example update a target network."""
        return

    def next_loss(self, batch: B) -> Tensor:  # noqa: ARG002
        """Return the loss of the updated weights, in evaluation mode, which must be finite for them to be saved."""
        return torch.zeros(())

    def validate(self) -> Figures:
        """Return figures of held-out data."""
        return {}

    def on_not_finite(self, step: int) -> None:  # noqa: ARG002
        """Record what led to a loss that is not finite."""
        return


@dataclass(frozen=True)
class LoopOptions:
    """How a task is trained.

    Attributes:
        steps: of the optimiser, from where the stage began.
        batch: size of a micro-batch, of all ranks together; `accumulate` of them make a step.
        clip: largest norm of the gradient; None neither clips nor logs it.
        log_every, validate_every, checkpoint_every: steps between two; each is also done after the last step.
        checkpoint_seconds: time between two checkpoints, for a single process.
    """

    steps: int
    batch: int
    device: torch.device
    dtype: torch.dtype
    accumulate: int = 1
    clip: float | None = None
    log: bool = True
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    checkpoint_seconds: float = math.inf


def run(task: Task[B], options: LoopOptions, folder: Path, progress: Progress, ranks: Ranks = SINGLE) -> Figures:
    """Train a task to the end of its stage; returns the last validation's figures, on rank 0 only.

    Inside a stage, weights, optimiser and random generators are loaded from the newest checkpoint in `folder`. Raises UserError where the
    loss or the weights are not finite, or a checkpoint cannot be read or written.
    """
    optimiser, first, last = task.optimiser(), progress.step, progress.begun + options.steps
    if first > progress.begun:
        load_training_state(folder, task.network, optimiser)
    if first >= last:
        return {}
    if ranks.is_main:
        truncate_metrics(folder, first)
    loss, saved = ranks.share(task.network, task.loss), time.monotonic()
    result: Figures = {}
    steps, done, size = options.steps, first - progress.begun, options.batch * options.accumulate
    logged = folder if options.log and ranks.is_main else None
    with (
        Log(logged, task.title, task.unit, size, steps=steps, initial=done, hidden=not ranks.is_main) as log,
        task.batches(first * options.accumulate) as stream,
        delay_signals() as pending,
    ):
        batches = log.timed(stream)
        for step in range(first, last):
            task.before_step(step)
            losses, batch = _compute_gradients(task, loss, optimiser, batches, step, options)
            # Ranks decide by equal values, so that none waits for one that has ended.
            losses, stopping = ranks.all_reduce(losses, signal.SIGTERM if ranks.orphaned else pending.number)
            try:
                require_finite(task, step, [losses["loss"], losses.get("gradient_norm", losses["loss"])])
            except UserError:
                if ranks.is_main:
                    task.on_not_finite(step)
                ranks.wait()
                raise
            optimiser.step()
            task.after_step()
            log.step_done()
            done = step + 1
            if ranks.is_main and (done % options.log_every == 0 or done == last):
                log.losses(done, losses, task.learning_rate(step))
            late = time.monotonic() - saved > options.checkpoint_seconds
            save = bool(stopping) or late or done % options.checkpoint_every == 0 or done == last
            if save:
                _require_finite_weights(task, batch, done, options, ranks)
            if ranks.is_main and (done % options.validate_every == 0 or done == last):
                with _kept_generators(options.device):
                    result = _validate(task, done, log, ranks)
            if save and ranks.is_main:
                save_checkpoint(folder, replace(progress, step=done, finished=done == last), task.network, optimiser)
                saved = time.monotonic()
            pending.act_on(stopping)
        ranks.wait()
        pending.act_on(pending.number)  # received while the last step was saved
    return result


def _compute_gradients(
    task: Task[B], loss: Loss[B], optimiser: Optimizer, batches: Iterator[B], step: int, options: LoopOptions
) -> tuple[dict[str, Tensor], B]:
    """Accumulate gradients of a step's micro-batches over all ranks and clip them; returns this rank's mean losses and the last batch."""
    task.network.train()
    optimiser.zero_grad(set_to_none=True)
    rate = task.learning_rate(step)
    for group in optimiser.param_groups:  # whose own rates stay in proportion
        group["lr"] = rate * group.setdefault("scale", group["lr"] / optimiser.defaults["lr"])
    parts = []
    for remaining in reversed(range(options.accumulate)):
        batch = next(batches)
        with without_reduction(loss) if remaining else nullcontext():
            with autocast(options.device, options.dtype):
                losses = loss(batch, step)
            (losses["loss"] / options.accumulate).backward()  # type: ignore[no-untyped-call]
        parts.append({name: value.detach() for name, value in losses.items()})
    means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    if options.clip is not None:
        means["gradient_norm"] = nn.utils.clip_grad_norm_(task.network.parameters(), options.clip)
    return means, batch


def _require_finite_weights(task: Task[B], batch: B, step: int, options: LoopOptions, ranks: Ranks) -> None:
    """Refuse to save weights that are not finite or give such a loss."""
    task.network.eval()
    with torch.no_grad(), autocast(options.device, options.dtype), _kept_generators(options.device):
        loss = ranks.all_reduce({"loss": task.next_loss(batch)})[0]["loss"]
    require_finite(task, step, [loss, *task.network.state_dict().values()])


@contextmanager
def _kept_generators(device: torch.device) -> Iterator[None]:
    """Keep what training draws the same, whatever is drawn inside and how often."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def require_finite(task: Task[B], step: int, values: Iterable[Tensor]) -> None:
    """Raise UserError where a loss or weights are not finite."""
    if not all(value.isfinite().all() for value in values):
        raise UserError(f"loss or weights are not finite at step {step}: {task.out}; {task.hint}")


def _validate(task: Task[B], step: int, log: Log, ranks: Ranks) -> Figures:
    if figures := task.validate():
        log.write(step, figures)
        shown = (f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in figures.items())
        ranks.log(f"step {step}: {', '.join(shown)}")
    return figures
