"""Imagined episodes played by a policy: how long they last, what they return, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.joined import JoinedStore
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError, suggest
from wmcache.common.files import atomic_write, make_folder
from wmcache.common.jsonfiles import write_json
from wmcache.common.options import check_options
from wmcache.common.paths import AnyPath
from wmcache.common.progress import seconds_between_updates
from wmcache.common.video import ffmpeg, write_mp4
from wmcache.pipeline.stores import frames_of
from wmcache.planner.belief import FolderPolicy
from wmcache.planner.decode import open_decode
from wmcache.planner.dream import Dream
from wmcache.planner.judge import mean_of, wilson
from wmcache.planner.options import DreamOptions, is_policy_folder, policy_name
from wmcache.planner.policies import PLAN_POLICIES
from wmcache.planner.policies.random import draw_actions
from wmcache.planner.policies.zero import zero_action
from wmcache.planner.world import draw_again
from wmcache.trainer.dreaming import GOAL
from wmcache.trainer.metrics import Images

Act = Callable[[int, dict[str, Tensor]], Tensor]
"""(model step, features of E episodes) -> actions [E, f * A]."""
BLIND = ("random", "zero")
"""Policies that see nothing."""
PANEL = 128
"""Pixels of a frame in pictures, about."""
GAP = 4
COLUMNS = 10
"""Imagined frames of an episode in the picture."""
LONGEST = 600
"""Model steps in the video."""
ACTIONS = 3
"""Stream of a random policy's numbers, beside those of `Dream`."""


@dataclass(frozen=True)
class Played:
    """E imagined episodes.

    Attributes:
        lengths: int64 [E], model steps up to the end of each. ended: bool [E]; others were cut.
        returns: float64 [E].
        latents: [P, 1 + T, N, D] of the first P episodes, the start first; an episode stays at its last frame.
    """

    lengths: NDArray[np.int64]
    ended: NDArray[np.bool_]
    returns: NDArray[np.float64]
    latents: Tensor


def play_dreams(
    run: Path,
    out: Path,
    options: DreamOptions,
    *,
    decoder: Path | None = None,
    weights: Path | None = None,
    cache: AnyPath | Sequence[AnyPath] | None = None,
) -> dict[str, Any]:
    """Imagine episodes, and write `dream.json`, and `dream.mp4` and `dream.png` of the first ones.

    Args:
        decoder, weights: see `open_decode`. cache: see `Dream`.

    Returns:
        The content of `dream.json`: `return` and `steps` have mean, interval, lowest and highest; `ended` the share of the episodes that
        end before they are cut, with its interval.
    """
    check_options(options)
    dream = Dream(run, temperature=options.temperature, device=options.device, split=options.split, cache=cache)
    decode, real = None, None
    if options.pictured:
        ffmpeg()  # a missing program is reported before any work
        dream.require_latents()
        decode = open_decode(run, decoder, weights=weights, device=options.device)
        dream.reset(range(options.seed, options.seed + min(options.pictured, options.episodes)))
        real = real_frames(dream.store, dream.starts)
    played = play(dream, options)
    steps, ended = mean_of(played.lengths.astype(np.float64)), int(played.ended.sum())
    result = {
        "options": {**asdict(options), "temperature": dream.temperature, "device": str(dream.device)},
        "run": str(run),
        "frameskip": dream.frameskip,
        "most_steps": options.steps or dream.length,
        "steps": steps,
        "return": mean_of(played.returns),
        "ended": {"episodes": ended, "share": ended / options.episodes, "ci95": wilson(ended, options.episodes)},
    }
    make_folder(out)
    if decode is not None and real is not None:
        _draw(real, [decode(episode) for episode in played.latents], played.lengths, dream.fps, out)
    write_json(out / "dream.json", result)  # last, so that its presence means that the rest is complete
    return result


def play(dream: Dream, options: DreamOptions) -> Played:
    """Imagine episodes; episode n is that of seed n."""
    seeds, most = range(options.seed, options.seed + options.episodes), options.steps or dream.length
    act, goals = actor_of(dream, options.policy, seeds, most)
    features = dream.reset(seeds, goals=goals)
    lengths, returns = np.zeros(len(seeds), np.int64), np.zeros(len(seeds))
    ended = torch.zeros(len(seeds), dtype=torch.bool)
    shown = [dream.latents[: options.pictured]]
    with tqdm(total=most, desc="dream", unit=" model steps", mininterval=seconds_between_updates()) as bar:
        for step in range(most):
            lengths += ~ended.numpy()
            features, reward, found = dream.step(act(step, features))
            returns += reward.double().cpu().numpy()
            ended = found.cpu()
            if step < LONGEST:
                shown.append(dream.latents[: options.pictured])
            bar.update()
            if ended.all():
                break
    return Played(lengths, ended.numpy(), returns, torch.stack(shown, 1))


