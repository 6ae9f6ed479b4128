"""The report: complete, readable by other tools, and in one file."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from wmcache import __version__
from wmcache.commands.output import shell_command
from wmcache.common.errors import UserError
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes
from wmcache.planner.evaluate import evaluate
from wmcache.planner.judge import env_steps
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import draw_training, write_report

Plan = tuple[Path, Episodes, dict[str, Any]]


@pytest.fixture(scope="module")
def plan(
    context: EvalContext, run_path: Path, tiny_plan: PlanOptions, tmp_path_factory: pytest.TempPathFactory
) -> Plan:
    out = tmp_path_factory.mktemp("reports") / "plan"
    episodes, results = evaluate(context, tiny_plan, out)
    write_report(out, run_path, context, episodes, results, "wmplan --run '<b>runs</b>'")
    return out, episodes, results


@pytest.fixture(scope="module")
def html(plan: Plan) -> str:
    return " ".join((plan[0] / "report.html").read_text().split())


def test_the_results_are_complete_and_consistent(plan: Plan, tiny_plan: PlanOptions) -> None:
    names = {file.name for file in plan[0].iterdir()}
    assert names == {"results.json", "episodes.parquet", "report.html", "figures", "videos"}  # nothing unfinished
    results = json.loads((plan[0] / "results.json").read_text())
    made = results.pop("made")
    assert results == json.loads(json.dumps(plan[2]))
    assert made["wmcache"] == __version__
    date = datetime.strptime(made["date"], "%Y-%m-%d %H:%M UTC").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - date) < timedelta(1)
    assert f"torch {torch.__version__}" in made["machine"]
    known = {"episodes": 3, "threshold": 0.5, "budget_env_steps": 12, "replans": 9, "encoder_frames": 12}
    assert {name: results[name] for name in known} == known
    assert results["candidates_per_replan"] == 8 * 2
    assert results["seconds_per_replan"] > 0
    assert 5 <= results["mean_env_steps"] <= 12
    assert [row["threshold"] for row in results["by_threshold"]] == [0.5, 0.25, 0.1]
    for row in [results, *results["by_threshold"]]:
        for rate, count, interval in (("success_rate", "successes", "ci95"), ("held_rate", "held", "held_ci95")):
            low, high = row[interval]
            assert 0 <= low <= row[rate] == row[count] / 3 <= high <= 1
    assert all(0 <= row["spl"] <= row["success_rate"] for row in results["by_threshold"])
    assert results["options"] == json.loads(json.dumps(asdict(tiny_plan)))


def test_the_episodes_can_be_read_by_other_tools(plan: Plan) -> None:
    episodes, rows = plan[1], pq.read_table(plan[0] / "episodes.parquet").to_pydict()
    assert rows["episode"] == [0, 1, 2]
    for name in ("start", "goal", "states"):
        np.testing.assert_array_equal(np.array(rows[name]), getattr(episodes, name))
    for threshold in (0.5, 0.25, 0.1):
        reached = (episodes.distances() < threshold).any(1)
        expected = np.where(reached, env_steps(episodes, threshold), -1)
        assert rows[f"env_steps_{threshold}"] == expected.tolist()


def test_the_evaluations_own_threshold_and_numbers_of_episodes_are_reported(
    context: EvalContext, run_path: Path, tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    options = replace(tiny_plan, threshold=3.0, strict=False, seed=100, episodes=2)
    episodes, results = evaluate(context, options, tmp_path / "plan")
    write_report(tmp_path / "plan", run_path, context, episodes, results, "wmplan")
    rows = pq.read_table(tmp_path / "plan/episodes.parquet").to_pydict()
    assert rows["episode"] == [100, 101]
    assert [name for name in rows if name.startswith("env_steps_")] == [
        f"env_steps_{at}" for at in (3.0, 0.5, 0.25, 0.1)
    ]
    assert {file.name for file in (tmp_path / "plan/videos").iterdir()} == {"episode-100.mp4", "episode-101.mp4"}
    assert (tmp_path / "plan/report.html").read_text().count("within 3.0 after") == results["successes"] > 0


class TestPage:
    def test_it_needs_no_other_file(self, html: str) -> None:
        # Four pictures and a video for each of the three episodes.
        links = re.findall(r'(?:src|href|poster|srcset|data)="([^"]*)"', html)
        assert len(links) == 7
        assert all(link.startswith(("data:image/png;base64,", "data:video/mp4;base64,")) for link in links)
        assert not re.search(r"<(?:script|link|iframe)|url\(|@import|https?://", html)

    def test_the_command_is_escaped(self, html: str) -> None:
        assert "<b>runs" not in html
        assert "&lt;b&gt;runs&lt;/b&gt;" in html
        assert shell_command(["/usr/bin/wmplan", "--run", "my runs/a"]) == "wmplan --run 'my runs/a'"

    def test_heading_and_table_have_the_counts_of_each_threshold_and_policy(self, plan: Plan, html: str) -> None:
        assert f"<h1>{plan[2]['successes']} of 3 goals reached, {plan[2]['held']} held</h1>" in html
        cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in html.split("<tr")[1:]]
        header, *rows = [[re.sub("<[^>]+>", "", cell) for cell in row] for row in cells]
        assert len(header) == 7
        actors = {"planner": plan[2]["by_threshold"], **plan[2]["baselines"]}
        expected = [item for rows in zip(*actors.values(), strict=True) for item in zip(actors, rows, strict=True)]
        assert [name for name, _ in expected] == ["planner", "random", "zero"] * 3
        for cell, (name, row) in zip(rows, expected, strict=True):
            ratio = "-" if row["path_ratio"] is None else f"{row['path_ratio']:.2f}"
            assert cell[:2] == [str(row["threshold"]) if name == "planner" else "", name]
            for shown, count, interval in ((cell[2], "successes", "ci95"), (cell[3], "held", "held_ci95")):
                assert shown == "{} of 3{:.3f} to {:.3f}".format(row[count], *row[interval])
            assert cell[5:] == [ratio, f"{row['spl']:.3f}"]
        assert html.count("<table") == html.count('<div class="scroll"><table') > 0  # narrow screens scroll

    def test_it_names_what_planned_and_the_options_as_they_were_used(
        self, blind_run_path: Path, tiny_plan: PlanOptions, tmp_path: Path, html: str
    ) -> None:
        other = replace(tiny_plan, episodes=1, goals="random-action", strict=False, distance="graph")
        other = replace(other, device="auto", dtype="auto", solver="gd", search={"steps": 3, "restarts": 2, "lr": 0.1})
        context = EvalContext(blind_run_path, other)
        episodes, results = evaluate(context, other, tmp_path)
        write_report(tmp_path, blind_run_path, context, episodes, {"protocol": "dino-wm", **results}, "wmplan")
        page = " ".join((tmp_path / "report.html").read_text().split())
        for own, others in (("olver cem, 16 ", "olver gd, 8 "), ("and proprioception", "along the cached")):
            assert (own in html, own in page, others in html, others in page) == (True, False, False, True)
        settings = page[page.rindex("<pre>") : page.rindex("</pre>")]
        assert "None" not in settings
        assert "auto" not in settings.replace("proprio = auto", "")
        for line in ("context = ", "observed = ", "goal_steps = 10", "env = ", "dtype = ", "device = "):
            assert line in settings
        made = json.loads((tmp_path / "results.json").read_text())["made"]
        for shown in ("dino-wm", "--no-strict", made["date"], made["machine"].split(",")[0]):
            assert shown in page


@pytest.mark.parametrize("undefined", ["null", "NaN"])  # as it is written, and as earlier versions wrote it
def test_losses_are_drawn_without_a_defined_skill_and_unreadable_metrics_refused(
    tmp_path: Path, undefined: str
) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(f'{{"step": 1, "loss": 2.0}}\n{{"step": 1, "skill_1": {undefined}}}\n')
    assert imageio.imread(draw_training(tmp_path)).std() > 10
    log.write_text("{")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        draw_training(tmp_path)


def test_a_video_shows_the_start_and_every_env_step(plan: Plan) -> None:
    videos = sorted((plan[0] / "videos").iterdir())
    assert [video.name for video in videos] == [f"episode-{i:03d}.mp4" for i in range(3)]
    for video in videos:
        # imageio.mimread leaves its pipes to the garbage collector, which warns.
        decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", video, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        raw = subprocess.run(decode, capture_output=True, check=True).stdout
        frames = np.frombuffer(raw, np.uint8).reshape(-1, 224, 464, 3)
        assert len(frames) == 12 + 1
        # The live view and, right of a gap, the goal are not black.
        assert min(frames[0][:, :224].std(), frames[0][:, 240:].std()) > 5
