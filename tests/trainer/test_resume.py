"""Models that are trained in stages: each continues the one before exactly, wherever and however often the run is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from run_tools import Go, files_of, make_go, read_log, stopped_at, weights_of
from safetensors.torch import load_file

from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import Progress, checkpoints, last_checkpoint, read_progress
from wmcache.trainer.models.ddp_wm import DdpWm
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import finished_stage, read_config

STAGES = DdpWm.stages
STEPS = 4
SIZES = {
    **{"locator_width": 8, "locator_depth": 1, "locator_heads": 2, "locator_mlp": 8},
    **{"fusion_heads": 2, "correction_heads": 2, "foreground": 2},
}


@pytest.fixture(scope="module")
def go(ddp_store_path: Path, tiny: TrainOptions) -> Go:
    """Train three stages of four steps, with a checkpoint in the middle of each."""
    staged = {"model": "ddp-wm", "model_options": tiny.model_options | SIZES, "steps": STEPS, "validate_every": STEPS}
    return make_go(ddp_store_path, replace(tiny, **staged, checkpoint_every=STEPS // 2))


@pytest.fixture(scope="module")
def straight(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages at once; read only, so copy it to change it."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    go(run)
    return run


@pytest.fixture(scope="module")
def located(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage alone; read only as well."""
    run = tmp_path_factory.mktemp("runs") / "located"
    go(run, stage="localization")
    return run


def ends_of(run: Path) -> list[tuple[int, bytes]]:
    """Step and weights at the end of each stage."""
    folders = [finished_stage(run, stage) for stage in STAGES]
    return [(read_progress(folder).step, (folder / "model.safetensors").read_bytes()) for folder in folders]


def assert_equal_runs(run: Path, other: Path) -> None:
    assert ends_of(run) == ends_of(other)
    assert read_log(run) == read_log(other)


@pytest.fixture
def refuses(go: Go, run: Path, located: Path) -> Callable[..., None]:
    """(named, **options): they are refused; no folder becomes a run, and no run is overwritten."""

    def check(named: str, **options: Any) -> None:
        with pytest.raises(UserError, match=named):
            go(run, **options)
        assert not run.exists()
        copytree(located, run, symlinks=True)
        before = files_of(run)
        with pytest.raises(UserError, match=named):
            go(run, overwrite=True, **options)
        assert files_of(run) == before

    return check


class TestOneAfterAnother:
    def test_all_at_once_equals_each_by_itself(self, go: Go, run: Path, straight: Path) -> None:
        for stage in STAGES:
            go(run, stage=stage)
        assert_equal_runs(run, straight)
        steps = [line["step"] for line in read_log(straight) if "loss" in line]
        assert steps == list(range(1, 3 * STEPS + 1))

    def test_each_has_its_own_schedule_and_figures(self, straight: Path) -> None:
        rates = [line["learning_rate"] for line in read_log(straight) if "loss" in line]
        assert rates[:STEPS] == rates[STEPS : 2 * STEPS] == rates[2 * STEPS :]
        assert rates[0] > rates[STEPS - 1]
        figures = {line["step"]: set(line) for line in read_log(straight) if "loss" not in line}
        assert list(figures) == [STEPS, 2 * STEPS, 3 * STEPS]
        assert figures[STEPS] > {"recall", "precision", "changed"}
        assert figures[2 * STEPS] == figures[3 * STEPS] == {"step", *(f"skill_{k}" for k in range(1, 6))}

    def test_the_end_of_each_stays(self, go: Go, run: Path) -> None:
        go(run, checkpoint_every=1)
        assert [read_progress(folder) for folder in checkpoints(run)] == [
            Progress(4, "localization", 0, finished=True),
            Progress(8, "primary", 4, finished=True),
            Progress(11, "lrm", 8),
            Progress(12, "lrm", 8, finished=True),
        ]


