"""The loop, by a tiny task: it learns, repeats and resumes exactly, and never saves weights that are not finite."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import Progress, checkpoints, last_checkpoint, load_weights, read_progress
from wmcache.engine.loop import LoopOptions, Task, run

OPTIONS = LoopOptions(
    8, 16, torch.device("cpu"), torch.float32, clip=1.0, log_every=1, validate_every=4, checkpoint_every=3
)
BIG = 1e30


class Regression(Task[Tensor]):
    """Sums of inputs, by a network with dropout."""

    title, unit, hint = "regression", "rows", "lower --lr"

    def __init__(self, out: Path, *, rate: Callable[[int], float] = lambda step: 0.05, dropout: float = 0.2) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.out, self.learning_rate = out, rate
        self.calls: list[Any] = []

    def optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters())

    def batches(self, first: int) -> AbstractContextManager[Iterator[Tensor]]:
        return nullcontext(
            torch.randn(16, 4, generator=torch.Generator().manual_seed(number)) for number in itertools.count(first)
        )

    def loss(self, batch: Tensor, step: int) -> dict[str, Tensor]:
        loss = (self.network(batch) - batch.sum(1, keepdim=True)).square().mean()
        return {"loss": loss}

    def next_loss(self, batch: Tensor) -> Tensor:
        return self.loss(batch, 0)["loss"]

    def validate(self) -> dict[str, float | None]:
        return {"good": 0.5, "undefined": None}

    def before_step(self, step: int) -> None:
        self.calls.append(("before", step))

    def after_step(self) -> None:
        self.calls.append("after")

    def on_not_finite(self, step: int) -> None:
        self.calls.append(("not finite", step))


class Stopping(Regression):
    """Stops as the sixth step begins: at once, or by a signal, which is acted on once that step is saved."""

    def __init__(self, out: Path, *, by_signal: bool, **more: Any) -> None:
        super().__init__(out, **more)
        self.by_signal = by_signal

    def before_step(self, step: int) -> None:
        if step == 5 and self.by_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        elif step == 5:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def sigterm_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def train(out: Path, options: LoopOptions = OPTIONS, **more: Any) -> Regression:
    task = Regression(out, **more)
    run(task, options, out, progress_of(out))
    return task


def progress_of(out: Path) -> Progress:
    return replace(read_progress(last_checkpoint(out)), finished=False) if checkpoints(out) else Progress()


def weights_of(out: Path) -> bytes:
    return (last_checkpoint(out) / "model.safetensors").read_bytes()


def read_log(out: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("rows_per_second", "waiting_share")}
        for line in lines
    ]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    (tmp_path / "other").mkdir()
    return tmp_path / "other"


def test_hooks_and_log_follow_the_steps(out: Path) -> None:
    task = train(out, rate=lambda step: 0.01 * (step + 1))
    assert task.calls == [call for step in range(8) for call in (("before", step), "after")]
    log = read_log(out)
    trained, validated = ([line for line in log if ("loss" in line) is kind] for kind in (True, False))
    assert [line["step"] for line in trained] == list(range(1, 9))
    assert [line["learning_rate"] for line in trained] == [0.01 * step for step in range(1, 9)]
    assert validated == [{"step": step, "good": 0.5, "undefined": None} for step in (4, 8)]
    assert [folder.name for folder in checkpoints(out)] == ["step-00000006", "step-00000008"]
    assert [read_progress(folder).finished for folder in checkpoints(out)] == [False, True]


@pytest.mark.parametrize("by_signal", [False, True], ids=["killed", "signal"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_resumes_exactly(out: Path, other: Path, by_signal: bool, accumulate: int) -> None:
    options = replace(OPTIONS, accumulate=accumulate)
    train(other, options)
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(out, by_signal=by_signal), options, out, Progress())
    assert read_progress(last_checkpoint(out)) == Progress(6 if by_signal else 3)
    train(out, options)
    assert weights_of(out) == weights_of(other)
    assert read_log(out) == read_log(other)


def test_two_micro_batches_are_one_batch(out: Path, other: Path) -> None:
    class Joined(Regression):
        def batches(self, first: int) -> AbstractContextManager[Iterator[Tensor]]:
            with super().batches(2 * first) as batches:
                return nullcontext(torch.cat(pair) for pair in zip(batches, batches, strict=False))

    options = replace(OPTIONS, steps=1)
    run(Joined(other, dropout=0.0), options, other, Progress())
    train(out, replace(options, accumulate=2), dropout=0.0)
    for name in ("loss", "gradient_norm"):
        assert read_log(out)[0][name] == pytest.approx(read_log(other)[0][name], rel=1e-5)


def test_gradients_are_clipped_to_a_norm(tmp_path: Path) -> None:
    weights = {}
    for clip in (None, 1e9, 1e-9):
        folder = tmp_path / str(clip)
        folder.mkdir()
        train(folder, replace(OPTIONS, clip=clip, steps=2))
        assert ("gradient_norm" in read_log(folder)[0]) == (clip is not None)
        weights[clip] = weights_of(folder)
    assert weights[None] == weights[1e9] != weights[1e-9]


def test_a_groups_own_rate_stays_in_proportion(out: Path) -> None:
    class Grouped(Regression):
        def optimiser(self) -> torch.optim.Optimizer:
            first, last = self.network[0].parameters(), self.network[3].parameters()
            self.groups = torch.optim.SGD([{"params": first}, {"params": last, "lr": 0.5}], lr=0.1)
            return self.groups

    task = Grouped(out, rate=lambda step: 0.01 * (step + 1))
    run(task, OPTIONS, out, Progress())
    assert [group["lr"] for group in task.groups.param_groups] == pytest.approx([0.08, 0.4])


@pytest.mark.parametrize("checkpoint_every", [1, 2, 4])
def test_a_loss_that_is_not_finite_leaves_a_good_checkpoint(out: Path, checkpoint_every: int) -> None:
    task = Regression(out, rate=lambda step: BIG if step == 4 else 0.05)
    with pytest.raises(UserError, match=rf"{out}.*--lr"):
        run(task, replace(OPTIONS, checkpoint_every=checkpoint_every), out, Progress())
    assert read_progress(last_checkpoint(out)).step == 4
    # The first loss that is not finite, unless the weights were found bad before it, for a checkpoint.
    assert (("not finite", 5) in task.calls) == (checkpoint_every > 1)
    load_weights(last_checkpoint(out), task.network)
    assert task.next_loss(torch.ones(2, 4)).isfinite()
    train(out)
    assert read_progress(last_checkpoint(out)).step == 8


def test_weights_that_end_not_finite_are_not_saved(out: Path) -> None:
    with pytest.raises(UserError):
        train(out, replace(OPTIONS, steps=1), rate=lambda step: 3e37)
    assert checkpoints(out) == []


def test_checkpoints_by_time_and_no_log(out: Path) -> None:
    options = replace(OPTIONS, log=False, checkpoint_every=100, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(out, by_signal=False), options, out, Progress())
    assert [file.name for file in out.iterdir()] == ["checkpoints"]
    assert read_progress(last_checkpoint(out)).step == 5
