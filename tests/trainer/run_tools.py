"""What the tests of runs share: reading them, and stopping them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wmcache.engine.checkpoint import last_checkpoint
from wmcache.engine.log import Log
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

Go = Callable[..., dict[str, float | None]]
TIMES = ("windows_per_second", "frames_per_second", "waiting_share")


def make_go(store: Path, base: TrainOptions) -> Go:
    """(run, **options) -> train it with these options, the others as in `base`."""

    def go(
        run: Path,
        *,
        cache: Path = store,
        resume: bool = False,
        overwrite: bool = False,
        model_options: dict[str, Any] | None = None,
        **changed: Any,
    ) -> dict[str, float | None]:
        options = replace(base, model_options=base.model_options | (model_options or {}), **changed)
        return train(cache, run, options, resume=resume, overwrite=overwrite)

    return go


def read_log(run: Path) -> list[dict[str, float]]:
    """The logged lines, without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def read_curve(run: Path, key: str = "loss") -> dict[int, float]:
    """Step -> value; a step that is logged twice fails."""
    found = [(line["step"], line[key]) for line in read_log(run) if key in line]
    assert len(found) == len(dict(found))
    return {int(step): value for step, value in found}


def weights_of(run: Path) -> bytes:
    return (last_checkpoint(run) / "model.safetensors").read_bytes()


def files_of(folder: Path) -> dict[str, bytes]:
    # TensorBoard opens a new file at every start.
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "tensorboard" not in file.parts
    }


@contextmanager
def stopped_at(step: int, *, by_signal: bool = False) -> Iterator[None]:
    """Stop the training in the block when a step is logged: at once, so before it is saved, or by a Ctrl-C."""
    write = Log.write

    def stop(log: Log, logged: int, values: Mapping[str, float | None]) -> None:
        write(log, logged, values)
        if logged == step and by_signal:
            os.kill(os.getpid(), signal.SIGINT)
        elif logged == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
