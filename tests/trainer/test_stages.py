"""Models that are trained in stages: each goes on from the one before, exactly, wherever and however often the run is stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from wmcache.cache import TokenStore
from wmcache.cache.windows import batch_windows
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json, seal, write_json
from wmcache.trainer import loop
from wmcache.trainer.checkpoint import (
    Progress,
    checkpoints,
    finished_stage,
    last_checkpoint,
    load_model,
    read_config,
    read_progress,
)
from wmcache.trainer.feed import Feed
from wmcache.trainer.localization import localization, settle
from wmcache.trainer.loop import data_shape, statistics_of, train
from wmcache.trainer.models import build, read_options
from wmcache.trainer.models.ddp_wm import DdpWm
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.stages import stages_of

CPU = torch.device("cpu")
STAGES = DdpWm.stages
STEPS = 4
PARTS = {
    "localization": ("embed_proprio.", "embed_action.", "fusion.", "localiser."),
    "primary": ("project_in.", "primary.", "primary_out."),
    "lrm": ("correction.", "correction_out."),
}


@pytest.fixture(scope="module")
def staged(tiny: TrainOptions) -> TrainOptions:
    """Three stages of four steps, with a checkpoint in the middle of each."""
    sizes = {"locator_width": 8, "locator_depth": 1, "locator_heads": 2, "locator_mlp": 8, "fusion_heads": 2}
    return replace(
        tiny,
        model="ddp-wm",
        model_options=tiny.model_options | sizes | {"correction_heads": 2, "foreground": 2},
        steps=STEPS,
        validate_every=STEPS,
        checkpoint_every=STEPS // 2,
    )


@pytest.fixture(scope="module")
def straight(ddp_store_path: Path, staged: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages at once; read only, so copy it to change it."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(ddp_store_path, run, staged)
    return run


@pytest.fixture(scope="module")
def located(ddp_store_path: Path, staged: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage alone; read only as well."""
    run = tmp_path_factory.mktemp("runs") / "located"
    train(ddp_store_path, run, replace(staged, stage="localization"))
    return run


def read_metrics(run: Path) -> list[dict[str, float]]:
    """What has been logged, but for how fast it was."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("windows_per_second", "waiting_share")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return tensors


def files_of(folder: Path) -> dict[str, bytes]:
    # TensorBoard opens a new file at every start.
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "tensorboard" not in file.parts
    }


def names_of(run: Path) -> list[str]:
    return [folder.name for folder in checkpoints(run)]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def train_and_stop_at(stop: int, cache: Path, out: Path, options: TrainOptions) -> None:
    """As test_loop's: dies at once when that step is logged, and so before it is saved."""

    class Stopped(loop.Log):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            super().write(step, values)
            if step == stop:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Log", Stopped)
        with pytest.raises(KeyboardInterrupt):
            train(cache, out, options)


def train_and_interrupt_at(stop: int, cache: Path, out: Path, options: TrainOptions) -> None:
    """By Ctrl-C while that step is logged, which is held back until a step is saved."""

    class Interrupted(loop.Log):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            super().write(step, values)
            if step == stop:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Log", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cache, out, options)


def assert_same(run: Path, other: Path) -> None:
    assert weights_of(last_checkpoint(run)) == weights_of(last_checkpoint(other))
    assert read_metrics(run) == read_metrics(other)
    for stage in STAGES:
        assert weights_of(finished_stage(run, stage)) == weights_of(finished_stage(other, stage))


