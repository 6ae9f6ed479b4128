"""What a person looks at: complete, readable by other tools, and in one file."""

from __future__ import annotations

import json
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pyarrow.parquet as pq
import pytest
from wmcache.commands.shared import shell_command
from wmcache.planner.evaluate import Episodes, PlanOptions, Setting, env_steps, evaluate
from wmcache.planner.report import write_report

Plan = tuple[Path, Episodes, dict[str, Any]]


@pytest.fixture(scope="module")
def plan(setting: Setting, run_path: Path, tiny_plan: PlanOptions, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    out = tmp_path_factory.mktemp("reports") / "plan"
    episodes, results = evaluate(setting, tiny_plan, out)
    write_report(out, run_path, setting, episodes, results, "wmplan --run '<b>runs</b>'")
    return out, episodes, results


def test_the_results_say_all_that_was_asked_for(plan: Plan, tiny_plan: PlanOptions) -> None:
    results = json.loads((plan[0] / "results.json").read_text())
    assert results == json.loads(json.dumps(plan[2]))
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
    assert [row["threshold"] for row in results["by_threshold"]] == [0.5, 0.25, 0.1]


def test_the_episodes_can_be_read_by_other_tools(plan: Plan) -> None:
    episodes, rows = plan[1], pq.read_table(plan[0] / "episodes.parquet").to_pydict()
    assert rows["episode"] == [0, 1, 2]
    for name in ("start", "goal", "states"):
        np.testing.assert_array_equal(np.array(rows[name]), getattr(episodes, name))
    for threshold in (0.5, 0.25, 0.1):
        reached = (episodes.distances() < threshold).any(1)
        expected = np.where(reached, env_steps(episodes, threshold), -1)
        assert rows[f"env_steps_{threshold}"] == expected.tolist()


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


def test_the_page_shows_what_was_typed_and_does_not_obey_it(plan: Plan) -> None:
    html = (plan[0] / "report.html").read_text()
    assert "<b>runs" not in html
    assert "&lt;b&gt;runs&lt;/b&gt;" in html


def test_the_page_says_how_many_goals_were_reached(plan: Plan) -> None:
    assert f"{plan[2]['successes']} of 3 goals reached" in (plan[0] / "report.html").read_text()


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
