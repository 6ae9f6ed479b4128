"""The figures of extraction and of memory, whatever the machine's speed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from wmcache.bench.extract import bench_cluster, bench_extract, peak_memory, save_tcn
from wmcache.bench.limit import count_flops
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.frames import FrameDataset

KEYS = [
    "frames",
    *("network_frames_per_second", "network_before", "network_after"),
    *("encoder_frames_per_second", "extract_frames_per_second", "ratio_to_network", "ratio_to_encoder"),
    *("gflop_per_frame", "limit_gflops", "share_of_limit"),
]
MB = 10**6


@pytest.mark.cluster
def test_dask_is_measured_against_plain_processes(dataset: FrameDataset, encoder: Encoder) -> None:
    found = bench_cluster(dataset, encoder, batch=16, cluster="local:2", rounds=1)
    loop, worker, workers, loops = (
        found[f"{name}_frames_per_second"] for name in ("loop", "one_worker", "workers", "loops")
    )
    assert (found["frames"], found["processes"]) == (360, 2)
    assert found["dask_overhead"] == pytest.approx(loop / worker - 1)
    assert found["scaling"] == pytest.approx(workers / worker / 2)
    assert found["machine_scaling"] == pytest.approx(loops / loop / 2)
    assert found["ratio_to_machine"] == pytest.approx(workers / loops)


@pytest.mark.usefixtures("ticking")
def test_rates_count_the_frames_of_each_part_and_ratios_follow_from_them(
    dataset: FrameDataset, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Network and encoder do a shard, the extraction all shards.
    found = bench_extract(dataset, encoder, batch=50, cluster="local:1")
    assert list(found) == KEYS
    assert list(found.values())[:8] == [360, 64, 64, 64, 64, 360, 360 / 64, 360 / 64]
    product = 2 * 64**3 / 1e9
    assert found["gflop_per_frame"] == pytest.approx(count_flops(encoder, dataset.read_shard(0)[:4]) / 4e9)
    assert found["share_of_limit"] == pytest.approx(360 * found["gflop_per_frame"] / product)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sweep  # half a minute of compilation
@pytest.mark.usefixtures("ticking")
def test_the_compiled_network_is_measured_on_whole_batches(
    dataset: FrameDataset, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("a C++ compiler is not installed")
    found = bench_extract(dataset, encoder, batch=50, compiled=True)
    assert (found["compiled_frames_per_second"], found["compiled_gain"]) == (50, 1)


def test_the_peak_includes_memory_that_was_freed() -> None:
    script = f"import time; data = b'1' * {150 * MB}; time.sleep(0.2); del data; time.sleep(0.1)"
    assert 150 * MB < peak_memory("python", ["-c", script]) < 200 * MB


def test_a_command_that_fails_is_one_line_of_error(tmp_path: Path) -> None:
    assert 1 * MB < peak_memory("wmcache", ["--version"]) < 500 * MB
    with pytest.raises(UserError, match=r"^wmcache info .*none\.zarr") as caught:
        peak_memory("wmcache", ["info", str(tmp_path / "none.zarr")])
    assert "\n" not in str(caught.value)


def test_the_weights_of_the_memory_benchmark_can_be_loaded(tmp_path: Path) -> None:
    save_tcn(tmp_path / "tcn.safetensors")
    encoder = encoders.create("tcn", weights=tmp_path / "tcn.safetensors", image_size=224, device="cpu")
    # The benchmark counts a frame's bytes by this.
    assert encoder.frame_shape == (49, 32)