class TestOneAfterAnother:
    def test_all_at_once_is_each_of_them_alone(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, straight: Path
    ) -> None:
        for stage in STAGES:
            train(ddp_store_path, tmp_path / "run", replace(staged, stage=stage))
        assert_same(tmp_path / "run", straight)
        steps = [line["step"] for line in read_metrics(straight) if "loss" in line]
        assert steps == list(range(1, 3 * STEPS + 1))

    def test_each_trains_its_own_parts_and_nothing_else(self, straight: Path) -> None:
        ends = [tensors_of(finished_stage(straight, stage)) for stage in STAGES]
        for stage, before, after in zip(STAGES[1:], ends, ends[1:], strict=False):
            moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
            assert moved == {name for name in after if name.startswith(PARTS[stage])} | {"stage"}

    def test_each_has_a_schedule_of_its_own(self, straight: Path) -> None:
        rates = [line["learning_rate"] for line in read_metrics(straight) if "loss" in line]
        assert rates[:STEPS] == rates[STEPS : 2 * STEPS] == rates[2 * STEPS :]
        assert rates[0] > rates[STEPS - 1]

    def test_the_first_says_how_well_it_locates_and_the_others_how_well_they_imagine(self, straight: Path) -> None:
        figures = {line["step"]: set(line) for line in read_metrics(straight) if "loss" not in line}
        assert list(figures) == [STEPS, 2 * STEPS, 3 * STEPS]
        assert figures[STEPS] > {"recall", "precision", "changed"}
        assert figures[2 * STEPS] == figures[3 * STEPS] == {"step", *(f"skill_{k}" for k in range(1, 6))}

    def test_the_end_of_each_stays(self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions) -> None:
        train(ddp_store_path, tmp_path / "run", replace(staged, checkpoint_every=1))
        # The ends of the first two, and the newest with the one before it.
        assert names_of(tmp_path / "run") == [step_name(step) for step in (4, 8, 11, 12)]
        for stage, step in zip(STAGES, (4, 8, 12), strict=True):
            folder = finished_stage(tmp_path / "run", stage)
            assert folder.name == step_name(step)
            assert read_progress(folder) == Progress(step, stage, step - STEPS, finished=True)
        assert read_progress(tmp_path / "run" / "checkpoints" / step_name(11)) == Progress(11, "lrm", 8)

    def test_a_finished_run_is_left_as_it_is(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, straight: Path
    ) -> None:
        run = copytree(straight, tmp_path / "run", symlinks=True)
        before = files_of(run)
        assert train(ddp_store_path, run, staged) == {}
        assert files_of(run) == before

    def test_the_model_of_a_run_imagines_with_all_that_it_has_learned(self, straight: Path) -> None:
        inputs = torch.rand(1, 1, 4, 32), torch.rand(1, 1, 4), torch.rand(1, 3, 10)
        model = load_model(straight, CPU)
        corrected = model.rollout(*inputs)[0]
        model.stage.fill_(2)
        assert not torch.isclose(model.rollout(*inputs)[0], corrected).all()

    @pytest.mark.parametrize("figure", ["loss", "gradient_norm"])
    def test_two_micro_batches_of_four_are_a_batch_of_eight(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, figure: str
    ) -> None:
        options = replace(staged, model_options=staged.model_options | {"dropout": 0.0}, steps=1, stage="localization")
        train(ddp_store_path, tmp_path / "whole", options)
        train(ddp_store_path, tmp_path / "halves", replace(options, batch=4, accumulate=2))
        whole, halves = (read_metrics(tmp_path / run)[0][figure] for run in ("whole", "halves"))
        assert halves == pytest.approx(whole, rel=1e-4)


