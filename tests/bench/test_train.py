"""Speed of training steps: each figure is of its own source of batches, whatever the machine's speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wmcache.bench.reference import ROUNDS, bench_train

MODEL: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.1}


class Encoder:
    """Counts what it encodes, as float16 tokens of the planted store: 2 of 3 dimensions."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, count: int) -> Tensor:
        self.calls.append(count)
        return torch.zeros(count, 2, 3, dtype=torch.float16)


@pytest.mark.usefixtures("ticking")
def test_rates_and_ratios_count_the_steps_of_each_source(planted_path: Path) -> None:
    encode = Encoder()
    found = bench_train(planted_path, MODEL, encode, batch=4, steps=20, device="cpu")
    assert (found["memory_steps_per_second"], found["store_steps_per_second"]) == (20, 20)
    assert (found["encoding_steps_per_second"], found["reference_steps_per_second"]) == (2, 2)
    assert (found["ratio_to_memory"], found["ratio_to_encoding"], found["ratio_to_reference"]) == (1, 10, 10)
    assert len(encode.calls) == 2 * (1 + 2 * ROUNDS)
