"""A Minari dataset with images -> frame dataset (minari.farama.org).

An episode of Minari has one observation more than actions. The last one, after which nothing was done, is not imported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from wmcache.cache.errors import UserError, command
from wmcache.cache.files import seconds_between_updates
from wmcache.cache.places import Place, cause_outside, unreadable
from wmcache.pipeline.frames import DatasetCard, Frames, Steps
from wmcache.pipeline.importers import Shape, Source, as_columns, write_dataset

if TYPE_CHECKING:
    from minari.dataset.minari_storage import MinariStorage


def import_minari(
    dataset: str,
    out: Place,
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
        image_key: of the uint8 [H, W, 3] observation, dotted where dictionaries are nested; None: the only such one.
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
    images = {key: space.shape for key, space in known.items() if _is_image(space)}
    vectors = {key: space.shape for key, space in known.items() if _is_vector(space)}
    if not images:
        raise UserError(
            f"Minari dataset {dataset} holds no images that --image-key could name (uint8, H x W x 3); "
            f"its observations are {_listing(known)}"
        )
    image_key = _choose(images, image_key, "--image-key", "images", dataset)
    state_key = _choose(vectors, state_key, "--state-key", "vectors of numbers", dataset)
    if not _is_vector(storage.action_space):
        raise UserError(
            f"the actions of Minari dataset {dataset} are {storage.action_space}; only vectors of numbers can be imported"
        )
    height, width = images[image_key][:2]
    size = shape.side(width, height, f"the image {image_key or 'observation'} of {dataset}")

    # Minari reads whole episodes, images too; shards end inside them.
    @functools.lru_cache(maxsize=1)
    def load(episode: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        return _load(storage, dataset, episode, image_key, state_key, vectors[state_key])

    def read(episode: int, wanted: range) -> Iterator[Frames]:
        for step in wanted:
            yield shape.frame(
                Image.fromarray(load(episode)[0][step]), size, f"episode {episode}, step {step} of {dataset}"
            )

    every = seconds_between_updates()
    with tqdm(range(storage.total_episodes), desc="read", unit=" episodes", mininterval=every) as bar:
        steps = _steps([load(episode)[1:] for episode in bar], dataset)
    name = str(storage.metadata.get("dataset_id", dataset))
    source = Source(dataset, steps, size, read, f"minari {name}{shape}", (), "imported from minari", fps)
    return write_dataset(source, out, frames_per_shard=frames_per_shard)


def _open(dataset: str) -> MinariStorage:
    try:
        from minari.dataset.minari_storage import MinariStorage
        from minari.storage import get_dataset_path
    except ImportError as error:
        raise UserError(f"minari is not installed ({error}); pip install 'wmcache[minari]'") from error
    folder = Path(dataset) if Path(dataset).is_dir() else Path(get_dataset_path(dataset))
    folder = folder / "data" if (folder / "data").is_dir() else folder
    try:
        _require_spaces(MinariStorage.read_raw_metadata(folder))
        return MinariStorage.read(folder)
    except Exception as error:  # (whatever Minari makes of files that may be anybody's)
        if outside := cause_outside(error):
            raise unreadable(folder, outside) from error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        mend = "" if Path(dataset).is_dir() else "; get it with: " + command("minari", "download", dataset)
        raise UserError(f"Minari dataset {dataset} cannot be opened ({reason}){mend}") from error


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
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3


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


def _load(
    storage: MinariStorage, dataset: str, episode: int, image_key: str, state_key: str, state_shape: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Images, actions and states of an episode, all as long as there are actions."""
    try:
        found = next(iter(storage.get_episodes([episode])))
        images, state = (_at(found["observations"], key) for key in (image_key, state_key))
        action = np.asarray(found["actions"])
    except Exception as error:  # (whatever Minari and HDF5 make of a damaged file)
        if outside := cause_outside(error):
            raise unreadable(Path(dataset), outside) from error
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"episode {episode} of Minari dataset {dataset} cannot be read ({reason}); get it again"
        ) from error
    count = len(action)
    wanted = [(count, *storage.action_space.shape), (count + 1, *state_shape)]
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and len(images) == count + 1
    if not (count and fits and [action.shape, state.shape] == wanted):
        raise UserError(
            f"episode {episode} of Minari dataset {dataset} has {images.dtype} images {images.shape}, "
            f"states {state.shape} and actions {action.shape}, which do not fit each other; get it again"
        )
    return images[:count], action, state[:count]


def _at(observations: Any, key: str) -> NDArray[Any]:
    for name in key.split(".") if key else ():
        observations = observations[name]
    return np.asarray(observations)


def _steps(episodes: list[tuple[NDArray[Any], NDArray[Any]]], dataset: str) -> Steps:
    if not episodes:
        raise UserError(f"Minari dataset {dataset} has no episodes")
    action, state = (np.concatenate(part) for part in zip(*episodes, strict=True))
    action, state = as_columns(action, state, f"Minari dataset {dataset}")
    lengths = [len(episode[0]) for episode in episodes]
    return Steps(
        np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        action,
        state,
    )
