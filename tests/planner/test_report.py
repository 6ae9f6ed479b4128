"""What a person looks at: complete, readable by other tools, and in one file."""

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
from wmcache.planner.episodes import Episodes
from wmcache.planner.evaluate import evaluate
from wmcache.planner.judge import env_steps
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import draw_distance_map, draw_paths, draw_success, draw_training, write_report

Plan = tuple[Path, Episodes, dict[str, Any]]


@pytest.fixture(scope="module")
def plan(
    setting: EvalContext, run_path: Path, tiny_plan: PlanOptions, tmp_path_factory: pytest.TempPathFactory
) -> Plan:
    out = tmp_path_factory.mktemp("reports") / "plan"
    episodes, results = evaluate(setting, tiny_plan, out)
    write_report(out, run_path, setting, episodes, results, "wmplan --run '<b>runs</b>'")
    return out, episodes, results


def test_the_results_say_all_that_was_asked_for(plan: Plan, tiny_plan: PlanOptions) -> None:
    results = json.loads((plan[0] / "results.json").read_text())
    made = results.pop("made")
    assert results == json.loads(json.dumps(plan[2]))
    assert made["wmcache"] == __version__
    assert abs(
        datetime.now(UTC) - datetime.strptime(made["date"], "%Y-%m-%d %H:%M UTC").replace(tzinfo=UTC)
    ) < timedelta(1)
    assert f"torch {torch.__version__}" in made["machine"]
    assert {"held", "held_rate", "held_ci95", "began_at_goal"} <= results.keys()
    assert results["episodes"] == 3
    assert results["threshold"] == 0.5
    assert results["budget_env_steps"] == 12
    assert results["success_rate"] == results["successes"] / 3
    low, high = results["ci95"]
    assert 0 <= low <= results["success_rate"] <= high <= 1
    assert 5 <= results["mean_env_steps"] <= 12
    assert results["replans"] == 9
    assert results["encoder_frames"] == 12
    assert results["seconds_per_replan"] > 0
    assert results["candidates_per_replan"] == 8 * 2
    assert [row["threshold"] for row in results["by_threshold"]] == [0.5, 0.25, 0.1]
    for row in results["by_threshold"]:
        low, high = row["held_ci95"]
        assert 0 <= low <= row["held_rate"] == row["held"] / 3 <= high <= 1
        assert 0 <= row["spl"] <= row["success_rate"]
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
    plan: Plan, setting: EvalContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_paths(plan[1], setting.maze, 0.5)
    (legend,) = drawn[0].legends
    assert {text.get_text() for text in legend.get_texts()} == {"path", "start", "goal", "within 0.5"}
    (circle, *_) = drawn[0].axes[0].patches
    assert isinstance(circle, Circle)
    assert circle.radius == 0.5
    np.testing.assert_array_equal(circle.center, plan[1].goal[0, :2])
    draw_landscapes({"one": np.random.default_rng(0).random((1, 5, 5)), "flat": np.zeros((1, 5, 5))})
    first, second, bar = drawn[1].axes
    assert all((first.get_xlabel(), first.get_ylabel(), second.get_xlabel(), bar.get_ylabel(), drawn[1].legends))


