"""What a training reports: a progress bar, metrics.jsonl with one JSON object a line, and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from wmcache.common.files import write_whole
from wmcache.common.jsonfiles import dump_json, nulls
from wmcache.common.progress import seconds_between_updates

B = TypeVar("B")


class Log(AbstractContextManager["Log"]):
    """Shows a training on a progress bar, with its speed, and logs it."""

    def __init__(
        self, run: Path | None, title: str, unit: str, batch: int, *, steps: int, initial: int, hidden: bool = False
    ) -> None:
        """Open metrics.jsonl and TensorBoard in `run`, if there is one, and a bar of `steps` steps, each of `batch` times `unit`."""
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8") if run else None
        self._board = SummaryWriter(str(run / "tensorboard")) if run else None
        # After the files: an error of theirs must not end up on the bar's line.
        interval = seconds_between_updates()
        self._bar = tqdm(total=steps, initial=initial, desc=title, unit=" steps", mininterval=interval, disable=hidden)
        self._unit, self._batch, self._initial = unit, batch, initial
        self._start, self._waited = 0.0, 0.0

    def timed(self, batches: Iterator[B]) -> Iterator[B]:
        """Yield the batches and measure how long the training waits for them; the clock starts at the first."""
        self._start = time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - asked
            yield batch

    def step_done(self, steps: int = 1) -> None:
        """Advance the progress bar."""
        self._bar.update(steps)

    def losses(self, step: int, losses: Mapping[str, Tensor], learning_rate: float) -> None:
        """Show and log the losses of a step."""
        elapsed = time.perf_counter() - self._start
        speed, waiting = (self._bar.n - self._initial) * self._batch / elapsed, self._waited / elapsed
        values = {name: value.item() for name, value in losses.items()}
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {speed:.0f} {self._unit}/s, waiting {waiting:.1%}", refresh=False
        )
        figures = {"learning_rate": learning_rate, f"{self._unit}_per_second": speed, "waiting_share": waiting}
        self.write(step, {**values, **figures})

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log the values of a step; a value that is not finite becomes null."""
        if not (self._file and self._board):
            return
        finite = nulls(dict(values))
        self._file.write(dump_json({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        self._bar.close()
        if self._file and self._board:
            self._file.close()
            self._board.close()


def truncate_metrics(run: Path, step: int) -> None:
    """Drop lines of metrics.jsonl after `step`, which a resumed run logs again."""
    file = run / "metrics.jsonl"
    if file.exists():
        lines = [line for line in file.read_text(errors="replace").splitlines() if _step_of(line) <= step]
        write_whole(file, "".join(line + "\n" for line in lines).encode())


def _step_of(line: str) -> float:
    """Return the step of a line, infinity for a line that a kill or a full disk has cut."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
