"""The rows, the printed table and the page of a study."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from .conftest import run as run_command

Write = Callable[..., Path]


@contextmanager
def changed(out: Path, stage: str, label: str = "") -> Iterator[list[dict[str, Any]]]:
    """The results of a stage's cells, to be changed."""
    cells = {file: json.loads(file.read_text()) for file in (out / "cells").glob(f"{stage}-*.json")}
    yield [cell["result"] for cell in cells.values() if label in cell["label"]]
    for file, cell in cells.items():
        file.write_text(json.dumps(cell))


def success_of(out: Path) -> str:
    """The part of the page about success."""
    return (out / "study.html").read_text().partition("<h2>Success")[2].partition("<h2>Which differences")[0]


def test_there_is_a_row_for_each_encoder_seed_fraction_and_evaluation(study_path: Path) -> None:
    rows = pq.read_table(study_path / "study.parquet").to_pylist()
    known = [(row["encoder"], row["seed"], row["fraction"], row["protocol"]) for row in rows]
    wanted = [(e, s, f, "mpc-100") for e in ("tcn", "pixels") for s in (0, 1) for f in (0.5, 1.0)]
    assert sorted(known) == sorted(wanted)
    for row in rows:
        missing = {name for name, value in row.items() if value is None}
        # No fit of pixels; only extractions that wait for nothing are done together; frames of single places have a spread of 0; and a gap
        # needs one token.
        assert missing <= {"failed", "fit_seconds", "extracted_together", "probe_moves", "probe_mig"}, row["encoder"]
        assert row["episodes"] == 2
        assert 0 <= row["low_0.5"] <= row["successes_0.5"] / 2 <= row["high_0.5"] <= 1
        assert row["skill_1"] == pytest.approx(1 - row["error_1"] / row["copying_1"])
        assert not row["resumed"]
        assert 0 <= row["held"] <= row["successes"] <= 2
    for name in ("random_successes", "random_held", "zero_successes_0.1", "zero_held_0.5", "began_0.5"):
        assert len({row[name] for row in rows}) == 1  # the same episodes
    assert rows[0]["began_0.5"] == 0  # strict


def test_the_printed_table_fits_into_120_columns_and_names_all(study_path: Path) -> None:
    printed = (study_path.parent / "printed.txt").read_text()
    header, *table = printed.splitlines()[:5]
    assert max(map(len, (header, *table))) <= 120
    assert {line.split()[0] for line in table} == {"random", "zero", "tcn", "pixels"}
    counts = {line.split()[0]: re.findall(r"\d of (\d)", line) for line in table}
    # Reached and held: two episodes, of encoders for each of two seeds.
    assert counts == {"random": ["2"] * 2, "zero": ["2"] * 2, "tcn": ["4"] * 2, "pixels": ["4"] * 2}
    assert header.index("mpc-100") < header.index("held")
    assert "too few" in printed  # two episodes


def test_the_page_is_self_contained_and_names_every_encoder(study_path: Path) -> None:
    page = (study_path / "study.html").read_text()
    assert not re.search(r"https?://|<link|<script|src=\"(?!data:)|url\(", page)
    assert all(f"<td>{name}</td>" in page for name in ("tcn", "pixels"))
    assert page.count("data:image/png;base64,") == 3 + 2  # success, skill, fractions, and each encoder's probe


def test_the_page_shows_what_reaches_no_more_than_random_actions(
    write_study: Write, copy: Path, tmp_path: Path
) -> None:
    set_reached(copy, {"tcn": [1] * 50, "pixels": [1] * 19 + [0] * 31})
    with changed(copy, "plan") as results:
        for result in results:
            result["baselines"]["random"][0] |= {"successes": 31, "held": 7}
    result = run_command(write_study(tmp_path), copy)
    names = [line.split()[0] for line in result.stdout.splitlines()[1:5]]
    assert names == ["tcn", "random", "pixels", "zero"]
    rows = success_of(copy).split("<tr")[2:6]
    assert ["not above random" in " ".join(row.split()) for row in rows] == [False, False, True, False]
    assert all(count in rows[1] for count in ("random actions", "31 of 50", "7 of 50"))


def test_evaluations_of_earlier_versions_have_no_baselines_and_can_be_read(
    write_study: Write, copy: Path, tmp_path: Path
) -> None:
    with changed(copy, "plan") as results:
        for result in results:
            for name in ("baselines", "began_at_goal", "held", "held_rate", "held_ci95", "resolved"):
                del result[name]
    result = run_command(write_study(tmp_path), copy)
    assert "random" not in result.stdout
    assert "not above random" not in (copy / "study.html").read_text()


def set_reached(out: Path, reached: dict[str, list[int]]) -> None:
    """Make the evaluations of each encoder, whatever the seed, record that it reached the goals of these episodes."""
    for name, episodes in reached.items():
        with changed(out, "plan", f" {name}, seed") as results:
            for result in results:
                result["reached"] = dict.fromkeys(result["reached"], episodes)
                result["episodes"], result["successes"] = len(episodes), sum(episodes)
                for judged in result["by_threshold"]:
                    judged["successes"] = sum(episodes)


@pytest.mark.parametrize(
    ("tcn", "pixels", "marks"),
    [
        # The largest difference that there can be, on the most episodes that are too few for it.
        ([1] * 5, [0] * 5, []),
        ([1] * 6, [0] * 6, [("real", "12 of 12"), ("below", "0 of 12")]),
        ([1] * 20, [1] * 18 + [0] * 2, []),
    ],
)
def test_the_page_marks_real_differences_and_no_others(
    write_study: Write, copy: Path, tmp_path: Path, tcn: list[int], pixels: list[int], marks: list[tuple[str, str]]
) -> None:
    set_reached(copy, {"tcn": tcn, "pixels": pixels})
    result = run_command(write_study(tmp_path), copy, "--json")
    page = (copy / "study.html").read_text()
    assert re.findall(r'<td class="(real|below)">(?:↓ )?(\d+ of \d+)', success_of(copy)) == marks
    assert ("too few" in page) is (len(tcn) < 6)
    assert ('class="real"' in page) is bool(marks)
    found = json.loads(result.stdout)["mpc-100"]
    assert (found["episodes_needed"], found["pairs"][0]["real"]) == (6, bool(marks))
    assert (found["best"], found["below"]) == (("tcn", ["pixels"]) if marks else (None, []))


def test_a_skill_that_is_not_defined_leaves_the_rest(write_study: Write, copy: Path, tmp_path: Path) -> None:
    with changed(copy, "train") as results:
        for result in results:
            result |= {name: [None] * 5 for name in ("skill", "error", "copying")}
    result = run_command(write_study(tmp_path), copy, "--json")
    rows = json.loads(result.stdout)["rows"]
    assert {row["skill_1"] for row in rows} == {None}
    assert all(row["successes"] is not None for row in rows)
