"""Environment -> frame dataset: play all episodes, then draw each row of the step table in independent tasks, one per tar shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wmcache.cluster.tasks import WorkerTask, log, run_tasks
from wmcache.common.columns import Column
from wmcache.common.errors import UserError, suggest
from wmcache.common.paths import AnyPath, absolute, as_path, exists, remove
from wmcache.common.space import require_space
from wmcache.envs import POLICIES, Environment
from wmcache.pipeline.frames import DatasetCard, FrameDataset, FrameDatasetWriter, Frames, is_started, write_shard
from wmcache.pipeline.options import CollectOptions
from wmcache.pipeline.play import ENDS, Player, play_all
from wmcache.pipeline.played import PlayedEpisodes, Rows
from wmcache.pipeline.steps import Steps, read_steps


def collect(env: str, out: AnyPath, *, cluster: str = "local:1", **settings: Any) -> DatasetCard:
    """Collect a dataset of `CollectOptions(env, **settings)`; run again, it plays and draws only what is missing."""
    options = CollectOptions(env, **settings)
    player = player_of(options)
    if options.policy not in (known := behaviour_policies(player.open())):
        raise UserError(f"environment {env} has no policy {options.policy!r}; {suggest(options.policy, known)}")
    saved = PlayedEpisodes(out, options, player.open().spec.columns)
    if (steps := played_steps(out, options, saved.described)) is None:
        check_drawing(player, options, out)
        steps = play_all(player, options.episodes, cluster, saved)
    card = draw_dataset(out, options, steps, cluster)
    saved.remove()
    return card


def played_steps(out: AnyPath, options: CollectOptions, described: dict[str, Column]) -> Steps | None:
    """Return the step table of the dataset of these settings, finished or not, or None; raises UserError for a dataset with others."""
    if not (is_started(out, _card_fields(options)) and exists(out / "steps.parquet")):
        return None
    if exists(out / "dataset.json"):
        # A process may have died between the two.
        remove(out / "unfinished.json")
        steps = FrameDataset.open(out).steps
    else:
        steps = read_steps(out, described=described)
    if not steps.in_order():
        raise UserError(f"{out / 'steps.parquet'} is damaged; collect into another --out")
    lengths = np.bincount(steps.episode)
    ended = np.zeros(len(steps), bool)
    for name in ENDS:
        ended |= steps.columns.get(name, False)
    # Ends belong to the frame before the last one.
    shorter = (lengths < options.length) & ended[np.cumsum(lengths) - 2]
    if not (shorter | (lengths == options.length)).all():
        differs = f"{lengths.max()} frames in an episode, not {options.length}"
        raise UserError(f"{out} is a dataset with {differs}; use its settings, or another --out")
    return steps


def _card_fields(options: CollectOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name != "length"}


def player_of(options: CollectOptions) -> Player:
    """Return what plays a dataset's episodes."""
    return Player(options.env, (), options.image_size, options.seed, options.policy, options.length)


def behaviour_policies(env: Environment) -> list[str]:
    """List the policies that need no trained model."""
    return sorted({*env.policies, *POLICIES})


def check_drawing(player: Player, options: CollectOptions, out: AnyPath) -> None:
    """Raise UserError without disk space or OpenGL, or where the environment does not replay, before anything is written."""
    most = options.episodes * options.length
    # A frame of few colours is about 2 kB at 112 px as PNG; twice the pixels, twice the edges.
    require_space(out, 30 * options.image_size * most, f"a dataset of {most} frames")
    if not player.open().spec.renders_states:
        check_replay(player)
    draw_one(player.open())


def draw_dataset(out: AnyPath, options: CollectOptions, steps: Steps, cluster: str = "local:1") -> DatasetCard:
    """Draw the frames of played episodes, and finish their dataset; run again, it draws only missing shards."""
    spec = player_of(options).open().spec
    fps = max(1, round(spec.fps))
    card = DatasetCard(name=out.name, maze=list(spec.layout), frames=len(steps), fps=fps, **_card_fields(options))
    writer = FrameDatasetWriter(out, card, steps)
    pending = writer.pending()
    total = sum(len(card.shard_frames(shard)) for shard in pending)
    task = DrawShard(absolute(out), steps.sha256(), writer.card)
    run_tasks(task, pending, cluster=cluster, total=total, label="collect")
    return writer.finish()


def draw_one(env: Environment) -> None:
    """Draw a frame; raises UserError without OpenGL, before anything is written."""
    seen = env.reset([env.sample_task(np.random.default_rng(0), goal=False)])
    size = env.spec.image_size
    if seen.image.shape != (1, size, size, 3):
        raise UserError(f"environment {env.spec.id} draws frames {seen.image.shape}, not (1, {size}, {size}, 3)")


def check_replay(player: Player) -> None:
    """Play the first episode, then compare its replay and two drawings of it; raises UserError where something differs."""
    (recorded,) = player.play([0])
    frames, largest = len(recorded["action"]), 0.0
    first: dict[int, Frames] = {}
    for _ in range(2):
        for t, (seen, drift) in enumerate(player.replay(0, recorded, frames)):
            largest = max(largest, drift)
            if not np.array_equal(first.setdefault(t, seen.image), seen.image):
                raise UserError(
                    f"environment {player.env} does not replay: the frame of episode 0 differs at step {t}; take all of its random "
                    "numbers from the seed of reset"
                )
    log(f"collect: {player.env} is drawn by replay; largest difference of episode 0: {largest:.2g}")


@dataclass(frozen=True)
class DrawShard(WorkerTask[int, Steps]):
    """Draw the frames of a shard. A worker reads the step table at `out`, whose checksum is `steps_sha256`, once."""

    out: str
    steps_sha256: str
    card: DatasetCard

    def setup(self) -> Steps:
        """Read the step table."""
        return read_steps(as_path(self.out), described=self.card.columns)

    def run(self, state: Steps, item: int) -> int:
        """Draw a shard; returns its frames."""
        card, frames = self.card, self.card.shard_frames(item)
        player = Player(card.env, card.layout, card.image_size, card.seed, card.policy, length=0)
        env = player.open()
        images: Iterator[Frames] = _replayed(player, state, frames)
        if env.spec.renders_states:
            states = state.state
            assert states is not None
            images = (env.render(states[frame : frame + 1])[0] for frame in frames)
        samples = ((state.key(frame), image) for frame, image in zip(frames, images, strict=True))
        write_shard(as_path(self.out), item, samples)
        return len(frames)


def _replayed(player: Player, steps: Steps, frames: range) -> Iterator[Frames]:
    """Draw frames by replaying the episodes that overlap them."""
    largest = 0.0
    for episode in np.unique(steps.episode[frames.start : frames.stop]).tolist():
        first, end = np.searchsorted(steps.episode, [episode, episode + 1]).tolist()
        recorded: Rows = {name: values[first:end] for name, values in steps.columns.items()}
        for row, (seen, drift) in enumerate(player.replay(episode, recorded, min(end, frames.stop) - first), first):
            largest = max(largest, drift)
            if row >= frames.start:
                yield seen.image[0]
    if largest:
        log(f"collect: largest difference of the replay of frames {frames.start} to {frames.stop - 1}: {largest:.2g}")