class TestResume:
    @pytest.mark.parametrize(
        ("stop", "by_signal", "left"),
        [
            (3, False, Progress(2, "localization", 0)),
            (5, False, Progress(4, "localization", 0, finished=True)),
            (7, False, Progress(6, "primary", 4)),
            (12, False, Progress(10, "lrm", 8)),
            (4, True, Progress(4, "localization", 0, finished=True)),
            (5, True, Progress(6, "primary", 4)),
        ],
    )
    def test_a_stopped_run_resumes_exactly(
        self, go: Go, run: Path, straight: Path, stop: int, by_signal: bool, left: Progress
    ) -> None:
        with stopped_at(stop, by_signal=by_signal):
            go(run)
        assert read_progress(last_checkpoint(run)) == left
        go(run)
        assert_equal_runs(run, straight)

    @pytest.mark.parametrize(
        ("options", "stop"),
        [
            ({"model_options": {"labels": "features"}}, 4),
            ({"model_options": {"proprio": "none", "foreground": 0, "standardise": False}}, 4),
            ({"history": 1}, 2),  # parameters for earlier frames get no gradient
        ],
        ids=["features", "no-proprio", "no-history"],
    )
    def test_a_stopped_run_of_another_variant_resumes_exactly(
        self, go: Go, tmp_path: Path, options: dict[str, Any], stop: int
    ) -> None:
        options = {**options, "steps": 2, "checkpoint_every": 1}
        go(tmp_path / "straight", **options)
        with stopped_at(stop):
            go(tmp_path / "run", **options)
        go(tmp_path / "run", **options)
        assert_equal_runs(tmp_path / "run", tmp_path / "straight")

    def test_a_stage_may_have_other_steps_batches_and_rates(self, go: Go, run: Path) -> None:
        go(run, stage="localization", steps=2)
        go(run, stage="primary", steps=3, batch=4, learning_rate=1e-3)
        go(run, stage="lrm", steps=1)
        assert [step for step, _ in ends_of(run)] == [2, 5, 6]
        assert read_config(run)["steps"] == 1

    @pytest.mark.parametrize("stage", ["all", "lrm"])
    def test_where_no_stage_begins_other_steps_need_resume(self, go: Go, run: Path, straight: Path, stage: str) -> None:
        copytree(straight, run, symlinks=True)
        before = files_of(run)
        assert go(run) == {}
        assert files_of(run) == before
        with pytest.raises(UserError, match=f"steps {STEPS} != {STEPS + 2}"):
            go(run, stage=stage, steps=STEPS + 2)
        assert files_of(run) == before
        go(run, stage=stage, steps=STEPS + 2, resume=True)
        assert read_progress(last_checkpoint(run)) == Progress(3 * STEPS + 2, "lrm", 2 * STEPS, finished=True)

    def test_lowering_steps_does_not_reopen_a_finished_stage(self, go: Go, run: Path, located: Path) -> None:
        copytree(located, run, symlinks=True)
        end, logged = weights_of(run), read_log(run)
        go(run, steps=2, resume=True)
        assert ends_of(run)[0] == (4, end)
        assert read_log(run)[: len(logged)] == logged
        assert [step for step, _ in ends_of(run)] == [4, 6, 8]


