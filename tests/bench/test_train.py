"""Speed of training steps: each figure is of its own source of batches, whatever the machine's speed."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wmcache.bench import timing
from wmcache.bench.reference import ROUNDS, bench_train
from wmcache.common.errors import UserError
from wmcache.trainer.feed import RESIDENCES

MODEL: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.1}
KEYS = [
    "windows_per_step",
    "memory_steps_per_second",
    "store_steps_per_second",
    "encoding_steps_per_second",
    "reference_steps_per_second",
    "ratio_to_memory",
    "ratio_to_encoding",
    "ratio_to_reference",
    "waiting_share",
]


class Encoder:
    """Counts what it encodes, as float16 tokens of the planted store: 2 of 3 dimensions."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, count: int) -> Tensor:
        self.calls.append(count)
        return torch.zeros(count, 2, 3, dtype=torch.float16)


@pytest.mark.parametrize("residence", ["auto", *RESIDENCES])
def test_figures_of_training(planted_path: Path, residence: str) -> None:
    encode = Encoder()
    found = bench_train(planted_path, MODEL, encode, batch=4, steps=2, device="cpu", residence=residence)
    assert list(found) == KEYS
    assert found["windows_per_step"] == 4
    assert all(0 < found[name] < float("inf") for name in KEYS[:-1])
    assert 0 <= found["waiting_share"] <= 1
    # Two of them encode every frame of every window: a step to warm up, then a tenth of the steps, at least one, in each round.
    assert encode.calls == [4 * 4] * 2 * (1 + ROUNDS)


def test_rates_and_ratios_count_the_steps_of_each_source(planted_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever is timed takes one second.
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    encode = Encoder()
    found = bench_train(planted_path, MODEL, encode, batch=4, steps=20, device="cpu")
    assert (found["memory_steps_per_second"], found["store_steps_per_second"]) == (20, 20)
    assert (found["encoding_steps_per_second"], found["reference_steps_per_second"]) == (2, 2)
    assert (found["ratio_to_memory"], found["ratio_to_encoding"], found["ratio_to_reference"]) == (1, 10, 10)
    assert len(encode.calls) == 2 * (1 + 2 * ROUNDS)


def test_the_residence_is_reported(planted_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_train(planted_path, MODEL, Encoder(), batch=4, steps=2, device="cpu", residence="disk")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "kB" in line]
    assert "9.6 kB" in line
    assert "disk" in line


def test_what_cannot_be_measured_is_refused(planted_path: Path, tmp_path: Path) -> None:
    for cache, model, residence, named in (
        (tmp_path / "none.zarr", MODEL, "auto", r"none\.zarr"),
        (planted_path, MODEL, "attic", "attic"),
        (planted_path, {**MODEL, "heads": 3}, "auto", "heads"),
    ):
        with pytest.raises(UserError, match=named):
            bench_train(cache, model, Encoder(), batch=4, steps=2, device="cpu", residence=residence)
