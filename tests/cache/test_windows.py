"""Windows, splits and orders are pure functions of their arguments, so that any run can be repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmcache.cache import TokenStore
from wmcache.cache.windows import (
    Goals,
    batch_windows,
    episode_pieces,
    epoch_order,
    goal_draws,
    split_episodes,
    window_starts,
)
from wmcache.common.errors import UserError


def test_an_episode_of_100_frames_has_dino_wms_81_windows() -> None:
    starts, dropped = window_starts(np.repeat(np.arange(2), 100), np.arange(2), span=(3 + 1) * 5)
    np.testing.assert_array_equal(starts, [*range(81), *range(100, 181)])
    assert dropped == 0


def test_a_window_has_frames_and_the_actions_that_follow_each(store: TokenStore) -> None:
    windows = store.windows(history=3, predict=1, frameskip=5)
    assert len(windows) == 6 * (60 - 20 + 1)
    chosen = np.array([0, 41, len(windows) - 1, 17])
    batch = windows.batch(chosen)
    for row, start in enumerate(windows.starts[chosen]):
        frames = [start, start + 5, start + 10, start + 15]
        np.testing.assert_array_equal(batch["tokens"][row], store.gather(np.array(frames)))
        np.testing.assert_array_equal(batch["proprio"][row], store.state[frames].astype(np.float32))
        for t, frame in enumerate(frames):
            # Both components of the first env step, then of the second, and so on.
            actions = [store.action[frame + i] for i in range(5)]
            np.testing.assert_array_equal(batch["action"][row, t], np.concatenate(actions))
    assert batch["action"].dtype == batch["proprio"].dtype == np.float32


def test_a_batch_fills_a_given_buffer(store: TokenStore) -> None:
    windows = store.windows()
    chosen = np.array([3, 100])
    out = np.full((2 * windows.length, *store.gather(np.array([0])).shape[1:]), np.nan, np.float16)
    batch = windows.batch(chosen, out)
    assert np.shares_memory(batch["tokens"], out)
    np.testing.assert_array_equal(batch["tokens"], windows.batch(chosen)["tokens"])


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    span=st.integers(1, 30),
    data=st.data(),
)
def test_no_window_crosses_an_episode_and_none_is_missing(lengths: list[int], span: int, data: st.DataObject) -> None:
    episode = np.repeat(np.arange(len(lengths)), lengths)
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(lengths))))))
    starts, dropped = window_starts(episode, np.array(chosen, dtype=np.int64), span)
    possible = [
        start
        for start in range(len(episode) - span + 1)
        if episode[start] in chosen and len(set(episode[start : start + span])) == 1
    ]
    assert starts.tolist() == possible
    assert dropped == sum(lengths[e] < span for e in chosen)


@given(episodes=st.integers(2, 300), seed=st.integers(0, 2**32))
def test_train_and_val_share_no_episode(episodes: int, seed: int) -> None:
    train, val = (set(split_episodes(episodes, split, seed).tolist()) for split in ("train", "val"))
    assert not train & val
    assert train | val == set(split_episodes(episodes, "all", seed).tolist()) == set(range(episodes))
    assert len(val) >= 1
    assert abs(len(train) - 0.9 * episodes) <= 1


@given(episodes=st.integers(2, 300), small=st.floats(0.01, 1), large=st.floats(0.01, 1))
def test_a_smaller_share_of_the_episodes_is_a_part_of_every_larger_one(
    episodes: int, small: float, large: float
) -> None:
    small, large = sorted((small, large))
    whole = set(split_episodes(episodes, "train", 42).tolist())
    fewer, more = (set(split_episodes(episodes, "train", 42, share).tolist()) for share in (small, large))
    assert fewer
    assert fewer <= more <= whole
    assert abs(len(more) - large * len(whole)) <= 1


def test_the_split_depends_on_its_seed() -> None:
    assert split_episodes(50, "val", 1).tolist() == split_episodes(50, "val", 1).tolist()
    assert split_episodes(50, "val", 1).tolist() != split_episodes(50, "val", 2).tolist()


def test_splits_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match=r"'test'.* train, val, all"):
        split_episodes(10, "test", 0)
    with pytest.raises(UserError, match=r"1 episodes .*train"):
        split_episodes(1, "train", 0)


@given(
    windows=st.integers(1, 60),
    batch=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    step=st.integers(0, 20),
)
def test_a_run_resumed_at_any_step_sees_what_it_would_have_seen(windows: int, batch: int, seed: int, step: int) -> None:
    epochs = (step + 1) * batch // windows + 1
    order = np.concatenate([epoch_order(windows, seed, epoch) for epoch in range(epochs)])
    np.testing.assert_array_equal(batch_windows(windows, seed, step, batch), order[step * batch : (step + 1) * batch])


@given(
    windows=st.integers(1, 60),
    size=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    step=st.integers(0, 30),
    world_size=st.integers(1, 6),
)
def test_processes_together_see_what_one_alone_sees(
    windows: int, size: int, seed: int, step: int, world_size: int
) -> None:
    batch = world_size * size
    parts = [batch_windows(windows, seed, step, batch, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [size] * world_size
    np.testing.assert_array_equal(np.concatenate(parts), batch_windows(windows, seed, step, batch))


def test_a_batch_is_not_cut_into_unequal_slices() -> None:
    with pytest.raises(ValueError, match=r"8 .* 3 "):
        batch_windows(50, 0, 0, 8, 0, 3)


def test_changing_a_batch_does_not_change_the_order() -> None:
    first = batch_windows(50, 3, 0, 20)
    expected = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(batch_windows(50, 3, 0, 20), expected)


def test_epochs_and_seeds_have_different_orders_of_all_windows() -> None:
    orders = [tuple(epoch_order(100, seed, epoch).tolist()) for seed in range(3) for epoch in range(5)]
    assert len(set(orders)) == len(orders)
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(100))}
    epoch_order.cache_clear()  # another process computes them again
    assert orders[:5] == [tuple(epoch_order(100, 0, epoch).tolist()) for epoch in range(5)]


class TestGoals:
    @pytest.mark.parametrize("goals", [Goals(), Goals(horizon=3), Goals(discount=0.8), Goals(horizon=4, discount=0.5)])
    def test_a_goal_is_a_later_frame_of_the_episode(self, store: TokenStore, goals: Goals) -> None:
        windows = store.windows(1, 1, 5, goals=goals)
        chosen = np.arange(len(windows))
        batch = windows.batch(chosen, draws=goal_draws(0, 0, len(chosen)))
        assert batch["tokens"].shape[1] == 2
        last = windows.frames(chosen)[:, -1]
        wanted = last + 5 * batch["goal_steps"]
        np.testing.assert_array_equal(store.episode[wanted], store.episode[last])
        np.testing.assert_array_equal(batch["goal_tokens"], store.gather(wanted))
        np.testing.assert_array_equal(batch["tokens"][:, 0], store.gather(windows.starts))
        most = (59 - store.step[last]) // 5
        assert (most >= 1).all()
        assert (batch["goal_steps"] <= np.minimum(most, goals.horizon or 60)).all()
        assert set(batch["goal_steps"]) >= {1, 2, 3}

    @pytest.mark.parametrize(("discount", "expected"), [(1.0, [0.25] * 4), (0.5, [8 / 15, 4 / 15, 2 / 15, 1 / 15])])
    def test_their_distances_are_uniform_or_geometric(self, discount: float, expected: list[float]) -> None:
        found = Goals(horizon=4, discount=discount).steps(np.full(20_000, 9), goal_draws(1, 2, 20_000))
        np.testing.assert_allclose(np.bincount(found, minlength=5)[1:] / 20_000, expected, atol=0.02)

    def test_they_depend_on_seed_and_step_and_not_on_the_ranks(self) -> None:
        whole = goal_draws(3, 7, 12)
        np.testing.assert_array_equal(np.concatenate([goal_draws(3, 7, 12, rank, 3) for rank in range(3)]), whole)
        assert not np.array_equal(goal_draws(3, 8, 12), whole)
        assert not np.array_equal(goal_draws(4, 7, 12), whole)

    def test_an_episode_without_a_frame_after_the_window_has_none(self, finished: Path) -> None:
        store = TokenStore.open(finished)  # the shorter episode has 20 frames
        assert len(store.windows(0, 1, 20, goals=Goals())) == 10
        assert len(store.windows(0, 1, 20)) == 1 + 11


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    length=st.integers(2, 12),
    frameskip=st.integers(1, 5),
)
def test_pieces_of_episodes_have_each_frame_once(lengths: list[int], length: int, frameskip: int) -> None:
    episode = np.repeat(np.arange(len(lengths)), lengths)
    starts, counts, dropped = episode_pieces(episode, np.arange(len(lengths)), length, frameskip)
    assert (np.diff(starts) > 0).all()
    assert ((counts >= 2) & (counts <= length)).all()
    found = [start + frameskip * np.arange(count) for start, count in zip(starts, counts, strict=True)]
    frames = np.concatenate([*found, np.zeros(0, np.int64)]).astype(np.int64)
    assert len(np.unique(frames)) == len(frames)
    first = np.cumsum([0, *lengths])
    without = 0
    for number, count in enumerate(lengths):
        # A piece needs two frames.
        phases = [np.arange(first[number] + phase, first[number + 1], frameskip) for phase in range(frameskip)]
        expected = [phase[: len(phase) - (len(phase) % length == 1)] for phase in phases]
        inside = frames[(frames >= first[number]) & (frames < first[number + 1])]
        np.testing.assert_array_equal(np.sort(inside), np.sort(np.concatenate(expected)))
        without += not len(inside)
        assert first[number] in starts or count <= frameskip
    assert dropped == without


def test_windows_of_whole_episodes_repeat_their_last_frame_without_weight(store: TokenStore) -> None:
    windows = store.windows(63, 1, 1, "train", whole=True)
    assert windows.length == 60  # that of the episodes
    assert windows.lengths is not None
    assert windows.lengths.tolist() == [60] * 5
    windows = store.windows(24, 1, 2, "train", whole=True)  # 30 frames of each phase
    assert len(windows) == 5 * 2 * 2
    assert windows.lengths is not None
    assert set(windows.lengths.tolist()) == {25, 5}
    batch = windows.batch(np.arange(len(windows)))
    short = int(np.flatnonzero(windows.lengths == 5)[0])
    np.testing.assert_array_equal(batch["weight"][short] > 0, np.arange(25) < 5)
    assert (batch["tokens"][short, 5:] == batch["tokens"][short, 4]).all()
    assert batch["weight"].mean() == pytest.approx(1)
    assert len(np.unique(batch["weight"])) == 2
