"""Checkpoints: weights that fit, and states of earlier versions. Exact resume is in test_loop.py, damage and kills in tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json, seal, write_json
from wmcache.engine.checkpoint import Progress, last_checkpoint, load_weights, read_progress, save_checkpoint


def save(run: Path, progress: Progress) -> Path:
    network = nn.Linear(3, 3)
    return save_checkpoint(run, progress, network, torch.optim.Adam(network.parameters()))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, Progress(1))
    with pytest.raises(UserError, match=f"{folder}"):
        load_weights(folder, nn.Linear(3, 4))


def test_a_state_from_before_stages_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, Progress(2, finished=True))
    state = read_json(folder / "state.json", "")
    write_json(folder / "state.json", seal({name: state[name] for name in ("step", "sha256")}))
    assert read_progress(last_checkpoint(tmp_path)) == Progress(2)
