"""What the tests of importers share: the frames that are imported, a folder of images, and a way to run the command."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from wmcache.cli import main
from wmcache.pipeline.frames import FrameDataset, Frames
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.frames import FramesImporter

Import = Callable[..., Result]
Rows = list[dict[str, Any]]
LENGTHS = [5, 9, 6]
ROWS = sum(LENGTHS)


@pytest.fixture(scope="session")
def everything(dataset: FrameDataset) -> Frames:
    """All 360 frames of the shared dataset."""
    return dataset.read_frames(range(len(dataset.steps)))


@pytest.fixture
def run_import() -> Iterator[Import]:
    """Runs `wmcache import`; checks that a failure is one line and status 1."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(*words: object) -> Result:
        result = CliRunner().invoke(main, ["import", *map(str, words)])
        if result.exit_code:
            assert isinstance(result.exception, SystemExit), result.exception
            assert result.exit_code == 1, result.output
            assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
            assert result.stderr.splitlines()[-1].startswith("Error: ")
        return result

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_import_without() -> Callable[..., str]:
    """Runs `wmcache import` where a module is not installed; returns the one line with which it fails."""

    def run(module: str, *words: object) -> str:
        script = f"import sys; sys.modules['{module}'] = None; from wmcache.cli import main; main(sys.argv[1:])"
        program = [sys.executable, "-c", script, "import", *map(str, words)]
        failed = subprocess.run(program, capture_output=True, text=True, check=False)
        assert failed.returncode == 1
        assert failed.stderr.count("\n") == 1
        return failed.stderr

    return run


@dataclass
class Given:
    """A folder of images, and the rows of its table."""

    folder: Path
    rows: Rows
    frames: Frames
    action: np.ndarray
    state: np.ndarray

    def table(self, kind: str = "csv") -> Path:
        """Write the table."""
        path = self.folder.parent / f"steps.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(self.rows), path)
        else:
            with path.open("w", newline="") as file:
                columns = list(self.rows[0]) if self.rows else ["episode", "step", "file", "action_0", "state_0"]
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)
        return path

    def import_to(self, out: Path, kind: str = "csv", **options: Any) -> FrameDataset:
        """Write the table and import it."""
        return self.import_table(self.table(kind), out, **options)

    def import_table(self, table: Path, out: Path, **options: Any) -> FrameDataset:
        """Import a table that is written already."""
        write_dataset(FramesImporter(str(self.folder), actions=str(table), **options).open(), out, frames_per_shard=8)
        return FrameDataset.open(out)

    def as_videos(self, suffix: str = ".mkv", **settings: Any) -> None:
        """Replace the images by a video an episode, without loss where the codec has none."""
        settings = settings or {"codec": "ffv1", "pixelformat": "bgr0"}
        start = 0
        for episode, length in enumerate(LENGTHS):
            name = f"{episode}{suffix}"
            frames = self.frames[start : start + length]
            iio.imwrite(self.folder / name, frames, plugin="FFMPEG", fps=7, macro_block_size=1, **settings)
            for row in self.rows[start : start + length]:
                del row["file"]
                row["video"] = name
            start += length


@pytest.fixture
def given(everything: Frames, tmp_path: Path) -> Given:
    rng = np.random.default_rng(0)
    action, state = rng.normal(size=(ROWS, 3)).astype(np.float32), rng.normal(size=(ROWS, 2))
    rows: Rows = []
    for episode, length in enumerate(LENGTHS):
        for step in range(length):
            row, name = len(rows), f"run {episode}/{step}.png"
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(everything[row]).save(path)
            numbers = {f"action_{i}": float(value) for i, value in enumerate(action[row])}
            numbers |= {f"state_{i}": float(value) for i, value in enumerate(state[row])}
            rows.append({"episode": episode, "step": step, "file": name, **numbers})
    return Given(tmp_path / "images", rows, everything[:ROWS], action, state)
