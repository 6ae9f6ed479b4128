"""Formats that are arrays in one file: stable-worldmodel, OGBench, D4RL, robomimic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.pipeline.frames import FrameDataset, Frames
from wmcache.pipeline.importers import IMPORTERS, write_dataset

LENGTHS = [5, 9, 6]
ENDS = np.cumsum(LENGTHS) - 1
Arrays = dict[str, np.ndarray]


def import_file(kind: str, path: Path, out: Path, **options: Any) -> FrameDataset:
    importer: Any = IMPORTERS.get(kind)
    write_dataset(importer(str(path), **options).open(), out, frames_per_shard=8)
    return FrameDataset.open(out)


def write_hdf5(path: Path, arrays: Arrays) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


@pytest.fixture
def columns() -> Arrays:
    rng = np.random.default_rng(0)
    action, state = rng.uniform(-1, 1, (20, 2)).astype(np.float32), rng.normal(size=(20, 4))
    return {"action": action, "state": state, "reward": np.arange(20) / 8, "contact": np.arange(20) % 3 == 0}


@pytest.fixture
def swm(columns: Arrays, everything: Frames, tmp_path: Path) -> Path:
    """A file as `World.collect` of stable-worldmodel writes: a row more for each episode, its episodes in another order."""
    rows, offsets = [], {}
    for episode in (2, 0, 1):
        offsets[episode] = len(rows)
        rows += [*np.flatnonzero(np.repeat(range(3), LENGTHS) == episode), -1]
    taken = {name: values[rows] for name, values in columns.items()}
    ends = np.array(rows) < 0
    taken["action"][ends] = np.nan
    # What a step leads to is in the row after it.
    first = np.roll(ends, 1)
    taken["reward"] = np.where(first, np.nan, np.roll(taken["reward"], 1))
    taken["terminated"] = ends & (np.arange(len(rows)) > 10)
    taken["truncated"] = ends & ~taken["terminated"]
    taken |= {"variation.agent.color": np.tile(np.uint8([1, 2, 3]), (len(rows), 1)), "id": np.int64(rows) * 2**40}
    taken |= {"pixels": everything[rows], "goal": 255 - everything[rows]}
    taken |= {"ep_len": np.int32(LENGTHS) + 1, "ep_offset": np.int64([offsets[episode] for episode in range(3)])}
    path = tmp_path / "pusht.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for name, values in taken.items():
            file.create_dataset(name, data=values, **(hdf5plugin.Blosc() if name == "pixels" else {}))
    return path


def test_swm_rows_become_env_steps(
    swm: Path, columns: Arrays, everything: Frames, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = import_file("swm", swm, tmp_path / "out")
    np.testing.assert_array_equal(found.read_frames(range(20)), everything[:20])
    for name, values in columns.items():
        np.testing.assert_array_equal(found.steps.columns[name], values)
    np.testing.assert_array_equal(np.flatnonzero(found.steps.columns["terminated"]), ENDS[:2])
    np.testing.assert_array_equal(np.flatnonzero(found.steps.columns["truncated"]), ENDS[2:])
    np.testing.assert_array_equal(found.steps.columns["id"], np.arange(20) * 2**40)
    assert found.card.columns["variation_agent_color"] == Column(("extra",), "uint8", (3,))
    assert found.card.columns["state"].roles == ("state", "proprio")
    assert np.bincount(found.steps.episode).tolist() == LENGTHS
    assert found.card.env == "swm pusht"
    noted = capsys.readouterr().err
    assert "goal" in noted
    assert "without an action" in noted
    other = import_file("swm", swm, tmp_path / "goal", image_key="goal", drop="state,contact")
    np.testing.assert_array_equal(other.read_frames(range(20)), 255 - everything[:20])
    assert not {"state", "contact"} & other.card.columns.keys()


def test_swm_rows_that_do_not_fit_are_refused(swm: Path, tmp_path: Path) -> None:
    def refused(match: str, change: Callable[[h5py.File], None]) -> None:
        with h5py.File(swm, "r+") as file:
            change(file)
        with pytest.raises(UserError, match=match):
            import_file("swm", swm, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("names has type object.*--drop names", lambda file: file.create_dataset("names", data=["a"] * 23))
    refused(
        "long.*5000.*--drop", lambda file: (file.pop("names"), file.create_dataset("long", (23, 5000), np.float32))[0]
    )
    refused(
        r"state_1 is nan.*episode 2, step 3", lambda file: (file.pop("long"), file["state"].write_direct(bad(file)))[0]
    )
    refused(
        "episode 1 .*action in its last row",
        lambda file: file["action"].__setitem__(int(file["ep_offset"][1]) + 9, 0.0),
    )
    refused("episode 2 .*23", lambda file: file["ep_len"].__setitem__(2, 99))
    refused("ep_offset", lambda file: file.pop("ep_offset"))


def bad(file: h5py.File) -> np.ndarray:
    state = file["state"][()]
    state[file["ep_offset"][2] + 3, 1] = np.nan
    return state


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_ogbench_terminals_end_episodes_and_not_tasks(
    columns: Arrays, everything: Frames, tmp_path: Path, suffix: str
) -> None:
    terminals = np.isin(np.arange(20), ENDS[:2]).astype(np.float32)  # the last episode ends with the file
    arrays = {"observations": everything[:20], "actions": columns["action"], "terminals": terminals}
    arrays |= {"qpos": columns["state"], "qvel": 2 * columns["state"], "button_states": np.arange(40).reshape(20, 2)}
    path = tmp_path / f"visual-maze{suffix}"
    np.savez_compressed(path, **arrays) if suffix == ".npz" else write_hdf5(path, arrays)
    found = import_file("ogbench", path, tmp_path / "out")
    np.testing.assert_array_equal(found.read_frames(range(20)), everything[:20])
    np.testing.assert_array_equal(found.steps.action, columns["action"])
    np.testing.assert_array_equal(found.steps.state, np.hstack([columns["state"], 2 * columns["state"]]))
    assert found.steps.proprio is None
    np.testing.assert_array_equal(found.steps.columns["button_states"], arrays["button_states"])
    np.testing.assert_array_equal(found.steps.columns["truncated"], terminals)
    assert np.bincount(found.steps.episode).tolist() == LENGTHS
    (tmp_path / "out" / "frames-000001.tar").unlink()
    assert import_file("ogbench", path, tmp_path / "out").card == found.card


def test_d4rl_timeouts_end_episodes_and_terminals_tasks(columns: Arrays, everything: Frames, tmp_path: Path) -> None:
    arrays = {"observations": everything[:20].transpose(0, 3, 1, 2), "actions": columns["action"]}
    arrays |= {"terminals": np.isin(np.arange(20), ENDS[:1]), "timeouts": np.isin(np.arange(20), ENDS[1:])}
    arrays |= {"rewards": columns["reward"], "infos/qpos": columns["state"], "metadata/seed": np.arange(3)}
    found = import_file("ogbench", write_hdf5(tmp_path / "d4rl.hdf5", arrays), tmp_path / "out")
    np.testing.assert_array_equal(found.read_frames(range(20)), everything[:20])
    np.testing.assert_array_equal(found.steps.columns["terminated"], arrays["terminals"])
    np.testing.assert_array_equal(found.steps.columns["truncated"], arrays["timeouts"])
    np.testing.assert_array_equal(found.steps.columns["qpos"], columns["state"])
    assert np.bincount(found.steps.episode).tolist() == LENGTHS


def test_files_without_images_or_with_programs_are_refused(columns: Arrays, everything: Frames, tmp_path: Path) -> None:
    states = {"observations": columns["state"], "actions": columns["action"], "terminals": np.zeros(20)}
    np.savez(tmp_path / "states.npz", **states)
    with pytest.raises(UserError, match=r"states\.npz.*observations is 4 float64"):
        import_file("ogbench", tmp_path / "states.npz", tmp_path / "out")
    objects = {**states, "observations": everything[:20], "extra": np.array([print] * 20)}
    np.savez(tmp_path / "objects.npz", **objects)
    with pytest.raises(UserError, match=r"extra of .*objects\.npz"):
        import_file("ogbench", tmp_path / "objects.npz", tmp_path / "out")
    with h5py.File(tmp_path / "outside.hdf5", "w") as file:
        for name, values in (states | {"observations": everything[:20]}).items():
            file[name] = values
        file.create_dataset("secret", (20,), np.uint8, external=[("/etc/passwd", 0, 20)])
    with pytest.raises(UserError, match="secret is stored in other files"):
        import_file("ogbench", tmp_path / "outside.hdf5", tmp_path / "out")
    twice = {**states, "observations": everything[:20], "infos/goal": columns["state"], "goal": columns["state"]}
    np.savez(tmp_path / "twice.npz", **twice, seed=3)
    with pytest.raises(UserError, match=r"infos/goal and goal are both goal; .*--drop"):
        import_file("ogbench", tmp_path / "twice.npz", tmp_path / "out")
    np.savez(tmp_path / "rewards.npz", **states | {"observations": everything[:20], "rewards": np.zeros((20, 2))})
    with pytest.raises(UserError, match=r"rewards\.npz: reward"):
        import_file("ogbench", tmp_path / "rewards.npz", tmp_path / "out")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "states.npz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut\.npz cannot be opened"):
        import_file("ogbench", tmp_path / "cut.npz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def robomimic(columns: Arrays, everything: Frames, tmp_path: Path) -> Path:
    arrays: Arrays = {"mask/train": np.array([b"demo_10", b"demo_0"])}
    for name, rows in zip(("demo_0", "demo_2", "demo_10"), np.split(np.arange(20), ENDS[:2] + 1), strict=True):
        demo = {"actions": columns["action"], "states": columns["state"], "rewards": columns["reward"]}
        demo |= {
            "dones": np.isin(np.arange(20), ENDS),
            "obs/robot0_eef_pos": columns["state"][:, :3],
            "obs/object": columns["state"],
        }
        demo |= {"obs/agentview_image": everything[:20], "obs/robot0_eye_in_hand_image": 255 - everything[:20]}
        demo |= {"next_obs/object": columns["state"]}
        arrays |= {f"data/{name}/{key}": values[rows] for key, values in demo.items()}
    return write_hdf5(tmp_path / "lift.hdf5", arrays)


def test_robomimic_demonstrations_become_episodes(
    robomimic: Path, columns: Arrays, everything: Frames, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"--image-key, one of agentview_image, robot0_eye_in_hand_image"):
        import_file("robomimic", robomimic, tmp_path / "out")
    found = import_file("robomimic", robomimic, tmp_path / "out", image_key="agentview_image")
    np.testing.assert_array_equal(found.read_frames(range(20)), everything[:20])
    for name in ("action", "state", "reward"):
        np.testing.assert_array_equal(found.steps.columns[name], columns[name])
    np.testing.assert_array_equal(np.flatnonzero(found.steps.columns["terminated"]), ENDS)
    np.testing.assert_array_equal(found.steps.proprio, columns["state"][:, :3].astype(np.float32))
    assert found.card.columns["object"].roles == ("extra",)
    noted = capsys.readouterr().err
    assert "robot0_eye_in_hand_image" in noted
    assert "next_obs/object" in noted
    train = import_file("robomimic", robomimic, tmp_path / "train", image_key="agentview_image", mask="train")
    assert np.bincount(train.steps.episode).tolist() == [5, 6]
    np.testing.assert_array_equal(train.steps.action, columns["action"][np.r_[:5, 14:20]])
    with pytest.raises(UserError, match=r"'valid'.*train"):
        import_file("robomimic", robomimic, tmp_path / "other", image_key="agentview_image", mask="valid")


def test_robomimic_demonstrations_that_differ_are_refused(robomimic: Path, tmp_path: Path) -> None:
    def refused(match: str, change: Callable[[h5py.File], None]) -> None:
        with h5py.File(robomimic, "r+") as file:
            change(file)
        with pytest.raises(UserError, match=match):
            import_file("robomimic", robomimic, tmp_path / "out", image_key="agentview_image")

    refused("demo_2 has obs/more", lambda file: file.create_dataset("data/demo_2/obs/more", (9, 2), np.float32))
    refused("demo_2 has no obs/object", lambda file: file.pop("data/demo_2/obs/object"))
    refused(r"rewards of demo_2 is \(4,\)", shorten)
    refused("no demonstrations", lambda file: file.pop("data"))


def shorten(file: h5py.File) -> None:
    demo = file["data/demo_2"]
    del demo["obs/more"]
    demo["obs/object"], rewards = np.zeros((9, 4)), demo.pop("rewards")[:4]
    demo["rewards"] = rewards


def test_the_command_imports_and_names_what_is_missing(
    swm: Path,
    robomimic: Path,
    tmp_path: Path,
    run_import: Callable[..., Any],
    run_import_without: Callable[..., str],
) -> None:
    result = run_import("swm", swm, "--out", tmp_path / "out", "--image-size", 16)
    assert result.exit_code == 0, result.output
    assert "3 episodes, 20 frames" in result.stdout
    assert "--image-key" in run_import("robomimic", robomimic, "--out", tmp_path / "other").stderr
    assert "pip install 'wmcache[hdf5]'" in run_import_without("h5py", "swm", swm, "--out", "nowhere")
