"""The card of a frame dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wmcache.common.readme import Readme, size_category

if TYPE_CHECKING:
    from wmcache.pipeline.frames import DatasetCard


def dataset_readme(card: DatasetCard) -> Readme:
    """Describe a finished dataset by the facts in dataset.json."""
    front = {"task_categories": ["robotics"], "size_categories": [size_category(card.frames)]}
    found = Readme(card.name, "Frames of episodes, with their actions, in order.", ["world-model", "webdataset"], front)
    found.facts(
        {
            "environment": card.env,
            "behaviour policy": card.policy,
            "seed": card.seed,
            "episodes": card.episodes,
            "frames": card.frames,
            "frame": f"{card.image_size} x {card.image_size} RGB, PNG",
            "env steps per second": card.fps,
            "shards": f"{card.num_shards} of {card.frames_per_shard} frames",
            "fingerprint": card.fingerprint,
        }
    )
    found.columns(card.columns or {})
    if card.layout:
        found.block("Layout", card.layout)
    found.table(
        "Files",
        ("file", "content"),
        [
            ("dataset.json", "all facts above, and checksums"),
            ("steps.parquet", "one row per frame: episode, step, and the columns"),
            ("frames-*.tar", "WebDataset shards; the key of a frame is EEEEEE-SSSSS"),
        ],
    )
    found.block("Use", ["wmcache extract --dataset DATASET --encoder dinov2"])
    return found
