"""Checkpoints: what is loaded is what was saved, damage is named, and the right ones stay. Kills are in tests/faults/test_kills.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json, seal, write_json
from wmcache.engine.checkpoint import (
    Progress,
    last_checkpoint,
    load_training_state,
    load_weights,
    read_progress,
    save_checkpoint,
)

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMISERS: dict[str, Make] = {
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


class Network(nn.Module):
    """Trained layers, a frozen one, and one that gets no gradient."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, width), nn.Linear(width, 1), nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.frozen(x)))


def step(network: Network, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    network(torch.rand(4, 3)).square().mean().backward()
    optimiser.step()


def save(run: Path, progress: Progress) -> Path:
    network = Network()
    return save_checkpoint(run, progress, network, OPTIMISERS["adam"](network.parameters()))


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_loaded_training_continues_exactly(tmp_path: Path, make: Make) -> None:
    networks, optimisers = [], []
    for _ in range(2):
        networks.append(Network())
        optimisers.append(make(parameter for parameter in networks[-1].parameters() if parameter.requires_grad))
    for _ in range(3):
        step(networks[0], optimisers[0])
    save_checkpoint(tmp_path, Progress(3), networks[0], optimisers[0])
    step(networks[0], optimisers[0])
    assert load_training_state(tmp_path, networks[1], optimisers[1]) == 3
    step(networks[1], optimisers[1])
    for name, value in networks[0].state_dict().items():
        assert torch.equal(networks[1].state_dict()[name], value), name


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, Progress(1))
    with pytest.raises(UserError, match=f"{folder}") as refused:
        load_weights(folder, Network(width=4))
    assert "\n" not in str(refused.value)


def test_a_state_from_before_stages_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, Progress(2, finished=True))
    state = read_json(folder / "state.json", "")
    write_json(folder / "state.json", seal({name: state[name] for name in ("step", "sha256")}))
    assert read_progress(last_checkpoint(tmp_path)) == Progress(2)