class TestGoingOn:
    @pytest.mark.parametrize(
        ("stop", "left"),
        [
            (3, Progress(2, "localization", 0)),
            (5, Progress(4, "localization", 0, finished=True)),
            (7, Progress(6, "primary", 4)),
            (9, Progress(8, "primary", 4, finished=True)),
            (12, Progress(10, "lrm", 8)),
        ],
        ids=["in-the-first", "after-the-first", "in-the-second", "after-the-second", "at-the-end"],
    )
    def test_a_run_goes_on_exactly_wherever_it_has_died(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, straight: Path, stop: int, left: Progress
    ) -> None:
        train_and_stop_at(stop, ddp_store_path, tmp_path / "run", staged)
        assert read_progress(last_checkpoint(tmp_path / "run")) == left
        train(ddp_store_path, tmp_path / "run", staged)
        assert_same(tmp_path / "run", straight)

    @pytest.mark.parametrize(
        ("stop", "left"),
        [
            (STEPS, Progress(4, "localization", 0, finished=True)),
            (5, Progress(6, "primary", 4)),
        ],
        ids=["at-the-end-of-a-stage", "in-a-stage"],
    )
    def test_a_run_that_is_interrupted_ends_with_the_step_and_not_with_the_run(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, straight: Path, stop: int, left: Progress
    ) -> None:
        train_and_interrupt_at(stop, ddp_store_path, tmp_path / "run", staged)
        assert read_progress(last_checkpoint(tmp_path / "run")) == left
        train(ddp_store_path, tmp_path / "run", staged)
        assert_same(tmp_path / "run", straight)

    @pytest.mark.parametrize(
        "chosen",
        [
            {"labels": "features"},
            {"width": 0, "head_dim": 4, "proprio": "embedding", "predict": "frame", "standardise": False},
            {"proprio": "none", "foreground": 0},
        ],
        ids=["features", "reference", "no-proprio"],
    )
    def test_a_run_of_another_variant_goes_on_exactly(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, chosen: dict[str, Any]
    ) -> None:
        options = replace(staged, model_options=staged.model_options | chosen, steps=2, checkpoint_every=1)
        train(ddp_store_path, tmp_path / "straight", options)
        train_and_stop_at(4, ddp_store_path, tmp_path / "run", options)
        train(ddp_store_path, tmp_path / "run", options)
        assert_same(tmp_path / "run", tmp_path / "straight")

    def test_a_run_without_history_goes_on_exactly(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions
    ) -> None:
        # Nothing is ever asked of earlier frames then, so that has no gradient.
        options = replace(staged, history=1, steps=2, checkpoint_every=1)
        train(ddp_store_path, tmp_path / "straight", options)
        train_and_stop_at(2, ddp_store_path, tmp_path / "run", options)
        train(ddp_store_path, tmp_path / "run", options)
        assert_same(tmp_path / "run", tmp_path / "straight")

    def test_a_stage_may_have_other_steps_batches_and_another_rate_than_the_one_before(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions
    ) -> None:
        run = tmp_path / "run"
        train(ddp_store_path, run, replace(staged, stage="localization", steps=2))
        train(ddp_store_path, run, replace(staged, stage="primary", steps=3, batch=4, learning_rate=1e-3))
        train(ddp_store_path, run, replace(staged, stage="lrm", steps=1))
        assert [finished_stage(run, stage).name for stage in STAGES] == [step_name(step) for step in (2, 5, 6)]
        assert read_config(run)["steps"] == 1

    @pytest.mark.parametrize(
        "changed", [{"split_seed": 4}, {"seed": 1}, {"history": 2}], ids=lambda changed: next(iter(changed))
    )
    def test_but_no_other_settings(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, located: Path, changed: dict[str, int]
    ) -> None:
        run = copytree(located, tmp_path / "run", symlinks=True)
        before = files_of(run)
        with pytest.raises(UserError, match=next(iter(changed))):
            train(ddp_store_path, run, replace(staged, stage="primary", **changed))
        assert files_of(run) == before

    @pytest.mark.parametrize("stage", ["all", "lrm"])
    def test_where_no_other_stage_begins_other_steps_are_a_matter_of_resume(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, straight: Path, stage: str
    ) -> None:
        run = copytree(straight, tmp_path / "run", symlinks=True)
        before = files_of(run)
        more = replace(staged, stage=stage, steps=STEPS + 2)
        with pytest.raises(UserError, match=f"steps {STEPS} != {STEPS + 2}"):
            train(ddp_store_path, run, more)
        assert files_of(run) == before
        train(ddp_store_path, run, more, resume=True)
        assert read_progress(last_checkpoint(run)) == Progress(3 * STEPS + 2, "lrm", 2 * STEPS, finished=True)

    def test_fewer_steps_than_a_stage_has_had_cost_it_nothing(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, located: Path
    ) -> None:
        run, fewer = copytree(located, tmp_path / "run", symlinks=True), replace(staged, steps=2)
        end, logged = weights_of(finished_stage(run, "localization")), read_metrics(run)
        train(ddp_store_path, run, fewer, resume=True)
        assert weights_of(finished_stage(run, "localization")) == end
        assert read_metrics(run)[: len(logged)] == logged
        assert [finished_stage(run, stage).name for stage in STAGES] == [step_name(step) for step in (4, 6, 8)]

    def test_a_stage_that_is_not_finished_has_steps_to_come(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions
    ) -> None:
        run = tmp_path / "run"
        train_and_stop_at(7, ddp_store_path, run, staged)
        before = files_of(run)
        with pytest.raises(
            UserError, match=r"stage primary of .* has had 2 steps and is not finished; --steps must be more"
        ):
            train(ddp_store_path, run, replace(staged, steps=2), resume=True)
        assert files_of(run) == before

    def test_a_checkpoint_from_before_there_were_stages_is_that_of_a_model_without(
        self, store_path: Path, tmp_path: Path, tiny: TrainOptions
    ) -> None:
        run, options = tmp_path / "run", replace(tiny, steps=2, checkpoint_every=1)
        train(store_path, run, options)
        for folder in checkpoints(run):
            state = read_json(folder / "state.json", "")
            write_json(folder / "state.json", seal({name: state[name] for name in ("step", "sha256")}))
        assert read_progress(last_checkpoint(run)) == Progress(2)
        train(store_path, run, replace(options, steps=3), resume=True)
        assert names_of(run) == [step_name(2), step_name(3)]