class TestStart:
    def test_a_stage_starts_from_the_end_of_the_one_before(
        self, go: Go, tmp_path: Path, straight: Path, located: Path
    ) -> None:
        for source in (straight, located):
            before = files_of(source)
            go(tmp_path / source.name, stage="primary", start=str(source))
            assert files_of(source) == before
        # What `straight` has trained since then makes no difference.
        end = last_checkpoint(tmp_path / "straight")
        assert weights_of(tmp_path / "straight") == weights_of(tmp_path / "located")
        assert read_progress(end) == Progress(STEPS, "primary", 0, finished=True)
        first, second = (load_file(folder / "model.safetensors") for folder in (last_checkpoint(located), end))
        for name in first:
            assert torch.equal(second[name], first[name]) != name.startswith(("project_in.", "primary", "stage"))

    def test_such_a_run_resumes_exactly_and_by_itself(self, go: Go, tmp_path: Path, located: Path) -> None:
        run, start = tmp_path / "run", str(located)
        go(tmp_path / "straight", stage="primary", start=start)
        for stop in (1, 3):  # before the first checkpoint, and after it
            with stopped_at(stop):
                go(run, stage="primary", start=start)
        go(run, stage="primary")
        assert weights_of(run) == weights_of(tmp_path / "straight")
        go(run, stage="lrm")
        assert read_progress(last_checkpoint(run)) == Progress(2 * STEPS, "lrm", STEPS, finished=True)
        assert read_config(run)["start"] == start

    @pytest.mark.parametrize(
        ("stage", "start", "named"),
        [
            ("lrm", "located", "located .*primary.*--stage primary"),
            ("primary", "nowhere", "nowhere"),
            ("localization", "located", "--stage localization .*--from"),
        ],
    )
    def test_a_start_without_the_stage_before_is_refused(
        self, refuses: Callable[..., None], located: Path, stage: str, start: str, named: str
    ) -> None:
        refuses(named, stage=stage, start=str(located.with_name(start)))

    def test_a_start_of_another_model_is_refused(self, refuses: Callable[..., None], located: Path) -> None:
        changed = {"split_seed": 7, "model_options": {"fusion_heads": 1, "labels": "features"}}
        named = f"{located} .*split_seed 42 != 7.*fusion_heads 2 != 1; labels pixels != features.*--from"
        refuses(named, stage="primary", start=str(located), **changed)

    def test_a_start_on_another_store_is_refused(
        self, refuses: Callable[..., None], tmp_path: Path, located: Path
    ) -> None:
        other = copytree(located, tmp_path / "other", symlinks=True)
        text = (other / "identity.json").read_text()
        (other / "identity.json").write_text(text.replace('"image_size": 64', '"image_size": 96'))
        refuses(f"{other} .*image_size: 96 != 64", stage="primary", start=str(other))

    def test_an_option_that_a_stage_does_not_depend_on_may_change(self, go: Go, tmp_path: Path, located: Path) -> None:
        run = tmp_path / "run"
        go(run, stage="primary", start=str(located), model_options={"foreground": 1})
        assert read_config(run)["model_options"]["foreground"] == 1
        with pytest.raises(UserError, match="foreground 1 != 2"):
            go(tmp_path / "lrm", stage="lrm", start=str(run))

    def test_a_run_with_stages_of_its_own_starts_from_no_other(
        self, go: Go, run: Path, located: Path, straight: Path
    ) -> None:
        copytree(located, run, symlinks=True)
        before = files_of(run)
        for start, overwrite in ((straight, False), (run, True)):
            with pytest.raises(UserError, match=rf"{start}.*--from"):
                go(run, stage="primary", start=str(start), overwrite=overwrite)
            assert files_of(run) == before
        go(run.with_name("new"), stage="primary", start=str(straight))
        with pytest.raises(UserError, match=rf"{located}.*--from"):
            go(run.with_name("new"), stage="primary", start=str(located))


class TestRefusals:
    def test_a_stage_needs_a_finished_one_before(self, go: Go, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with stopped_at(7):
            go(run)
        files = files_of(run)
        with pytest.raises(UserError, match=f"{run} .*--stage primary.*--from"):
            go(run, stage="lrm", steps=9)
        assert files_of(run) == files
        with pytest.raises(UserError, match=f"{run} .*--stage primary"):
            go(tmp_path / "new", stage="lrm", start=str(run))
        assert not (tmp_path / "new").exists()

    def test_a_store_without_what_the_model_needs_is_refused_before_a_run_exists(
        self, go: Go, store_path: Path, lone_path: Path, run: Path
    ) -> None:
        with pytest.raises(UserError, match=r"wmcache derive change-maps .* --frameskip 5"):
            go(run, cache=store_path, stage="localization", steps=1)
        with pytest.raises(UserError, match="--model"):
            go(run, cache=lone_path, model_options={"labels": "features", "foreground": 1})
        assert not run.exists()
        by_features = {"labels": "features"}
        assert go(run, cache=store_path, stage="localization", steps=1, model_options=by_features)["changed"]

    def test_configured_options_are_saved(self, go: Go, run: Path) -> None:
        for _ in range(2):  # again, it finds a run with its own settings
            go(run, model_options={"foreground": 0}, stage="localization", steps=1)
        assert read_config(run)["model_options"]["foreground"] == 2
