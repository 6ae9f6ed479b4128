"""A Minari dataset with images -> frame dataset (minari.farama.org).

An episode of Minari has one observation more than actions. The last one is not imported, and may be missing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.common.columns import Column
from wmcache.common.errors import UserError, command
from wmcache.common.options import option
from wmcache.common.progress import seconds_between_updates
from wmcache.common.reading import reading
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.base import IMPORTERS, Source
from wmcache.pipeline.importers.conversions import (
    ACTION,
    STATE,
    ImageImporter,
    build_steps,
    channel_axis,
    describe,
    is_action_missing,
    note,
    number_steps,
)
from wmcache.pipeline.steps import Steps

if TYPE_CHECKING:
    from minari.dataset.minari_storage import MinariStorage

SCALARS = {"reward": "rewards", "terminated": "terminations", "truncated": "truncations"}
"""Column -> Minari's name of it."""


@IMPORTERS.register("minari")
@dataclass(frozen=True, kw_only=True)
class MinariImporter(ImageImporter):
    """Import a local Minari DATASET, by its id or its folder."""

    metavar: ClassVar[str] = "DATASET"
    local: ClassVar[frozenset[str]] = frozenset()
    image_key: str | None = option(
        None, "Observation that is the image, as in pixels or agent.image.  [default: the only one]"
    )
    state_key: str | None = option(None, "Observation that is the state.  [default: the only vector, if any]")

    def open(self) -> Source:
        """See `Importer.open`; actions are rounded to float32."""
        data = _Dataset(self.source, self.image_key, self.state_key)
        size = self.side_of(data.image_shape, f"the image {data.image_key or 'observation'} of {self.source}")
        # Minari reads whole episodes with their images; shards end inside them.
        load = functools.lru_cache(maxsize=1)(data.load)

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            images, *_ = load(episode)
            for step in wanted:
                yield self.frame_of(images[step], size, f"episode {episode}, step {step} of {self.source}")

        every = seconds_between_updates()
        with tqdm(range(data.storage.total_episodes), desc="read", unit=" episodes", mininterval=every) as bar:
            episodes = [load(episode)[1:] for episode in bar]
        if short := sum(missing for _, missing in episodes):
            note(f"{short} of {len(episodes)} episodes of {self.source} have no last action; its frame is not imported")
        steps = data.steps([columns for columns, _ in episodes])
        env = f"minari {data.storage.metadata.get('dataset_id', self.source)}{self.changes}"
        return Source(self.source, steps, size, read, env, (), "imported from minari", self.fps)


