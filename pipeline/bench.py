"""Speed as a ratio to a named limit, both measured in the same run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from wmcache.cache.device import autocast
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset


def bench_extract(dataset: FrameDataset, encoder: Encoder, *, batch: int, workers: int) -> dict[str, float]:
    """Extraction against the bare model.

    Args:
        dataset: real frames; all of them are extracted, into a temporary store.
        encoder: what encodes them. batch, workers: as in `extract`.

    Returns:
        Frames a second of the network alone on images that are already decoded, resized and normalised (before and after the
        extraction, so that a drift of the machine shows), of the encoder on frames that are already decoded, and of the extraction;
        `ratio_to_network` and `ratio_to_encoder`, the extraction's share of each.
    """
    frames = dataset.read_shard(0)
    parts = [frames[start : start + batch] for start in range(0, len(frames), batch)]
    with torch.inference_mode():
        images = [encoder.preprocess(torch.from_numpy(part).to(encoder.device)) for part in parts]

    @torch.inference_mode()
    def network_rate() -> float:
        start = time.perf_counter()
        for image in images:
            with autocast(encoder.device, encoder.dtype):
                encoder.network(image).to(torch.float16).cpu()
        return len(frames) / (time.perf_counter() - start)

    def encoder_rate() -> float:
        start = time.perf_counter()
        for part in parts:
            encoder(part).cpu()
        return len(frames) / (time.perf_counter() - start)

    encoder(parts[0])
    before, whole = network_rate(), encoder_rate()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        extract(dataset, encoder, Path(folder) / "bench.zarr", batch=batch, workers=workers)
        extraction = dataset.card.frames / (time.perf_counter() - start)
    after = network_rate()
    network = (before + after) / 2
    return {
        "frames": dataset.card.frames,
        "network_frames_per_second": network,
        "network_before": before,
        "network_after": after,
        "encoder_frames_per_second": whole,
        "extract_frames_per_second": extraction,
        "ratio_to_network": extraction / network,
        "ratio_to_encoder": extraction / whole,
    }
