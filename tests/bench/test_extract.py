"""Figures of extraction and of memory: of what they say that they are of, whatever the machine's speed."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from wmcache.bench import extract as bench
from wmcache.bench.extract import _peak, _save_tcn, bench_cluster, bench_extract
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.frames import FrameDataset

KEYS = [
    "frames",
    "network_frames_per_second",
    "network_before",
    "network_after",
    "encoder_frames_per_second",
    "extract_frames_per_second",
    "ratio_to_network",
    "ratio_to_encoder",
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


def test_ratios_follow_from_the_rates(dataset: FrameDataset, encoder: Encoder) -> None:
    found = bench_extract(dataset, encoder, batch=16, cluster="local:1")
    assert list(found) == KEYS
    assert found["frames"] == 360
    assert all(value > 0 for value in found.values())
    rate = found["extract_frames_per_second"]
    assert found["ratio_to_network"] == pytest.approx(rate / found["network_frames_per_second"])
    assert found["ratio_to_encoder"] == pytest.approx(rate / found["encoder_frames_per_second"])
    assert found["network_frames_per_second"] == pytest.approx((found["network_before"] + found["network_after"]) / 2)


def test_rates_count_the_frames_of_each_part(
    dataset: FrameDataset, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever is timed takes one second: the network and the encoder do a shard in it, the extraction everything.
    ticks = itertools.count()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    found = bench_extract(dataset, encoder, batch=50, cluster="local:1")
    assert [found[name] for name in KEYS] == [360, 64, 64, 64, 64, 360, 360 / 64, 360 / 64]


def test_extraction_is_measured_in_a_place_that_is_left_empty(
    dataset: FrameDataset, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bench_extract(dataset, encoder, batch=64, cluster="local:1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [20 * MB, 150 * MB])
def test_the_peak_is_of_the_memory_that_a_command_had_and_gave_back(size: int) -> None:
    script = f"import time; data = b'1' * {size}; time.sleep(0.2); del data; time.sleep(0.1)"
    assert size < _peak("python", ["-c", script]) < size + 50 * MB


def test_pages_of_files_are_not_in_the_peak(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as stream:
        stream.truncate(200 * MB)
    script = (
        "import mmap, sys, time; file = open(sys.argv[1], 'rb'); data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); "
        "touched = sum(data[place] for place in range(0, len(data), 4096)); time.sleep(0.2)"
    )
    assert 1 * MB < _peak("python", ["-c", script, str(file)]) < 50 * MB


def test_the_peak_of_a_command_of_ours() -> None:
    assert 1 * MB < _peak("wmcache", ["--version"]) < 500 * MB


def test_a_command_that_fails_is_one_line_of_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^wmcache info failed: Error: .*none\.zarr does not exist") as caught:
        _peak("wmcache", ["info", str(tmp_path / "none.zarr")])
    assert "\n" not in str(caught.value)


def test_the_weights_of_the_memory_benchmark_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "tcn.safetensors"
    _save_tcn(path)
    assert load_file(path)
    encoder = encoders.create("tcn", weights=path, image_size=224, device="cpu")
    # What the benchmark counts as the bytes of a frame.
    assert encoder.frame_shape == (49, 32)
