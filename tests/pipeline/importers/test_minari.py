from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.pipeline.frames import DatasetCard, FrameDataset, Frames
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.minari import MinariImporter
from wmcache.pipeline.steps import Steps

# Minari itself, of a dataset without an environment.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`eval_env` is set to None"),
    pytest.mark.filterwarnings("ignore:env_spec is None"),
]

LENGTHS = [5, 9, 6]
NAME = "tests/ball-v0"
IMAGE = spaces.Box(0, 255, (32, 32, 3), np.uint8)
STATE = spaces.Box(-np.inf, np.inf, (4,), np.float64)
ACTION = spaces.Box(-1, 1, (2,), np.float32)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def import_minari(dataset: str, out: Path, **options: Any) -> DatasetCard:
    return write_dataset(MinariImporter(dataset, **options).open(), out, frames_per_shard=8)


def create(
    frames: Frames,
    *,
    more: dict[str, spaces.Box] | None = None,
    action: spaces.Space[Any] = ACTION,
    image: spaces.Box = IMAGE,
    state: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """A real Minari dataset of some frames, and the actions and states in it, one row a frame."""
    inner = {"pixels": image, "speed": spaces.Box(-1, 1, (), np.float32)}
    own = {"state": STATE} if state else {}
    space = spaces.Dict({**own, "camera": spaces.Dict(inner), **(more or {})})
    rng = np.random.default_rng(0)
    buffers, actions, states, start = [], [], [], 0
    for number, length in enumerate(LENGTHS):
        states.append(rng.normal(size=(length + 1, 4)))
        actions.append(rng.uniform(-1, 1, (length, 2)).astype(np.float32))
        camera = {"pixels": frames[start : start + length + 1], "speed": np.zeros(length + 1, np.float32)}
        observed: dict[str, Any] = {**({"state": states[-1]} if state else {}), "camera": camera}
        observed |= {key: np.zeros((length + 1, *box.shape), box.dtype) for key, box in (more or {}).items()}
        chosen = actions[-1] if isinstance(action, spaces.Box) else np.zeros((length, *action.shape), np.int64)
        ends = [False] * (length - 1) + [True]
        buffers.append(EpisodeBuffer(number, None, None, observed, chosen, [0.0] * length, ends, ends, {}))
        start += length
    minari.create_dataset_from_buffers(
        NAME,
        buffers,
        observation_space=space,
        action_space=action,
        jpeg_encoding=False,
        author="me",
        author_email="me@here",
        code_permalink="here",
        algorithm_name="random",
        description="a ball",
    )
    return np.concatenate(actions), np.concatenate([state[:-1] for state in states])


@pytest.mark.parametrize("by", ["id", "folder", "data folder"])
def test_frames_actions_and_states_are_kept_exactly(home: Path, everything: Frames, tmp_path: Path, by: str) -> None:
    action, state = create(everything)
    dataset = {"id": NAME, "folder": str(home / NAME), "data folder": str(home / NAME / "data")}[by]
    card = import_minari(dataset, tmp_path / "out")
    found = FrameDataset.open(tmp_path / "out")
    np.testing.assert_array_equal(found.read_frames(range(20)), everything[:20])
    np.testing.assert_array_equal(found.steps.action, action)
    np.testing.assert_array_equal(found.steps.state, state)
    assert np.bincount(found.steps.episode).tolist() == LENGTHS
    assert (card.env, card.maze, card.policy) == (f"minari {NAME}", [], "imported from minari")


def test_several_observations_need_a_key(home: Path, everything: Frames, tmp_path: Path) -> None:
    create(everything, more={"back": IMAGE, "goal": spaces.Box(-1, 1, (2,), np.float32)})
    with pytest.raises(UserError, match=r"--image-key.*back, camera\.pixels"):
        import_minari(NAME, tmp_path / "out")
    with pytest.raises(UserError, match=r"--state-key.*goal, state"):
        import_minari(NAME, tmp_path / "out", image_key="camera.pixels")
    with pytest.raises(UserError, match=r"'camera'.*--image-key"):
        import_minari(NAME, tmp_path / "out", image_key="camera")
    card = import_minari(NAME, tmp_path / "out", image_key="camera.pixels", state_key="goal", image_size=16)
    assert FrameDataset.open(tmp_path / "out").steps.state.shape == (card.frames, 2)
    assert (card.image_size, card.env) == (16, f"minari {NAME}, resized to 16 px (bicubic)")


def box(*shape: int, dtype: type = np.uint8) -> spaces.Box:
    return spaces.Box(0, 255 if dtype == np.uint8 else 1, shape, dtype)


@pytest.mark.parametrize("layout", ["channels first", "grey", "grey with a channel", "grey with the channel first"])
def test_other_layouts_of_images_become_rgb(home: Path, everything: Frames, tmp_path: Path, layout: str) -> None:
    grey = everything[..., :1]
    images, image, wanted = {
        "channels first": (everything.transpose(0, 3, 1, 2), box(3, 32, 32), everything),
        "grey": (grey[..., 0], box(32, 32), grey),
        "grey with a channel": (grey, box(32, 32, 1), grey),
        "grey with the channel first": (grey[:, None, :, :, 0], box(1, 32, 32), grey),
    }[layout]
    create(images, image=image)
    import_minari(NAME, tmp_path / "out")
    found = FrameDataset.open(tmp_path / "out").read_frames(range(20))
    np.testing.assert_array_equal(found, np.broadcast_to(wanted[:20], found.shape))


@pytest.mark.parametrize("key", [None, "camera.pixels"])
@pytest.mark.parametrize(
    ("image", "found"), [(box(32, 32, 6), "32x32x6 uint8"), (box(32, 32, 3, dtype=np.float32), "32x32x3 float32")]
)
def test_shape_and_type_of_other_images_are_named(
    home: Path, tmp_path: Path, image: spaces.Box, found: str, key: str | None
) -> None:
    create(np.zeros((21, *image.shape), image.dtype), image=image)
    with pytest.raises(UserError, match=f"camera.pixels is {found}"):
        import_minari(NAME, tmp_path / "out", image_key=key)
    assert not (tmp_path / "out").exists()


def test_actions_that_are_neither_vectors_nor_discrete_are_refused(
    home: Path, everything: Frames, tmp_path: Path
) -> None:
    create(everything, action=spaces.MultiDiscrete([4]))
    with pytest.raises(UserError, match=r"MultiDiscrete\(\[4\]\)"):
        import_minari(NAME, tmp_path / "out")


def test_discrete_actions_become_one_hot(home: Path, everything: Frames, tmp_path: Path) -> None:
    create(everything, action=spaces.Discrete(4, start=-1))
    edit(home, "actions", lambda values: np.arange(len(values)) % 4 - 1)
    import_minari(NAME, tmp_path / "out")
    steps = FrameDataset.open(tmp_path / "out").steps
    assert steps.described["action"] == Column(("action",), "float32", (4,), (0.0,) * 4, (1.0,) * 4, discrete=True)
    np.testing.assert_array_equal(steps.action[5:14], np.eye(4)[np.arange(9) % 4])
    np.testing.assert_array_equal(steps.action[:5], np.eye(4)[[1] * 5])
    edit(home, "actions", lambda values: values + 1)
    with pytest.raises(UserError, match=r"3 at step 3 of episode 1 .*Discrete\(4"):
        import_minari(NAME, tmp_path / "other")


@pytest.mark.parametrize(("low", "high"), [((-2.0, 0.0), (2.0, 3.0)), ((-np.inf, 0.0), (2.0, 3.0))])
def test_rewards_ends_and_bounds_are_kept(
    home: Path, everything: Frames, tmp_path: Path, low: tuple[float, ...], high: tuple[float, ...]
) -> None:
    create(everything, action=spaces.Box(np.float32(low), np.float32(high)))
    for episode in range(len(LENGTHS)):
        edit(home, "rewards", lambda values: np.arange(len(values)) + 0.1, episode)
        edit(home, "truncations", lambda values: np.zeros_like(values), episode)
    card = import_minari(NAME, tmp_path / "out")
    steps = FrameDataset.open(tmp_path / "out").steps
    known = {"low": low, "high": high} if np.isfinite(low).all() else {}
    assert card.columns["action"] == Column(("action",), "float32", (2,), **known)
    assert {name: column.roles for name, column in card.columns.items() if name != "action"} == {
        "state": ("state", "proprio"),
        "reward": ("reward",),
        "terminated": ("terminated",),
        "truncated": ("truncated",),
    }
    np.testing.assert_array_equal(steps.columns["reward"], steps.step + 0.1)
    np.testing.assert_array_equal(np.flatnonzero(steps.columns["terminated"]), np.cumsum(LENGTHS) - 1)
    assert not steps.columns["truncated"].any()


def test_an_image_alone_is_imported_without_a_state(home: Path, everything: Frames, tmp_path: Path) -> None:
    create(everything, state=False)
    card = import_minari(NAME, tmp_path / "out")
    assert "state" not in card.columns
    assert FrameDataset.open(tmp_path / "out").steps.state is None
    with pytest.raises(UserError, match="--state-key"):
        import_minari(NAME, tmp_path / "other", state_key="state")


def test_an_import_from_before_columns_were_described_continues_with_its_own(
    home: Path, everything: Frames, tmp_path: Path
) -> None:
    create(everything)
    steps = MinariImporter(NAME).open().steps
    source = replace(
        MinariImporter(NAME).open(),
        steps=Steps.plain(steps.episode, steps.step, steps.columns["action"], steps.columns["state"]),
    )
    before = write_dataset(source, tmp_path / "out", frames_per_shard=8)
    (tmp_path / "out" / "frames-000001.tar").unlink()
    assert import_minari(NAME, tmp_path / "out") == before


def test_a_colour_image_is_chosen_before_grey_ones(home: Path, everything: Frames, tmp_path: Path) -> None:
    create(everything, more={"depth": box(32, 32)})
    import_minari(NAME, tmp_path / "out")
    np.testing.assert_array_equal(FrameDataset.open(tmp_path / "out").read_frames(range(5)), everything[:5])


def edit(home: Path, key: str, change: Callable[[np.ndarray], np.ndarray], episode: int = 1) -> None:
    """Replace a column of an episode."""
    with h5py.File(home / NAME / "data/main_data.hdf5", "a") as file:
        values = change(file[f"episode_{episode}/{key}"][()])
        del file[f"episode_{episode}/{key}"]
        file[f"episode_{episode}/{key}"] = values


def test_the_final_observation_is_not_needed(home: Path, everything: Frames, tmp_path: Path) -> None:
    create(everything)
    whole = import_minari(NAME, tmp_path / "whole")
    for key in ("observations/state", "observations/camera/pixels"):
        edit(home, key, lambda values: values[:-1])
    assert import_minari(NAME, tmp_path / "out").fingerprint == whole.fingerprint
    edit(home, "observations/state", lambda values: values[:-1])
    with pytest.raises(UserError, match=rf"episode 1 .*{NAME} .*\(8, 4\)"):
        import_minari(NAME, tmp_path / "out")


def test_an_action_may_be_missing_at_the_end_of_an_episode_only(
    home: Path, everything: Frames, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action, _ = create(everything)

    def without(row: int) -> Callable[[np.ndarray], np.ndarray]:
        def change(values: np.ndarray) -> np.ndarray:
            values[row] = np.nan
            return values

        return change

    edit(home, "actions", without(-1))
    card = import_minari(NAME, tmp_path / "out")
    assert "1 of 3 episodes" in capsys.readouterr().err
    assert card.frames == 19
    np.testing.assert_array_equal(FrameDataset.open(tmp_path / "out").steps.action, np.delete(action, 13, 0))
    edit(home, "actions", without(2))
    with pytest.raises(UserError, match=r"action_0 .*episode 1, step 2;"):
        import_minari(NAME, tmp_path / "other")


def test_a_dataset_that_names_an_environment_for_its_spaces_starts_none(
    home: Path, everything: Frames, tmp_path: Path
) -> None:
    create(everything)
    file = home / NAME / "data" / "metadata.json"
    metadata, canary = json.loads(file.read_text()), tmp_path / "canary"
    del metadata["observation_space"]
    kwargs = {"command": f"touch '{canary}'"}
    metadata["env_spec"] = json.dumps({"id": "Evil-v0", "entry_point": "os:system", "kwargs": kwargs})
    file.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"metadata\.json .*observation_space"):
        import_minari(NAME, tmp_path / "out")
    assert not canary.exists()


def test_a_damaged_file_is_named(home: Path, everything: Frames, tmp_path: Path) -> None:
    create(everything)
    file = home / NAME / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match=f"episode 0 .*{NAME}"):
        import_minari(NAME, tmp_path / "out")


def test_without_minari_the_command_that_installs_it_is_named() -> None:
    script = """
import sys
sys.modules["minari"] = None
from wmcache.cli import main
main(["import", "minari", "some/data-v0", "--out", "nowhere"])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "pip install 'wmcache[minari]'" in result.stderr


def test_the_command_imports_and_names_what_is_missing(
    home: Path, everything: Frames, tmp_path: Path, run_import: Callable[..., Any]
) -> None:
    create(everything)
    out = tmp_path / "out"
    result = run_import("minari", NAME, "--out", out, "--image-key", "camera.pixels", "--state-key", "state")
    assert result.exit_code == 0, result.output
    assert f"{out}: 3 episodes, 20 frames, 1 shards" in result.stdout
    result = run_import("minari", "tests/other-v0", "--out", tmp_path / "other")
    assert "minari download tests/other-v0" in result.stderr
