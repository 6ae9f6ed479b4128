"""Settings of collections, fits and extractions, and of encoders as they are created."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from wmcache.common.options import Natural, Positive, option


@dataclass(frozen=True)
class CollectOptions:
    """Settings of `pipeline.collect.collect`; the same settings give the same bytes."""

    env: str = option(
        "wmcache/PointMaze-UMaze-v0",
        "Environment: UMaze, a .txt grid, PushT, Wall, gym:CartPole-v1, package:MyEnv-v0, dmc:reacher-easy, metaworld:drawer-open-v3.",
    )
    episodes: Positive = option(2000, "Episodes to collect; DINO-WM has 2000.")
    length: Positive = option(100, "Frames in each episode; fewer where the environment ends it.")
    policy: str = option(
        "random",
        "Behaviour policy: random (DINO-WM), held, sticky, one of the environment's own (expert, navigate, stitch), or the folder of a "
        "run, which acts as wmplan does.",
    )
    seed: Natural = option(0, "Seed of the dataset; the same seed gives the same bytes.")
    image_size: Annotated[int, Ge(8), Le(2048)] = option(224, "Side of the frames in pixels.")
    frames_per_shard: Positive = option(512, "Frames in each tar, and in each Zarr shard made from it.")


@dataclass(frozen=True)
class DistractOptions:
    """Distraction of the environment; it becomes a part of the environment's name, and so of the dataset."""

    distract: str | None = option(
        None,
        "Distract by kinds, separated by commas: colors, camera, background, jitter, ball; each episode looks different. A part of the "
        "environment's name afterwards: UMaze+colors,camera@3.",
    )
    distract_seed: Natural = option(
        0, "Seed of the distraction. Colours of an even seed and of an odd seed are disjoint: source and target."
    )


@dataclass(frozen=True)
class EncoderOptions:
    """Settings of `encoders.create`; None takes the encoder's own."""

    image_size: Positive | None = option(
        None, "Side of the image that the network sees.  [default: the encoder's]", group="Encoder"
    )
    normalisation: Literal["half", "imagenet", "tensorflow"] | None = option(
        None, "Normalisation of pixels; half is DINO-WM's.  [default: the encoder's]"
    )
    filter: Literal["bilinear", "bicubic"] | None = option(
        None, "Filter for resizing frames.  [default: the encoder's]"
    )
    lag: Positive | None = option(None, "Env steps between the frames of a pair, for encoders of pairs.")
    dtype: Literal["auto", "float32", "bfloat16"] | None = option(None, "Compute precision.  [default: the encoder's]")


@dataclass(frozen=True)
class EncodeOptions(EncoderOptions):
    """Which encoder, and how it is run."""

    encoder: str = option("tcn", "Encoder, or several separated by commas; see: wmcache encoders.", group="Options")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.")
    batch: Positive = option(32, "Frames in each call of the encoder.", flag="--batch-size")


@dataclass(frozen=True)
class ExtractOptions(EncodeOptions):
    """Settings of an extraction."""

    store_dtype: Literal["float16", "int8"] = option(
        "float16",
        "Type of the stored tokens; int8 takes half the space, with one scale for each channel of each shard.",
    )


@dataclass(frozen=True)
class FitJobOptions:
    """Settings of a fit, beside those of its encoder."""

    encoder: str = option("tcn", "Encoder to fit: {names}.")
    base: str | None = option(
        None,
        "For an adapter, in place of --cache: its base encoder.  [default: the adapter's own]",
    )
    max_frames: Positive = option(50_000, "Frames to train on.")
    overwrite: bool = option(False, "Replace the weights of another fit.", flag="--overwrite")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.")
