"""Jobs of a batch array: each knows its slice, none knows of the others, and they come in any order, together, or twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_workers import Child, extract_slice

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline.stores import finalize

Content = Callable[[Path], dict[str, bytes]]
Start = Callable[..., Child]


def test_jobs_that_start_together_make_one_store(
    start: Start, few_path: Path, few_stores: dict[str, Path], tcn_weights: Path, content: Content, tmp_path: Path
) -> None:
    out = tmp_path / "store.zarr"
    # More slices than shards, and one slice twice.
    jobs = [start(extract_slice, out, few_path, tcn_weights, (number, 5)) for number in (4, 0, 3, 1, 1, 2)]
    for job in jobs:
        job.returned()
    assert TokenStore.open(out).complete
    assert content(out / "tokens") == content(few_stores["float16"] / "tokens")


def test_a_job_that_is_killed_leaves_its_shards_to_its_second_try(
    start: Start, few_path: Path, few_stores: dict[str, Path], tcn_weights: Path, content: Content, tmp_path: Path
) -> None:
    out = tmp_path / "store.zarr"
    start(extract_slice, out, few_path, tcn_weights, (0, 2)).returned()
    with pytest.raises(UserError, match=r"lacks 2 of 3 shards \(1, 2\); make them with: wmcache extract --dataset"):
        finalize(out)
    assert start(extract_slice, out, few_path, tcn_weights, (1, 2), True).outcome() == ("died", -signal.SIGKILL)
    with pytest.raises(UserError, match="incomplete"):
        TokenStore.open(out)
    start(extract_slice, out, few_path, tcn_weights, (1, 2)).returned()
    finalize(out)  # it is complete already
    assert content(out / "tokens") == content(few_stores["float16"] / "tokens")