class Cells(HTMLParser):
    """The cells of the page's table, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
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


def test_the_table_says_who_held_and_how_direct_the_ways_were(plan: Plan) -> None:
    cells = Cells()
    cells.feed((plan[0] / "report.html").read_text())
    header, *rows = cells.rows
    assert header == ["within", "actions", "reached", "held at the end", "env steps", "path / shortest", "SPL"]
    actors = {"planner": plan[2]["by_threshold"], **plan[2]["baselines"]}
    expected = [
        (name, row) for judged in zip(*actors.values(), strict=True) for name, row in zip(actors, judged, strict=True)
    ]
    assert [name for name, _ in expected] == ["planner", "random", "zero"] * 3
    for cell, (name, row) in zip(rows, expected, strict=True):
        ratio = "-" if row["path_ratio"] is None else f"{row['path_ratio']:.2f}"
        assert cell[:2] == [str(row["threshold"]) if name == "planner" else "", name]
        for shown, count, interval in ((cell[2], "successes", "ci95"), (cell[3], "held", "held_ci95")):
            assert shown == "{} of 3{:.3f} to {:.3f}".format(row[count], *row[interval])
        assert cell[5:] == [ratio, f"{row['spl']:.3f}"]


def page_of(run: Path, options: PlanOptions, out: Path, protocol: str | None = None) -> str:
    setting = EvalContext(run, options)
    episodes, results = evaluate(setting, options, out)
    write_report(out, run, setting, episodes, {"protocol": protocol, **results}, "wmplan")
    return " ".join((out / "report.html").read_text().split())


class TestWhatPlanned:
    def test_the_page_names_protocol_solver_and_candidates(
        self, run_path: Path, tiny_plan: PlanOptions, tmp_path: Path
    ) -> None:
        options = replace(tiny_plan, episodes=1, solver="gd", search={"steps": 3, "restarts": 2})
        html = page_of(run_path, options, tmp_path, "dino-wm")
        assert "Protocol dino-wm; solver gd, 8 candidates a replan" in html
        assert "squared distance of their tcn tokens" in html
        assert "camera frames and proprioception" in html

    def test_without_a_protocol_none_is_named(self, plan: Plan) -> None:
        html = (plan[0] / "report.html").read_text()
        assert "Solver cem, 16 candidates a replan" in html
        assert "Protocol" not in html

    def test_the_distance_is_the_one_that_was_descended(
        self, run_path: Path, tiny_plan: PlanOptions, plan: Plan, tmp_path: Path
    ) -> None:
        options = replace(tiny_plan, episodes=1, distance="graph")
        assert "along ways that the episodes took" in page_of(run_path, options, tmp_path)
        picture = (tmp_path / "figures" / "distance.png").read_bytes()
        assert picture != (plan[0] / "figures" / "distance.png").read_bytes()

    def test_a_model_without_proprio_saw_camera_frames(
        self, blind_run_path: Path, tiny_plan: PlanOptions, tmp_path: Path
    ) -> None:
        html = page_of(blind_run_path, replace(tiny_plan, episodes=1), tmp_path)
        assert "The planner saw camera frames. Success" in html


def drawn(picture: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(imageio.imread(picture))


class TestDrawings:
    def test_a_run_without_metrics_has_an_empty_panel(
        self, run_path: Path, setting: EvalContext, tiny_plan: PlanOptions, plan: Plan, tmp_path: Path
    ) -> None:
        run = copytree(run_path, tmp_path / "imported", symlinks=True)
        (run / "metrics.jsonl").write_text("")
        write_report(tmp_path / "plan", run, setting, plan[1], plan[2], "wmplan")
        empty = drawn((tmp_path / "plan" / "figures" / "training.png").read_bytes())
        full = drawn((plan[0] / "figures" / "training.png").read_bytes())
        assert empty.shape == full.shape
        assert (empty < 250).sum() < (full < 250).sum()

    def test_a_run_that_was_not_validated_yet_shows_its_loss(self, run_path: Path, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
        assert not np.array_equal(drawn(draw_training(tmp_path)), drawn(draw_training(run_path)))

    @pytest.mark.parametrize("skill", ["null", "NaN"])  # as it is written, and as earlier versions wrote it
    def test_a_skill_that_is_not_defined_is_no_fault(self, run_path: Path, tmp_path: Path, skill: str) -> None:
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 0.5}}\n{{"step": 1, "skill_1": {skill}}}\n')
        picture = drawn(draw_training(tmp_path))
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        assert not np.array_equal(picture, drawn(draw_training(tmp_path)))  # which says something else of the skill

    @pytest.mark.parametrize("content", [None, "{"])
    def test_metrics_that_cannot_be_read_are_refused(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
            draw_training(tmp_path)

    def test_the_graphs_map_is_another_than_the_latent_one(
        self, setting: EvalContext, run_path: Path, tiny_plan: PlanOptions
    ) -> None:
        graph = EvalContext(run_path, replace(tiny_plan, distance="graph")).graph
        latent, along = (drawn(draw_distance_map(setting.store, given)) for given in (None, graph))
        assert latent.shape == along.shape
        # Nearly the same on the right, where only labels of another width move things; other colours on the left.
        half = latent.shape[1] // 2
        different = (latent != along).any(2).mean(0)
        assert different[:half].sum() > 2 * different[half:].sum()

    def test_who_arrives_at_the_very_end_of_the_budget_is_seen(self) -> None:
        goal = np.array([[1.0, 1.0, 0.0, 0.0]])
        far = np.full((1, 10, 4), 3.0)
        arrived = far.copy()
        arrived[0, -1] = goal[0]
        pictures = [
            drawn(draw_success(Episodes(far[:, 0], goal, states, 10, 0, 0, 0.0))).astype(int)
            for states in (far, arrived)
        ]
        columns = np.flatnonzero((pictures[0] != pictures[1]).any((0, 2)))
        assert np.ptp(columns) > 5


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset", "data")]


def test_the_page_needs_no_other_file(plan: Plan) -> None:
    html = (plan[0] / "report.html").read_text()
    links = Links()
    links.feed(html)
    # Four pictures and a video for each of the three episodes.
    assert len(links.found) == 7
    assert all(link.startswith(("data:image/png;base64,", "data:video/mp4;base64,")) for link in links.found)
    assert "url(" not in html
    assert "@import" not in html
    assert {"script", "link", "iframe"}.isdisjoint(links.tags)


def test_a_table_scrolls_where_the_screen_is_narrow(plan: Plan) -> None:
    html = (plan[0] / "report.html").read_text()
    assert html.count("<table") == html.count('<div class="scroll"><table') > 0
    assert ".scroll { overflow-x: auto; }" in html


def test_the_page_shows_what_was_typed_and_does_not_obey_it(plan: Plan) -> None:
    html = (plan[0] / "report.html").read_text()
    assert "<b>runs" not in html
    assert "&lt;b&gt;runs&lt;/b&gt;" in html


def test_the_page_says_how_many_goals_were_reached(plan: Plan) -> None:
    assert f"{plan[2]['successes']} of 3 goals reached" in (plan[0] / "report.html").read_text()


def test_the_page_says_how_many_were_held_and_began_at_the_goal(plan: Plan) -> None:
    html = " ".join((plan[0] / "report.html").read_text().split())
    assert f"<h1>{plan[2]['successes']} of 3 goals reached, {plan[2]['held']} held</h1>" in html
    assert "began at the goal: 0 within 0.5, 0 within 0.25, 0 within 0.1" in html


def test_the_page_shows_the_settings_as_they_were_used(run_path: Path, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    options = replace(tiny_plan, episodes=1, device="auto", dtype="auto", goals="random-action", strict=False)
    html = page_of(run_path, options, tmp_path)
    settings = html[html.rindex("<pre>") : html.rindex("</pre>")]
    assert "None" not in settings
    assert "auto" not in settings.replace("proprio = auto", "")
    for line in ("context = 1", "observed = 1", "goal_steps = 10", "env = ", "dtype = ", "device = "):
        assert line in settings
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["made"]["date"] in html
    assert written["made"]["machine"].split(",")[0] in html


def test_the_page_says_how_starts_and_goals_were_drawn(
    run_path: Path, tiny_plan: PlanOptions, tmp_path: Path, plan: Plan
) -> None:
    assert "--no-strict" not in (plan[0] / "report.html").read_text()
    assert "--no-strict" in page_of(run_path, replace(tiny_plan, episodes=1, strict=False), tmp_path)


def test_a_video_shows_the_start_and_every_env_step(plan: Plan) -> None:
    videos = sorted((plan[0] / "videos").iterdir())
    assert [video.name for video in videos] == [f"episode-{i:03d}.mp4" for i in range(3)]
    for video in videos:
        # Not imageio.mimread: it leaves its pipes to the garbage collector, which warns.
        decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", video, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        pixels = subprocess.run(decode, capture_output=True, check=True).stdout
        frames = np.frombuffer(pixels, np.uint8).reshape(-1, 224, 464, 3)
        assert len(frames) == 12 + 1
        # The live view and, right of a gap, the goal: neither may be black.
        assert frames[0][:, :224].std() > 5
        assert frames[0][:, 240:].std() > 5


def test_nothing_unfinished_is_left_behind(plan: Plan) -> None:
    names = {file.name for file in plan[0].iterdir()}
    assert names == {"results.json", "episodes.parquet", "report.html", "figures", "videos"}
    assert not [file for file in plan[0].rglob("*") if file.name.startswith(".")]


def test_the_command_can_be_typed_again() -> None:
    words = ["/usr/bin/wmplan", "--run", "my runs/a"]
    assert shell_command(words) == "wmplan --run 'my runs/a'"
