from __future__ import annotations

import pytest
from wmcache.pipeline.bench import bench_extract
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.frames import FrameDataset


def test_ratios_follow_from_the_rates(dataset: FrameDataset, encoder: Encoder) -> None:
    found = bench_extract(dataset, encoder, batch=16, workers=1)
    assert found["frames"] == 360
    assert all(value > 0 for value in found.values())
    rate = found["extract_frames_per_second"]
    assert found["ratio_to_network"] == pytest.approx(rate / found["network_frames_per_second"])
    assert found["ratio_to_encoder"] == pytest.approx(rate / found["encoder_frames_per_second"])
