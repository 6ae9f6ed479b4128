"""A tiny study from end to end: the real command on real frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.locks import exclusive
from wmcache.envs import find_maze
from wmcache.pipeline.frames import FrameDataset
from wmcache.study import cells, run
from wmcache.study.branches import Branch, make_branches
from wmcache.study.options import Collect, StudyOptions, read_study

from .conftest import ADAPTER, FAILING
from .conftest import run as run_command

Write = Callable[..., Path]
Branches = Callable[..., list[Branch]]


def cell_files(out: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (out / "cells").iterdir()}


@pytest.fixture
def branches(write_study: Write, dataset: FrameDataset, tmp_path: Path) -> Branches:
    """(old text, new text, **arguments of `write_study`) -> the branches of the study with that change of its file."""

    def make(old: str = "", new: str = "", **given: Any) -> list[Branch]:
        file = write_study(tmp_path, **given)
        file.write_text(file.read_text().replace(old, new, 1))
        return make_branches(read_study(file), dataset.card.fingerprint)

    return make


def keys_of(branches: list[Branch], name: str) -> list[str]:
    return [cell.key for branch in branches if branch.choice.name == name for cell in branch.cells()]


def test_seeds_share_what_needs_no_fit_and_nothing_else(study_path: Path) -> None:
    stages = [file.name.split("-")[0] for file in (study_path / "cells").iterdir()]
    count = {stage: stages.count(stage) for stage in set(stages)}
    assert count == {"fit": 2, "extract": 3, "probe": 3, "train": 8, "plan": 8}
    rows = pq.read_table(study_path / "study.parquet").to_pylist()
    assert len({row["identity"] for row in rows if row["encoder"] == "pixels"}) == 1
    assert len({row["identity"] for row in rows if row["encoder"] == "tcn"}) == 2


def test_all_encoders_are_tried_on_the_same_starts_and_goals(study_path: Path) -> None:
    tables = [pq.read_table(file) for file in (study_path / "plans").glob("*/episodes.parquet")]
    assert len(tables) == 8
    for column in ("start", "goal"):
        values = [np.array(table[column].to_pylist()) for table in tables]
        assert all(np.array_equal(values[0], others) for others in values)


def test_the_error_is_a_share_of_the_variance_over_frames(study_path: Path) -> None:
    (path,) = (study_path / "stores").glob("pixels-*.zarr")
    store = TokenStore.open(path)
    tokens = store.gather(np.arange(len(store))).astype(np.float64)
    assert cells.token_variance(store) == pytest.approx(np.square(tokens - tokens.mean(0)).mean(), rel=1e-3)


def test_an_evaluation_of_any_pairs_has_the_key_that_it_had_before_strict(
    branches: Branches,
) -> None:
    for flag, saved in (("true", {"strict": True}), ("false", {})):
        (plan, *_) = branches("budget = 10", f"strict = {flag}\nbudget = 10")[0].plan.values()
        assert {name: value for name, value in plan.settings.items() if name == "strict"} == saved


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("steps = 4", "steps = 4\nlog_every = 7\nvalidate_every = 9\ncheckpoint_every = 8", True),
        ("budget = 10", "budget = 10\nbatch = 1", True),
        ("budget = 10", "budget = 15", False),
    ],
)
def test_settings_that_change_no_result_change_no_key(branches: Branches, old: str, new: str, same: bool) -> None:
    before, after = branches(), branches(old, new)
    assert (keys_of(before, "pixels") == keys_of(after, "pixels")) is same
    options = [cells.PlanOptions(**{**cell.settings, **cell.how}) for cell in after[0].plan.values()]
    assert {plan.batch for plan in options} == {1 if "batch" in new else cells.PlanOptions.batch}


def test_a_second_run_does_nothing(study_path: Path, write_study: Write, copy: Path, tmp_path: Path) -> None:
    before = cell_files(copy)
    result = run_command(write_study(tmp_path), copy, "--json")
    assert cell_files(copy) == before
    printed = json.loads(result.stdout)
    assert len(printed["rows"]) == 8
    assert (printed["mpc-100"]["pairs"][0]["episodes"], printed["mpc-100"]["pairs"][0]["seeds"]) == (2, 2)


def test_a_study_that_is_killed_goes_on_with_what_is_not_done(
    write_study: Write, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cell_files(copy)
    lost = [file for file in (copy / "cells").iterdir() if file.name.startswith("plan")]
    for file in lost:
        file.unlink()
    left = iter(range(3))

    def do_and_die(space: cells.Workspace, cell: cells.Cell, **settings: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        cells.do_cell(space, cell, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(run, "do_cell", do_and_die)
        run_command(write_study(tmp_path), copy, status=130)
    assert len(cell_files(copy)) == len(before) - len(lost) + 3
    run_command(write_study(tmp_path), copy)
    after = cell_files(copy)
    assert after.keys() == before.keys()
    for name in after:
        if name.startswith("plan"):
            results = [json.loads(files[name][1])["result"] for files in (before, after)]
            assert results[0]["reached"] == results[1]["reached"]


def test_other_options_of_one_encoder_and_labels_leave_the_cells_of_the_others(
    branches: Branches,
) -> None:
    first, second = branches(), branches('name = "pixels"', 'name = "pixels"\nlabel = "a baseline"', steps=5)
    assert second[-1].choice.label == "a baseline"
    assert keys_of(first, "pixels") == keys_of(second, "pixels")
    assert not set(keys_of(first, "tcn")) & set(keys_of(second, "tcn"))


def test_an_encoder_that_fails_is_reported_and_leaves_the_others(
    write_study: Write, copy: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "bad.safetensors"
    weights.write_bytes(b"nonsense")
    before = cell_files(copy)
    file = write_study(tmp_path, more=FAILING.format(weights=json.dumps(str(weights))))
    flags = [word for name in ("broken", "tcn", "pixels") for word in ("--encoder", name)]
    result = run_command(file, copy, *flags, "--fractions", "1", status=1)
    assert cell_files(copy) == before
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("broken")]
    assert "- " in line
    assert str(weights)[:20] in line
    rows = pq.read_table(copy / "study.parquet").to_pylist()
    assert {row["encoder"] for row in rows if row["failed"]} == {"broken"}
    assert all(row["successes"] is None for row in rows if row["encoder"] == "broken")
    assert all(row["probe_linear_x"] is not None for row in rows if row["encoder"] != "broken")
    page = (copy / "study.html").read_text()
    assert "<td>broken</td>" in page
    assert "does not fit" in page


def test_frames_are_collected_once_and_others_are_refused(tmp_path: Path) -> None:
    wanted = Collect(episodes=2, length=20, image_size=16, frames_per_shard=32)
    options = StudyOptions((), (), dataset=str(tmp_path / "frames"), collect=wanted)
    fingerprint = run.open_frames(options).card.fingerprint
    written = (tmp_path / "frames" / "dataset.json").stat().st_mtime_ns
    assert run.open_frames(options).card.fingerprint == fingerprint
    assert (tmp_path / "frames" / "dataset.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="length 20 != 10"):
        run.open_frames(replace(options, collect=replace(wanted, length=10)))
    assert run.open_frames(replace(options, collect=replace(wanted, env="UMaze"))).card.fingerprint == fingerprint
    with pytest.raises(UserError, match="env wmcache/PointMaze-UMaze-v0 != Medium"):
        run.open_frames(replace(options, collect=replace(wanted, env="Medium")))


@pytest.mark.parametrize(
    ("more", "dataset", "named"),
    [
        ("[collect]\nepisodes = 2\n", "pointmaze-umazee", "pointmaze-umazee"),  # mistyped, so not collected
        (FAILING.format(weights='"nowhere.safetensors"'), "", "--weights nowhere.safetensors"),
    ],
)
def test_missing_frames_and_weights_are_one_line(
    write_study: Write, tmp_path: Path, more: str, dataset: str, named: str
) -> None:
    flags = ["--dataset", str(tmp_path / dataset)] if dataset else []
    result = run_command(write_study(tmp_path, more=more), tmp_path / "out", *flags, status=1)
    assert named in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "pointmaze-umazee").exists()


def test_a_store_that_was_deleted_is_made_again_only_where_it_is_needed(
    branches: Branches, dataset: FrameDataset, copy: Path
) -> None:
    space, made = cells.Workspace(copy, dataset.path, "cpu", 32), branches()
    everything = [cell for branch in made for cell in branch.cells()]
    pixels = made[-1]
    rmtree(space.product(pixels.extract))
    assert run.pending(space, everything) == []
    space.file(pixels.train[0.5]).unlink()
    pending = [cell.key for cell in run.pending(space, everything)]
    assert pending == [pixels.extract.key, pixels.train[0.5].key]


@pytest.mark.cluster
def test_processes_do_the_same_as_one_and_go_on_past_a_failure(write_study: Write, copy: Path, tmp_path: Path) -> None:
    weights = tmp_path / "bad.safetensors"
    weights.write_bytes(b"nonsense")
    plans = [file for file in (copy / "cells").iterdir() if file.name.startswith("plan")]
    before = {file: json.loads(file.read_text())["result"]["reached"] for file in plans[:2]}
    for file in before:
        file.unlink()
    file = write_study(tmp_path, more=FAILING.format(weights=json.dumps(str(weights))))
    result = run_command(file, copy, "--cluster", "local:2", status=1)
    assert {file: json.loads(file.read_text())["result"]["reached"] for file in before} == before
    assert "extract broken" in result.output


def test_fits_come_first_then_one_pass_for_each_seed(branches: Branches, dataset: FrameDataset, tmp_path: Path) -> None:
    space = cells.Workspace(tmp_path / "out", dataset.path, "cpu", 32)
    everything = [cell for branch in branches(more=ADAPTER) for cell in branch.cells()]
    tasks = run.group(run.pending(space, everything))
    grouped = [[(cell.stage, cell.name) for cell in task] for task in tasks]
    assert grouped[:2] == [[("fit", "tcn")]] * 2
    assert grouped[2] == [("extract", "tcn"), ("extract", "tcn-layers"), ("extract", "pixels")]
    assert grouped[3] == [("extract", "tcn"), ("extract", "tcn-layers")]
    done: set[str] = set()
    for task in tasks:
        assert {other.key for cell in task for other in cell.inputs.values()} <= done
        done.update(cell.key for cell in task)


def test_a_pass_that_fails_is_not_timed_and_fails_its_own_encoder_alone(
    write_study: Write, dataset: FrameDataset, tmp_path: Path
) -> None:
    options = read_study(write_study(tmp_path), {"encoder": ("pixels", "random-vit", "tcn"), "seeds": [0]})
    space = cells.Workspace(tmp_path / "out", dataset.path, "cpu", 32)
    pixels, vit, tcn = (branch.extract for branch in make_branches(options, dataset.card.fingerprint))
    space.product(vit).mkdir(parents=True)
    (space.product(vit) / "notes.txt").write_text("no store")
    failures = run.run_task(space, (pixels, vit, tcn), {tcn.inputs["fit"].key: "its fit failed"})
    assert failures.keys() == {vit.key, tcn.key}
    assert failures[tcn.key] == "its fit failed"
    found = space.read(pixels)
    assert found is not None
    assert "extracted_together" not in found["result"]
    assert found["result"]["extract_seconds"] > 0
    assert found["resumed"]


def test_a_folder_that_moves_goes_on_with_what_is_done_and_what_is_not(
    write_study: Write, copy: Path, tmp_path: Path
) -> None:
    file = write_study(tmp_path, more=ADAPTER)
    flags = ["--encoder", "pca", "--seeds", "0", "--fractions", "1"]
    before = cell_files(copy)
    run_command(file, copy, *flags)
    new = sorted(name.split("-")[0] for name in cell_files(copy).keys() - before.keys())
    # Its base is fitted as the file's tcn is, which has been done, though tcn is not studied here.
    assert new == ["extract", "extract", "fit", "plan", "probe", "train"]
    moved = copy.rename(tmp_path / "moved")
    run_command(file, moved, *flags)
    done = cell_files(moved)
    lost = [name for name in done.keys() - before.keys() if name.startswith(("fit", "plan"))]
    for name in lost:
        (moved / "cells" / name).unlink()
    run_command(file, moved, *flags)
    after = cell_files(moved)
    assert {name for name in after if after[name] != done.get(name)} == set(lost)
    for name in lost:
        if name.startswith("plan"):
            reached = [json.loads(content[name][1])["result"]["reached"] for content in (done, after)]
            assert reached[0] == reached[1]


def test_goals_and_mazes_count_by_what_is_in_their_files(
    write_study: Write, dataset: FrameDataset, tmp_path: Path
) -> None:
    options = read_study(write_study(tmp_path))
    goals, grid = tmp_path / "goals.parquet", tmp_path / "grid.txt"

    def key(**settings: Any) -> str:
        (plan,) = options.plan
        mine = replace(options, plan=(replace(plan, options=replace(plan.options, **settings)),))
        return next(iter(make_branches(mine, dataset.card.fingerprint)[0].plan.values())).key

    with pytest.raises(UserError, match=r"goals\.parquet.*random-state"):
        key(goals=str(goals))
    goals.write_bytes(b"some")
    first = key(goals=str(goals))
    moved = goals.with_name("others.parquet")
    moved.write_bytes(b"some")
    assert key(goals=str(moved)) == first != key()
    moved.write_bytes(b"others")
    assert key(goals=str(moved)) != first
    grid.write_text("\n".join(find_maze("UMaze").rows))
    assert key(env=str(grid)) == key(env="UMaze") == key(env="wmcache/PointMaze-UMaze-v0")
    grid.write_text("\n".join(find_maze("Medium").rows))
    assert key(env=str(grid)) != key(env="UMaze")


def test_a_second_process_in_one_folder_is_refused(write_study: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with exclusive(out / ".lock", out) as alone:
        assert alone
        result = run_command(write_study(tmp_path), out, status=1)
    assert str(out) in result.stderr.strip().splitlines()[-1]
    assert not (out / "cells").exists()
