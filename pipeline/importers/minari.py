"""A Minari dataset with images -> frame dataset (minari.farama.org).

An episode of Minari has one observation more than actions. The last one, after which nothing was done, is not imported, and may be
missing. Images are uint8: H x W x 3, grey (H x W, H x W x 1), or with the channels first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from wmcache.common.errors import UserError, command
from wmcache.common.paths import AnyPath, cause_outside, unreadable
from wmcache.common.progress import seconds_between_updates
from wmcache.pipeline.frames import DatasetCard
from wmcache.pipeline.importers import (
    Shape,
    Source,
    as_columns,
    is_action_missing,
    note,
    refuse_lerobot,
    write_dataset,
)
from wmcache.pipeline.steps import Steps
from wmcache.pipeline.tars import Frames

if TYPE_CHECKING:
    from minari.dataset.minari_storage import MinariStorage


@dataclass(frozen=True)
class _Episode:
    """What is imported of an episode.

    Attributes:
        images: uint8 [T, ...]. action: [T, A]. state: [T, P].
        action_missing: there was a further observation with an action that is NaN.
    """

    images: NDArray[np.uint8]
    action: NDArray[Any]
    state: NDArray[Any]
    action_missing: bool


def import_minari(
    dataset: str,
    out: AnyPath,
    *,
    image_key: str | None = None,
    state_key: str | None = None,
    shape: Shape | None = None,
    fps: int = 20,
    frames_per_shard: int,
) -> DatasetCard:
    """Import a local Minari dataset whose observations hold an image and a state; actions are rounded to float32.

    Args:
        dataset: its id, or its folder.
        out: the dataset's folder.
        image_key: of the image observation, dotted where dictionaries are nested; None: the only such one.
        state_key: of the observation that is a vector of numbers; None: the only such one.
        shape: how images become square frames of one size; by default they must be that already.
        fps: env steps per second, for videos made from the dataset.
        frames_per_shard: frames in each tar.

    Raises:
        UserError: minari is not installed, there is no such dataset, or it does not hold what is needed; all that `write_dataset` raises.
    """
    shape = shape or Shape()
    storage = _open(dataset)
    known = _leaves(storage.observation_space)
    images = {key: space for key, space in known.items() if _is_image(space)}
    vectors = {key: space.shape for key, space in known.items() if _is_vector(space)}
    colour = [key for key, space in images.items() if space.shape[2:] == (3,)]
    if image_key is None and len(colour) == 1:
        image_key = colour[0]  # before grey ones and those with the channels first
    if not images or (image_key in known and image_key not in images):
        asked = known if image_key not in known else {image_key: known[image_key]}
        raise UserError(
            f"Minari dataset {dataset} has no {'images' if len(asked) > 1 else 'image'} that can be imported: {_described(asked)}; "
            "an image is uint8, H x W x 3 or 3 x H x W, or grey: H x W, H x W x 1 or 1 x H x W"
        )
    image_key = _choose(images, image_key, "--image-key", "images", dataset)
    state_key = _choose(vectors, state_key, "--state-key", "vectors of numbers", dataset)
    if not _is_vector(storage.action_space):
        raise UserError(
            f"the actions of Minari dataset {dataset} are {storage.action_space}; only vectors of numbers can be imported"
        )
    first_channel = _channel_axis(images[image_key].shape) == 0
    height, width = images[image_key].shape[1:] if first_channel else images[image_key].shape[:2]
    size = shape.side(width, height, f"the image {image_key or 'observation'} of {dataset}")

    # Minari reads whole episodes, images too; shards end inside them.
    @functools.lru_cache(maxsize=1)
    def load(episode: int) -> _Episode:
        return _load(storage, dataset, episode, image_key, state_key, images[image_key].shape, vectors[state_key])

    def read(episode: int, wanted: range) -> Iterator[Frames]:
        for step in wanted:
            image = Image.fromarray(_colours(load(episode).images[step]))
            yield shape.frame(image, size, f"episode {episode}, step {step} of {dataset}")

    every = seconds_between_updates()
    with tqdm(range(storage.total_episodes), desc="read", unit=" episodes", mininterval=every) as bar:
        # Without the images.
        episodes = [replace(load(episode), images=np.empty(0, np.uint8)) for episode in bar]
    steps = _steps(episodes, dataset)
    if short := sum(episode.action_missing for episode in episodes):
        note(
            f"{short} of {len(episodes)} episodes of {dataset} have no last action; "
            "the frame before it, after which nothing was done, is not imported"
        )
    name = str(storage.metadata.get("dataset_id", dataset))
    source = Source(dataset, steps, size, read, f"minari {name}{shape}", (), "imported from minari", fps)
    return write_dataset(source, out, frames_per_shard=frames_per_shard)


def _open(dataset: str) -> MinariStorage:
    try:
        from minari.dataset.minari_storage import MinariStorage
        from minari.storage import get_dataset_path
    except ImportError as error:
        raise UserError(f"minari is not installed ({error}); pip install 'wmcache[minari]'") from error
    refuse_lerobot(Path(dataset))
    folder = Path(dataset) if Path(dataset).is_dir() else Path(get_dataset_path(dataset))
    folder = folder / "data" if (folder / "data").is_dir() else folder
    try:
        _require_spaces(MinariStorage.read_raw_metadata(folder))
        return MinariStorage.read(folder)
    except Exception as error:  # (whatever Minari makes of files that may be anybody's)
        if outside := cause_outside(error):
            raise unreadable(folder, outside) from error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        hint = "" if Path(dataset).is_dir() else "; get it with: " + command("minari", "download", dataset)
        raise UserError(f"Minari dataset {dataset} cannot be opened ({reason}){hint}") from error


def _require_spaces(metadata: dict[str, Any]) -> None:
    """Raise ValueError where Minari would ask the environment that the file names for its spaces: it may be any code."""
    for name in ("observation_space", "action_space"):
        if metadata.get(name) is None:
            raise ValueError(f"metadata.json has no {name}")


def _leaves(space: Any, key: str = "") -> dict[str, Any]:
    """The spaces inside nested dictionaries, by dotted key; a space that is no dictionary has the key ""."""
    if not isinstance(space, spaces.Dict):
        return {key: space}
    inner = (_leaves(part, f"{key}.{name}" if key else name) for name, part in space.spaces.items())
    return {name: leaf for part in inner for name, leaf in part.items()}


def _is_image(space: Any) -> bool:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 2 or _channel_axis(space.shape) is not None


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Which axis of an image is its 1 or 3 channels, the last one where both could be; None where there is none."""
    if len(shape) != 3:
        return None
    return next((axis for axis in (2, 0) if shape[axis] in (1, 3)), None)