class TestStartingFromAnotherRun:
    def test_a_stage_goes_on_from_the_end_of_the_one_before(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, straight: Path, located: Path
    ) -> None:
        runs = {"straight": straight, "located": located}
        for name, source in runs.items():
            before = files_of(source)
            train(ddp_store_path, tmp_path / name, replace(staged, stage="primary", start=str(source)))
            assert files_of(source) == before
        # Whatever that run has trained since then.
        ends = [last_checkpoint(tmp_path / name) for name in runs]
        assert weights_of(ends[0]) == weights_of(ends[1])
        assert read_progress(ends[0]) == Progress(STEPS, "primary", 0, finished=True)
        there, here = tensors_of(last_checkpoint(located)), tensors_of(ends[0])
        for name in there:
            assert torch.equal(here[name], there[name]) != name.startswith((*PARTS["primary"], "stage"))

    def test_such_a_run_goes_on_exactly_and_by_itself(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, located: Path
    ) -> None:
        options = replace(staged, stage="primary", start=str(located))
        train(ddp_store_path, tmp_path / "straight", options)
        train_and_stop_at(1, ddp_store_path, tmp_path / "run", options)  # so early that nothing is saved yet
        train_and_stop_at(3, ddp_store_path, tmp_path / "run", options)
        train(ddp_store_path, tmp_path / "run", replace(options, start=None))
        train(ddp_store_path, tmp_path / "run", replace(staged, stage="lrm"))
        ends = [finished_stage(tmp_path / name, "primary") for name in ("run", "straight")]
        assert weights_of(ends[0]) == weights_of(ends[1])
        assert read_progress(last_checkpoint(tmp_path / "run")) == Progress(2 * STEPS, "lrm", STEPS, finished=True)

    @pytest.mark.parametrize(
        ("stage", "start", "said"),
        [
            ("lrm", "located", "located has no finished stage primary; train it there with --stage primary"),
            ("primary", "nowhere", "nowhere"),
            ("localization", "located", "--stage localization goes on from no other run; leave out --from"),
            ("all", "located", "goes on from no other run; leave out --from"),
        ],
    )
    def test_what_cannot_be_started_from_is_refused_and_costs_nothing(
        self,
        ddp_store_path: Path,
        tmp_path: Path,
        staged: TrainOptions,
        located: Path,
        stage: str,
        start: str,
        said: str,
    ) -> None:
        options = replace(staged, stage=stage, start=str(located.with_name(start)))
        check_refusal(ddp_store_path, tmp_path, options, located, said)

    def test_a_run_on_another_store_is_not_started_from(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, located: Path
    ) -> None:
        other = copytree(located, tmp_path / "other", symlinks=True)
        text = (other / "identity.json").read_text()
        (other / "identity.json").write_text(text.replace('"image_size": 64', '"image_size": 96'))
        options = replace(staged, stage="primary", start=str(other))
        check_refusal(
            ddp_store_path, tmp_path, options, located, "other was trained on another store .image_size: 96 != 64"
        )

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            (
                {"model_options": {"fusion_heads": 1, "labels": "features"}},
                "fusion_heads 2 != 1; labels pixels != features",
            ),
            ({"model_options": {"standardise": False}}, "standardise True != False"),
            ({"split_seed": 7}, "split_seed 42 != 7"),
        ],
        ids=["options", "as-stored", "split"],
    )
    def test_a_run_of_another_model_is_not_started_from(
        self,
        ddp_store_path: Path,
        tmp_path: Path,
        staged: TrainOptions,
        located: Path,
        changed: dict[str, Any],
        said: str,
    ) -> None:
        changed = changed | {"model_options": staged.model_options | changed.get("model_options", {})}
        options = replace(staged, stage="primary", start=str(located), **changed)
        check_refusal(ddp_store_path, tmp_path, options, located, f"located is of another model .{said}.")

    def test_how_many_tokens_are_computed_is_no_matter_of_who_says_where(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, located: Path
    ) -> None:
        fewer = staged.model_options | {"foreground": 1}
        options = replace(staged, stage="primary", start=str(located), model_options=fewer)
        train(ddp_store_path, tmp_path / "run", options)
        assert load_model(tmp_path / "run", CPU).foreground == 1
        with pytest.raises(UserError, match="foreground 1 != 2"):
            train(ddp_store_path, tmp_path / "lrm", replace(staged, stage="lrm", start=str(tmp_path / "run")))

    def test_a_run_with_stages_of_its_own_does_not_go_on_from_another(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, located: Path, straight: Path
    ) -> None:
        run = copytree(located, tmp_path / "run", symlinks=True)
        before = files_of(run)
        options = replace(staged, stage="primary", start=str(straight))
        with pytest.raises(
            UserError, match=r"run has stages of its own, so it does not go on from .*straight; leave out"
        ):
            train(ddp_store_path, run, options)
        assert files_of(run) == before
        train(ddp_store_path, tmp_path / "new", options)
        train(ddp_store_path, tmp_path / "new", replace(options, start=None))
        assert read_config(tmp_path / "new")["start"] == str(straight)
        with pytest.raises(UserError, match=r"does not go on from .*located; leave out"):
            train(ddp_store_path, tmp_path / "new", replace(options, start=str(located)))

    def test_what_is_started_from_is_not_overwritten(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, located: Path
    ) -> None:
        run = copytree(located, tmp_path / "run", symlinks=True)
        before = files_of(run)
        with pytest.raises(UserError, match=r"--overwrite would delete .*run, which --from goes on from"):
            train(ddp_store_path, run, replace(staged, stage="primary", start=str(run)), overwrite=True)
        assert files_of(run) == before

    def test_a_run_that_is_still_in_that_stage_is_not_started_from(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions
    ) -> None:
        train_and_stop_at(3, ddp_store_path, tmp_path / "early", staged)
        with pytest.raises(UserError, match="early has no finished stage localization"):
            train(ddp_store_path, tmp_path / "run", replace(staged, stage="primary", start=str(tmp_path / "early")))


