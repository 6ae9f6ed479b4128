"""Models that predict where a frame changes: planned with by a gradient, masked costs, and a picture in the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, run_episodes
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import locate, write_report


@pytest.fixture(scope="module")
def ddp_context(ddp_run: Path, tiny_plan: PlanOptions) -> EvalContext:
    return EvalContext(ddp_run, tiny_plan)


def test_an_episode_does_not_depend_on_the_others(ddp_run: Path, tiny_plan: PlanOptions) -> None:
    descent = replace(tiny_plan, solver="gd", search={"steps": 3, "restarts": 2})
    for options in (tiny_plan, descent):
        context = EvalContext(ddp_run, options)
        together, alone = (run_episodes(context, options, numbers) for numbers in (range(3), [2]))
        np.testing.assert_allclose(together.states[2], alone.states[0], atol=1e-4)


def test_a_stage_too_early_for_planning_is_refused(run_until: Callable[[int], Path], tiny_plan: PlanOptions) -> None:
    with pytest.raises(UserError, match="--stage primary"):
        EvalContext(run_until(1), tiny_plan)


def test_only_the_report_of_such_a_model_has_the_picture(
    ddp_context: EvalContext, context: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    for loaded, shown in ((ddp_context, True), (context, False)):
        out = tmp_path / str(shown)
        episodes, results = evaluate(loaded, tiny_plan, out)
        write_report(out, loaded.run, loaded, episodes, results, "wmplan")
        assert (out / "figures" / "localization.png").exists() == shown
        assert ('alt="localization"' in (out / "report.html").read_text()) == shown


def test_changes_of_tokens_are_located_in_the_tokens(train_ddp: Callable[..., Path], tiny_plan: PlanOptions) -> None:
    # No token changes by so much.
    run = train_ddp(steps=1, labels="features", threshold=100.0, foreground=1)
    images, masks = locate(EvalContext(run, tiny_plan))
    assert len(images) == 1 + len(masks["changes"])
    assert not masks["changes"].any()
    assert (masks["computed"].sum(-1) == 1).all()


class TestMasks:
    def test_tokens_count_in_which_frames_differ(self, ddp_run: Path, tiny_plan: PlanOptions) -> None:
        context = EvalContext(ddp_run, replace(tiny_plan, mask=True))
        frames = np.zeros((2, 32, 32, 3), np.uint8)
        frames[1, 18:30, 2:14] = 255
        assert context.mask(frames[:1], frames[1:]).tolist() == [[False, False, True, False]]
        # At the goal all tokens count.
        assert context.mask(frames[:1], frames[:1]).all()

    def test_a_mask_changes_the_plan(self, ddp_run: Path, tiny_plan: PlanOptions) -> None:
        plans = [
            run_episodes(EvalContext(ddp_run, options), options, range(2)).states
            for options in (tiny_plan, replace(tiny_plan, mask=True))
        ]
        assert (plans[0] != plans[1]).any()
