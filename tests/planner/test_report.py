"""The report: complete, readable by other tools, and in one file."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree
from typing import Any

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from wmcache import __version__
from wmcache.bench.compare import draw_landscapes
from wmcache.commands.output import shell_command
from wmcache.common.errors import UserError
from wmcache.planner.context import EvalContext
from wmcache.planner.episodes import Episodes, env_steps
from wmcache.planner.evaluate import evaluate
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import draw_distance_map, draw_paths, draw_success, draw_training, write_report

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


def test_pictures_name_their_signs_axes_and_colours(
    plan: Plan, context: EvalContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_paths(plan[1], context.maze, 0.5)
    (legend,) = drawn[0].legends
    assert {text.get_text() for text in legend.get_texts()} == {"path", "start", "goal", "within 0.5"}
    (circle, *_) = drawn[0].axes[0].patches
    assert isinstance(circle, Circle)
    assert circle.radius == 0.5
    np.testing.assert_array_equal(circle.center, plan[1].goal[0, :2])
    draw_landscapes({"one": np.random.default_rng(0).random((1, 5, 5)), "flat": np.zeros((1, 5, 5))})
    first, second, bar = drawn[1].axes
    assert all((first.get_xlabel(), first.get_ylabel(), second.get_xlabel(), bar.get_ylabel(), drawn[1].legends))


class Page(HTMLParser):
    """The tags, links and table cells of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


class TestPage:
    def test_it_needs_no_other_file(self, html: str) -> None:
        page = Page(html)
        # Four pictures and a video for each of the three episodes.
        assert len(page.links) == 7
        assert all(link.startswith(("data:image/png;base64,", "data:video/mp4;base64,")) for link in page.links)
        assert {"script", "link", "iframe"}.isdisjoint(page.tags)
        assert "url(" not in html
        assert "@import" not in html

    def test_the_command_is_escaped(self, html: str) -> None:
        assert "<b>runs" not in html
        assert "&lt;b&gt;runs&lt;/b&gt;" in html
        assert shell_command(["/usr/bin/wmplan", "--run", "my runs/a"]) == "wmplan --run 'my runs/a'"

    def test_heading_and_table_have_the_counts_of_each_threshold_and_policy(self, plan: Plan, html: str) -> None:
        assert f"<h1>{plan[2]['successes']} of 3 goals reached, {plan[2]['held']} held</h1>" in html
        header, *rows = Page(html).rows
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
        self, run_path: Path, blind_run_path: Path, tiny_plan: PlanOptions, tmp_path: Path, html: str
    ) -> None:
        other = replace(tiny_plan, episodes=1, goals="random-action", strict=False, distance="graph")
        other = replace(other, device="auto", dtype="auto", solver="gd", search={"steps": 3, "restarts": 2, "lr": 0.1})
        pages = [html, page_of(run_path, other, tmp_path / "other", "dino-wm")]
        pages.append(page_of(blind_run_path, replace(tiny_plan, episodes=1), tmp_path / "blind"))
        for part, shown in {
            "olver cem, 16 ": [True, False, True],
            "olver gd, 8 ": [False, True, False],
            "dino-wm": [False, True, False],
            "--no-strict": [False, True, False],
            "along the cached": [False, True, False],
            "and proprioception": [True, True, False],
        }.items():
            assert [part in page for page in pages] == shown, part
        settings = pages[1][pages[1].rindex("<pre>") : pages[1].rindex("</pre>")]
        assert "None" not in settings
        assert "auto" not in settings.replace("proprio = auto", "")
        for line in ("context = 1", "observed = 1", "goal_steps = 10", "env = ", "dtype = ", "device = "):
            assert line in settings
        made = json.loads((tmp_path / "other" / "results.json").read_text())["made"]
        assert made["date"] in pages[1]
        assert made["machine"].split(",")[0] in pages[1]


def page_of(run: Path, options: PlanOptions, out: Path, protocol: str | None = None) -> str:
    context = EvalContext(run, options)
    episodes, results = evaluate(context, options, out)
    write_report(out, run, context, episodes, {"protocol": protocol, **results}, "wmplan")
    return " ".join((out / "report.html").read_text().split())


def pixels(picture: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(imageio.imread(picture))


class TestFigures:
    def test_a_run_without_metrics_has_an_empty_panel(
        self, run_path: Path, context: EvalContext, plan: Plan, tmp_path: Path
    ) -> None:
        run = copytree(run_path, tmp_path / "imported", symlinks=True)
        (run / "metrics.jsonl").write_text("")
        write_report(tmp_path / "plan", run, context, plan[1], plan[2], "wmplan")
        empty, full = (pixels((out / "figures/training.png").read_bytes()) for out in (tmp_path / "plan", plan[0]))
        assert empty.shape == full.shape
        assert (empty < 250).sum() < (full < 250).sum()

    @pytest.mark.parametrize("undefined", ["null", "NaN"])  # as it is written, and as earlier versions wrote it
    def test_losses_are_drawn_without_a_defined_skill(self, run_path: Path, tmp_path: Path, undefined: str) -> None:
        pictures = []
        for skill in ("", f'{{"step": 1, "skill_1": {undefined}}}\n'):
            (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n' + skill)
            pictures.append(pixels(draw_training(tmp_path)))
        assert not np.array_equal(*pictures)  # the reason is another
        assert not np.array_equal(pictures[0], pixels(draw_training(run_path)))

    @pytest.mark.parametrize("content", [None, "{"])
    def test_unreadable_metrics_are_refused(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            draw_training(tmp_path)

    def test_the_graphs_map_differs_from_the_latent_one(
        self, context: EvalContext, run_path: Path, tiny_plan: PlanOptions
    ) -> None:
        graph = EvalContext(run_path, replace(tiny_plan, distance="graph")).graph
        latent, along = (pixels(draw_distance_map(context.store, given)) for given in (None, graph))
        assert latent.shape == along.shape
        # On the left are other colours; on the right only labels of another width move things.
        half = latent.shape[1] // 2
        different = (latent != along).any(2).mean(0)
        assert different[:half].sum() > 2 * different[half:].sum()

    def test_an_arrival_at_the_end_of_the_budget_is_visible(self) -> None:
        goal = np.array([[1.0, 1.0, 0.0, 0.0]])
        far = np.full((1, 10, 4), 3.0)
        arrived = far.copy()
        arrived[0, -1] = goal[0]
        pictures = [
            pixels(draw_success(Episodes(far[:, 0], goal, states, 10, 0, 0, 0.0))).astype(int)
            for states in (far, arrived)
        ]
        assert np.ptp(np.flatnonzero((pictures[0] != pictures[1]).any((0, 2)))) > 5

    def test_a_video_shows_the_start_and_every_env_step(self, plan: Plan) -> None:
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