def actor_of(dream: Dream, policy: str, seeds: range, steps: int) -> tuple[Act, bool]:
    """Return what acts, and whether episodes have goals; raises UserError for an unknown policy.

    Args:
        policy: see `DreamOptions`. steps: most model steps of an episode.
    """
    if policy in BLIND:
        actions = planned(dream, policy, seeds, steps)
        return lambda step, _: actions[:, step], dream.needs_goals
    kind = PLAN_POLICIES.get(policy_name(policy)) if is_policy_folder(policy) else None
    if not (isinstance(kind, type) and issubclass(kind, FolderPolicy)):
        raise UserError(
            f"--policy {policy} does not act in dreams; {suggest(policy, BLIND)}, or a trained policy's folder"
        )
    decide = kind.load(Path(policy), dream.run, dream.dreams, dream.bounds, dream.frameskip)
    return lambda _, features: decide.actions(features), dream.needs_goals or GOAL in decide.inputs


def planned(dream: Dream, policy: str, seeds: range, steps: int) -> Tensor:
    """Return the actions of a policy that sees nothing, [E, steps, f * A]."""
    low, high = (np.asarray(bound, np.float64) for bound in (dream.action.low, dream.action.high))
    discrete, count = dream.action.discrete, steps * dream.frameskip
    if policy == "zero":
        actions = np.broadcast_to(zero_action(low, high, discrete=discrete), (len(seeds), count, len(low)))
    else:
        rngs = [np.random.default_rng((seed, ACTIONS)) for seed in seeds]
        actions = np.stack([draw_actions(rng, low, high, count, discrete=discrete) for rng in rngs])
    return torch.from_numpy(actions.astype(np.float32)).reshape(len(seeds), steps, -1)


def real_frames(store: TokenStore, frames: NDArray[np.int64]) -> Images:
    """Read frames [n] of the dataset, uint8 [n, S, S, 3], or draw them again where it is missing."""
    if isinstance(store, JoinedStore):
        found = {
            place: frame
            for part, numbers, places in store.by_part(frames)
            for place, frame in zip(places.tolist(), real_frames(part, numbers), strict=True)
        }
        return np.stack([found[place] for place in range(len(frames))])
    try:
        source = frames_of(store)
    except UserError:
        return draw_again(store, frames)
    unique, places = np.unique(frames, return_inverse=True)
    return source.read_frames(unique)[places]


def _draw(real: Images, drawn: list[Images], lengths: NDArray[np.int64], fps: float, out: Path) -> None:
    """Write the video and the picture: an episode each column or row, its real start first."""
    imagined = np.stack(drawn)
    size = max(side * max(1, PANEL // side) for side in (real.shape[1], imagined.shape[2]))
    start = np.stack([_enlarged(frame, size) for frame in real])
    video = [_framed([start, [_enlarged(frame, size) for frame in frames]]) for frames in imagined.swapaxes(0, 1)]
    write_mp4(out / "dream.mp4", video, fps)
    rows = []
    for first, frames, length in zip(start, imagined, lengths.tolist(), strict=False):
        chosen = np.unique(np.linspace(0, min(length, len(frames) - 1), COLUMNS).astype(int))
        chosen = np.pad(chosen, (0, COLUMNS - len(chosen)), mode="edge")
        rows.append([first, *(_enlarged(frames[step], size) for step in chosen)])
    with atomic_write(out / "dream.png") as file:
        Image.fromarray(_framed(rows)).save(file, "PNG")


def _enlarged(frame: Images, size: int) -> Images:
    if frame.shape[0] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.NEAREST))


def _framed(rows: Any) -> Images:
    """Join frames [rows][columns] of one size with white gaps; the sides are even."""
    bordered = [np.pad(frame, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for row in rows for frame in row]
    joined = np.concatenate([np.concatenate(list(part), 1) for part in np.split(np.stack(bordered), len(rows))])
    return np.pad(joined, (*((0, size % 2) for size in joined.shape[:2]), (0, 0)), constant_values=255)