def _colours(image: NDArray[np.uint8]) -> Frames:
    """An image as uint8 [H, W, 3]."""
    if image.ndim == 2:
        image = image[:, :, None]
    elif _channel_axis(image.shape) == 0:
        image = image.transpose(1, 2, 0)
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def _is_vector(space: Any) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating)


def _choose(known: dict[str, Any], key: str | None, option: str, what: str, dataset: str) -> str:
    if key is None and len(known) == 1:
        return next(iter(known))
    if key is None or key not in known:
        wanted = f"no {key!r}" if key is not None else f"{len(known)}"
        raise UserError(
            f"Minari dataset {dataset} has {wanted} among its {what}: pass {option}, one of {_listing(known)}"
        )
    return key


def _listing(known: dict[str, Any]) -> str:
    return ", ".join(name or "(the observation itself)" for name in known) or "none"


def _described(known: dict[str, Any]) -> str:
    return ", ".join(
        f"{name or 'the observation'} is {'x'.join(map(str, space.shape)) or 'a number'} {space.dtype}"
        if isinstance(space, spaces.Box)
        else f"{name or 'the observation'} is {space}"
        for name, space in known.items()
    )


def _load(
    storage: MinariStorage,
    dataset: str,
    episode: int,
    image_key: str,
    state_key: str,
    image_shape: tuple[int, ...],
    state_shape: tuple[int, ...],
) -> _Episode:
    """Images, actions and states of an episode, as many as there are actions."""
    try:
        found = next(iter(storage.get_episodes([episode])))
        images, state = (_at(found["observations"], key) for key in (image_key, state_key))
        action = np.asarray(found["actions"])
    except Exception as error:  # (whatever Minari and HDF5 make of a damaged file)
        if outside := cause_outside(error):
            raise unreadable(Path(dataset), outside) from error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"episode {episode} of Minari dataset {dataset} cannot be read ({reason}); restore its files"
        ) from error
    count = len(action)
    fits = (
        count > 0
        and action.shape == (count, *storage.action_space.shape)
        and state.shape[1:] == state_shape
        and images.dtype == np.uint8
        and images.shape[1:] == image_shape
        and {len(images), len(state)} <= {count, count + 1}
    )
    if not fits:
        raise UserError(
            f"episode {episode} of Minari dataset {dataset} has {images.dtype} images {images.shape}, "
            f"states {state.shape} and actions {action.shape}, and needs as many images {image_shape} and states {state_shape} "
            f"as actions {storage.action_space.shape}, or one more; record it again, or leave it out with minari's filter_episodes"
        )
    missing = bool(count > 1 and is_action_missing(action[-1:])[0])
    count -= missing
    return _Episode(images[:count], action[:count], state[:count], missing)


def _at(observations: Any, key: str) -> NDArray[Any]:
    for name in key.split(".") if key else ():
        observations = observations[name]
    return np.asarray(observations)


def _steps(episodes: list[_Episode], dataset: str) -> Steps:
    if not episodes:
        raise UserError(f"Minari dataset {dataset} has no episodes")
    lengths = [len(episode.action) for episode in episodes]
    number = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    step = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    action, state = as_columns(
        np.concatenate([episode.action for episode in episodes]),
        np.concatenate([episode.state for episode in episodes]),
        f"Minari dataset {dataset}",
        lambda row: f"episode {number[row]}, step {step[row]}",
    )
    return Steps(number, step, action, state)