class _Dataset:
    """An open dataset and the observations to import from it."""

    def __init__(self, name: str, image_key: str | None, state_key: str | None) -> None:
        self.name, self.storage = name, _open(name)
        known = _leaves(self.storage.observation_space)
        images = [key for key, space in known.items() if _is_image(space)]
        vectors = [key for key, space in known.items() if _is_vector(space)]
        colour = [key for key in images if known[key].shape[2:] == (3,)]
        if image_key is None and len(colour) == 1:
            image_key = colour[0]  # preferred to grey images and channels first
        self.image_key = _choose(known, images, image_key, "--image-key", name)
        has_state = bool(vectors) or state_key is not None
        self.state_key = _choose(known, vectors, state_key, "--state-key", name) if has_state else None
        self.action_space = self.storage.action_space
        if not _is_vector(self.action_space) and not isinstance(self.action_space, spaces.Discrete):
            raise UserError(f"actions of Minari dataset {name} are {self.action_space}, neither vectors nor Discrete")
        self.image_shape = known[self.image_key].shape
        self.state_shape = () if self.state_key is None else known[self.state_key].shape

    def load(self, episode: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]], bool]:
        """Read images, columns [T, …] by name, and whether a further observation had NaN as its action."""
        fault = f"episode {episode} of Minari dataset {self.name} cannot be read"
        with reading(Path(self.name), fault, "restore its files"):
            found = next(iter(self.storage.get_episodes([episode])))
            images, action = _at(found["observations"], self.image_key), np.asarray(found["actions"])
            state = images if self.state_key is None else _at(found["observations"], self.state_key)
            columns = {name: np.asarray(found[key]) for name, key in SCALARS.items()}
        count, action_shape = len(action), self.action_space.shape
        kinds = (images.dtype, images.shape[1:], action.shape[1:], *(values.shape for values in columns.values()))
        wanted = (np.dtype(np.uint8), self.image_shape, action_shape, *((count,) for _ in columns))
        fits = kinds == wanted and (self.state_key is None or state.shape[1:] == self.state_shape)
        if not count or not fits or not {len(images), len(state)} <= {count, count + 1}:
            shapes = f"{images.dtype} images {images.shape}, states {state.shape} and actions {action.shape}"
            raise UserError(
                f"episode {episode} of Minari dataset {self.name} has {shapes}, which its spaces or the number of actions do not "
                "allow; record it again, or leave it out with filter_episodes"
            )
        columns["action"] = self._one_hot(action, episode) if isinstance(self.action_space, spaces.Discrete) else action
        if self.state_key is not None:
            columns["state"] = state
        missing = bool(count > 1 and is_action_missing(columns["action"][-1:])[0])
        count -= missing
        return images[:count], {name: values[:count] for name, values in columns.items()}, missing

    def _one_hot(self, action: NDArray[Any], episode: int) -> NDArray[np.float32]:
        space = self.action_space
        numbers = action - space.start
        if len(wrong := np.flatnonzero(~np.isin(numbers, np.arange(space.n)))):
            where = f"{wrong[0]} of episode {episode} of Minari dataset {self.name}"
            raise UserError(f"action {action[wrong[0]]} at step {where} is not in {space}; record it again")
        one_hot: NDArray[np.float32] = np.eye(int(space.n), dtype=np.float32)[numbers]
        return one_hot

    def steps(self, episodes: list[dict[str, NDArray[Any]]]) -> Steps:
        """Make the step table of the columns of all episodes."""
        where = f"Minari dataset {self.name}"
        numbers = number_steps([len(columns["action"]) for columns in episodes], where)
        values = {name: np.concatenate([columns[name] for columns in episodes]) for name in episodes[0]}
        described = {"action": describe("action", values["action"], ACTION, "float32", where, **self._bounds())}
        if "state" in values:
            described["state"] = describe("state", values["state"], STATE, "float64", where)
        described["reward"] = Column(("reward",), "float64")
        described["terminated"] = Column(("terminated",), "bool")
        described["truncated"] = Column(("truncated",), "bool")
        return build_steps(*numbers, values, described, where)

    def _bounds(self) -> dict[str, Any]:
        """Return the bounds of actions, as of `Column`; none where the space has none."""
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return {"low": (0.0,) * int(space.n), "high": (1.0,) * int(space.n), "discrete": True}
        bounded = np.isfinite(space.low).all() and np.isfinite(space.high).all()
        return {"low": tuple(space.low.tolist()), "high": tuple(space.high.tolist())} if bounded else {}


def _open(dataset: str) -> MinariStorage:
    try:
        from minari.dataset.minari_storage import MinariStorage
        from minari.storage import get_dataset_path
    except ImportError as error:
        raise UserError(f"minari is not installed ({error}); pip install 'wmcache[minari]'") from error
    given = Path(dataset)
    folder = given if given.is_dir() else Path(get_dataset_path(dataset))
    folder = folder / "data" if (folder / "data").is_dir() else folder
    hint = "check the folder" if given.is_dir() else "get it with: " + command("minari", "download", dataset)
    with reading(folder, f"Minari dataset {dataset} cannot be opened", hint):
        metadata = MinariStorage.read_raw_metadata(folder)
        for name in ("observation_space", "action_space"):
            if metadata.get(name) is None:
                # Minari would make the environment that the file names, which may run any code.
                raise ValueError(f"metadata.json has no {name}")
        return MinariStorage.read(folder)


def _leaves(space: Any, key: str = "") -> dict[str, Any]:
    """Return the spaces inside nested dictionaries by dotted key; a space that is no dictionary has the key ""."""
    if not isinstance(space, spaces.Dict):
        return {key: space}
    inner = (_leaves(part, f"{key}.{name}" if key else name) for name, part in space.spaces.items())
    return {name: leaf for part in inner for name, leaf in part.items()}


def _is_image(space: Any) -> bool:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 2 or channel_axis(space.shape) is not None


def _is_vector(space: Any) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating)


def _choose(known: dict[str, Any], fitting: list[str], key: str | None, option: str, dataset: str) -> str:
    """Return the key of the observation to import: the given one, or the only one that fits."""
    if key is None and len(fitting) == 1:
        return fitting[0]
    if key is None or key not in fitting:
        found = ", ".join(f"{name or 'the observation'} is {_kind(space)}" for name, space in known.items())
        wrong = f"{len(fitting)} observations fit" if key is None else f"{key!r} does not fit"
        raise UserError(
            f"Minari dataset {dataset}: {wrong}; pass {option}, one of {', '.join(fitting) or 'none'} ({found}; an image is uint8 with "
            "1 or 3 channels, a state is a vector of floats)"
        )
    return key


def _kind(space: Any) -> str:
    return f"{'x'.join(map(str, space.shape))} {space.dtype}" if isinstance(space, spaces.Box) else str(space)


def _at(observations: Any, key: str) -> NDArray[Any]:
    for name in key.split(".") if key else ():
        observations = observations[name]
    return np.asarray(observations)