def check_refusal(cache: Path, folder: Path, options: TrainOptions, located: Path, said: str) -> None:
    """In one line, and no folder begins to be a run, nor does one that shall be written over cease to be."""
    with pytest.raises(UserError, match=said) as refusal:
        train(cache, folder / "new", options)
    assert "\n" not in str(refusal.value)
    assert not (folder / "new").exists()
    run = copytree(located, folder / "run", symlinks=True)
    before = files_of(run)
    with pytest.raises(UserError, match=said):
        train(cache, run, options, overwrite=True)
    assert files_of(run) == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("chosen", "said"),
        [
            ({"stage": "primary"}, "stage primary goes on from a finished localization"),
            ({"stage": "lrm"}, "stage lrm goes on from a finished primary"),
            ({"stage": "dreams"}, "no stage 'dreams'; known are localization, primary, lrm and all"),
            ({"pool": 2}, "leave out --pool"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_what_cannot_be_trained_costs_no_run(
        self,
        ddp_store_path: Path,
        tmp_path: Path,
        staged: TrainOptions,
        located: Path,
        chosen: dict[str, Any],
        said: str,
    ) -> None:
        check_refusal(ddp_store_path, tmp_path, replace(staged, **chosen), located, said)

    @pytest.mark.parametrize(("stage", "before"), [("primary", "localization"), ("lrm", "primary")])
    def test_a_stage_that_is_not_finished_is_no_ground_for_the_next(
        self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions, stage: str, before: str
    ) -> None:
        run, stop = tmp_path / "run", 3 if before == "localization" else 7
        train_and_stop_at(stop, ddp_store_path, run, staged)
        files = files_of(run)
        with pytest.raises(UserError, match=f"goes on from a finished {before}, which .* does not have") as refusal:
            train(ddp_store_path, run, replace(staged, stage=stage, steps=9))
        assert f"--stage {before}" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        # Of a run that is refused nothing may be changed: not what it says of itself either.
        assert files_of(run) == files

    def test_a_model_without_stages_knows_none(self, store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
        with pytest.raises(UserError, match=r"no stage 'primary'; .* in one go"):
            train(store_path, tmp_path / "run", replace(tiny, stage="primary"))
        with pytest.raises(UserError, match="leave out --from"):
            train(store_path, tmp_path / "run", replace(tiny, start=str(tmp_path / "other")))
        assert not (tmp_path / "run").exists()
        assert stages_of((), "all") == ("",)

    def test_labels_of_pixels_need_change_maps_and_those_of_features_none(
        self, store_path: Path, tmp_path: Path, staged: TrainOptions
    ) -> None:
        options = replace(staged, steps=1, stage="localization")
        with pytest.raises(UserError, match=r"make them with: wmcache derive change-maps .* --frameskip 5"):
            train(store_path, tmp_path / "run", options)
        assert not (tmp_path / "run").exists()
        by_features = replace(options, model_options=options.model_options | {"labels": "features"})
        assert train(store_path, tmp_path / "run", by_features)["changed"] > 0

    @pytest.mark.parametrize("labels", ["pixels", "features"])
    def test_a_store_of_one_token_is_refused_before_anyone_makes_change_maps_for_it(
        self, lone_path: Path, tmp_path: Path, staged: TrainOptions, labels: str
    ) -> None:
        with pytest.raises(UserError, match="this store has one; choose --model dino-wm"):
            train(lone_path, tmp_path / "run", replace(staged, model_options={"labels": labels}))
        assert not (tmp_path / "run").exists()


class TestData:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_batches_have_the_change_maps_of_their_frames(self, ddp_store_path: Path, rank: int) -> None:
        store = TokenStore.open(ddp_store_path)
        windows, changes = store.windows(3, 1, 5, "train"), store.changes(5)
        with Feed(store, windows, 8, 3, CPU, first=2, rank=rank, world_size=2, changes=changes) as feed:
            for step in (2, 3):
                chosen = batch_windows(len(windows), 3, step, 8, rank, 2)
                batch = feed.next()
                expected = np.stack([changes.gather(frames) for frames in windows.frames(chosen)])
                assert expected.shape == (4, 4, 4, 4)
                np.testing.assert_array_equal(batch["changes"].numpy(), expected)
                np.testing.assert_array_equal(batch["tokens"].numpy(), windows.batch(chosen)["tokens"])

    @pytest.mark.parametrize("labels", ["pixels", "features"])
    def test_what_is_left_open_is_taken_from_what_changes_in_the_steps_of_the_windows(
        self, ddp_store_path: Path, labels: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, choose, seen = TokenStore.open(ddp_store_path), DdpWm.settle, []

        def watched(options: Any, tokens: int, changed: NDArray[np.bool_]) -> Any:
            seen.append((tokens, changed))
            return choose(options, tokens, changed)

        monkeypatch.setattr(DdpWm, "settle", staticmethod(watched))
        windows = store.windows(3, 1, 5, "train")
        changes, chosen = settle(store, windows, "ddp-wm", read_options("ddp-wm", {"labels": labels}))
        frames = windows.frames(np.arange(len(windows)))
        if labels == "pixels":
            assert changes is not None
            expected = (changes.gather(frames[:, 1:].ravel()) > 0.1).any(-1)
        else:
            assert changes is None
            apart = np.diff(store.gather(frames.ravel()).reshape(*frames.shape, 4, 32) / store.std, axis=1)
            expected = (np.sqrt((apart**2).mean(-1)) > 0.5).reshape(-1, 4)
        ((tokens, changed),) = seen
        assert tokens == 4
        assert sorted(changed.tolist()) == sorted(expected.tolist())
        # Of 2 x 2 tokens at most two are computed, and one would not do.
        assert np.quantile(expected.sum(-1), 0.99) >= 2
        assert chosen.foreground == 2
        # A threshold that nothing comes near leaves the least.
        still = read_options("ddp-wm", {"labels": labels, "threshold": 100.0})
        assert settle(store, windows, "ddp-wm", still)[1].foreground == 1

    def test_a_channel_that_never_changes_hides_nothing(self, ddp_store_path: Path) -> None:
        store, by_features = TokenStore.open(ddp_store_path), read_options("ddp-wm", {"labels": "features"})
        expected = settle(store, store.windows(3, 1, 5, "train"), "ddp-wm", by_features)
        store.std[0] = 0
        gather = store.gather

        def still(*args: Any) -> NDArray[np.float16]:
            tokens = gather(*args)
            tokens[..., 0] = 0
            return tokens

        store.gather = still  # type: ignore[method-assign]
        assert settle(store, store.windows(3, 1, 5, "train"), "ddp-wm", by_features) == expected

    def test_a_model_that_leaves_nothing_open_stays_as_it_is_told(self, store: TokenStore) -> None:
        options = read_options("dino-wm", {"width": 12})
        assert settle(store, store.windows(3, 1, 5, "train"), "dino-wm", options) == (None, options)

    def test_what_was_settled_is_written_down(self, ddp_store_path: Path, tmp_path: Path, staged: TrainOptions) -> None:
        options = replace(staged, stage="localization", steps=1)
        options = replace(options, model_options=options.model_options | {"foreground": 0})
        for _ in range(2):  # run again, it finds a run with its own settings
            train(ddp_store_path, tmp_path / "run", options)
        assert read_config(tmp_path / "run")["model_options"]["foreground"] == 2
        assert load_model(tmp_path / "run", CPU).foreground == 2


class TestLocalization:
    """By models whose answers are known."""

    @staticmethod
    def figures_of(store: TokenStore, answers: Any, **chosen: Any) -> tuple[dict[str, float], Any]:
        """Of a model that locates by `answers`, in all windows of one observed frame and five that follow."""
        options = TrainOptions(model="ddp-wm", model_options={"foreground": 1, "width": 12, **chosen})
        model = build("ddp-wm", data_shape(store, options), options.model_options, statistics_of(store, 5))
        model.locate = answers
        windows = store.windows(1, 5, 5, "all")
        changes = store.changes(5) if model.options.labels == "pixels" else None
        return localization(model, windows, changes, CPU, torch.float32), windows

    def test_one_that_always_names_the_same_patches_is_right_as_often_as_they_change(
        self, ddp_store_path: Path
    ) -> None:
        store = TokenStore.open(ddp_store_path)

        def answers(tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
            logits = torch.full((len(tokens), tokens.shape[1] - 1, 4, 4), -1.0)
            logits[:, :, 1, 2], logits[:, :, 2, 0] = 1.0, 2.0
            return logits

        figures, windows = self.figures_of(store, answers)
        frames = windows.frames(np.arange(len(windows)))[:, 1:]
        # Each since the frame before it.
        changed = (store.changes(5).gather(frames.ravel()) > 0.1).any(-1)
        there = changed.sum()
        assert 0 < changed[:, 2].sum() < changed[:, [1, 2]].sum() < there
        assert figures == pytest.approx(
            {
                "recall": changed[:, 2].sum() / there,
                "precision": changed[:, 2].mean(),
                "recall_likely": changed[:, [1, 2]].sum() / there,
                "precision_likely": changed[:, [1, 2]].mean(),
                "changed": changed.mean(),
            }
        )

    @pytest.mark.parametrize("threshold", [0.5, 1.0])
    def test_one_that_knows_finds_all_of_them_but_for_what_k_leaves_out(
        self, store: TokenStore, threshold: float
    ) -> None:
        def answers(tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
            apart = tokens.float().diff(dim=1) / torch.from_numpy(store.std)
            return (apart.square().mean(-1).sqrt() - threshold)[..., None].expand(-1, -1, -1, 4)

        figures, windows = self.figures_of(store, answers, labels="features", threshold=threshold)
        apart = np.diff(windows.batch(np.arange(len(windows)))["tokens"].astype(np.float32) / store.std, axis=1)
        changed = np.sqrt((apart**2).mean(-1)) > threshold
        assert (figures["recall_likely"], figures["precision_likely"]) == (1, 1)
        assert figures["changed"] == pytest.approx(changed.mean())
        # One patch is computed in each step: the right one, wherever there is one.
        assert figures["recall"] == pytest.approx(changed.any(-1).sum() / changed.sum())
        assert figures["precision"] == pytest.approx(changed.any(-1).mean())

    def test_where_nothing_changes_there_is_nothing_to_find(self, store: TokenStore) -> None:
        def answers(tokens: Tensor, proprio: Tensor, action: Tensor) -> Tensor:
            return torch.full((len(tokens), tokens.shape[1] - 1, 4, 4), -1.0)

        figures, _ = self.figures_of(store, answers, labels="features", threshold=1e3)
        assert set(figures.values()) == {0.0}
