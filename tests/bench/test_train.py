"""Speed of training steps: each figure is of its own source of batches, whatever the machine's speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wmcache.bench.limit import count_flops
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
def test_rates_and_ratios_count_the_steps_of_each_source(planted_path: Path, small_limit: float) -> None:
    encode = Encoder()
    found = bench_train(planted_path, MODEL, encode, batch=4, steps=20, device="cpu")
    assert (found["memory_steps_per_second"], found["store_steps_per_second"]) == (20, 20)
    assert (found["encoding_steps_per_second"], found["reference_steps_per_second"]) == (2, 2)
    assert (found["ratio_to_memory"], found["ratio_to_encoding"], found["ratio_to_reference"]) == (1, 10, 10)
    assert found["limit_gflops"] == pytest.approx(small_limit)
    assert found["share_of_limit"] == pytest.approx(20 * found["gflop_per_step"] / small_limit)
    assert len(encode.calls) == 2 * (1 + 2 * ROUNDS)


@pytest.mark.usefixtures("ticking", "small_limit")
def test_operations_are_those_of_the_products_of_a_training_step(planted_path: Path) -> None:
    counts = {
        batch: bench_train(planted_path, MODEL, Encoder(), batch=batch, steps=1, device="cpu")["gflop_per_step"]
        for batch in (2, 6)
    }
    assert counts[6] == pytest.approx(3 * counts[2])


def test_products_convolutions_and_attention_are_counted_with_their_gradients() -> None:
    layer, convolution = torch.nn.Linear(8, 16), torch.nn.Conv2d(3, 5, 3, padding=1)
    rows, image = torch.zeros(4, 8, requires_grad=True), torch.zeros(2, 3, 6, 6)
    assert count_flops(layer, rows) == 2 * 4 * 8 * 16
    assert count_flops(lambda: layer(rows).sum().backward()) == 3 * 2 * 4 * 8 * 16
    assert count_flops(lambda: layer(rows.detach()).sum().backward()) == 2 * 2 * 4 * 8 * 16
    assert count_flops(convolution, image) == 2 * 2 * 36 * 5 * 27
    heads = torch.zeros(2, 4, 7, 16)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(attend, heads, heads, heads) == 2 * 2 * 2 * 4 * 7 * 7 * 16
