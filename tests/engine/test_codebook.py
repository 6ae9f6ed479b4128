"""A codebook follows the tokens: by moving means, not by gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from wmcache.engine.codebook import Codebook


def test_entries_find_the_clusters_of_the_tokens_while_training_alone() -> None:
    torch.manual_seed(0)
    clusters, codebook = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), Codebook(8, 2, 0.9)
    for _ in range(100):
        codebook(clusters[torch.randint(3, (16, 4))] + 0.05 * torch.randn(16, 4, 2))
    before = codebook.entries.clone()
    rounded, distance = codebook.eval()(clusters[None])
    torch.testing.assert_close(rounded[0], clusters, atol=0.1, rtol=0)
    assert distance < 0.01
    assert torch.equal(codebook.entries, before)


def test_an_entry_moves_by_a_moving_average_and_not_by_a_gradient() -> None:
    codebook = Codebook(1, 2, 0.99)
    codebook.entries.copy_(torch.tensor([[1.0, 0.0]]))
    codebook.count.fill_(2.0)
    codebook.total.copy_(torch.tensor([[2.0, 0.0]]))
    tokens = torch.tensor([[[3.0, 1.0], [5.0, 3.0]]])
    codebook(tokens)
    expected = (0.99 * torch.tensor([2.0, 0.0]) + 0.01 * tokens[0].sum(0)) / (0.99 * 2 + 0.01 * 2)
    torch.testing.assert_close(codebook.entries[0], expected)
    assert not list(codebook.parameters())


def test_an_entry_without_near_tokens_restarts() -> None:
    torch.manual_seed(0)
    codebook = Codebook(2, 2, 0.5)
    codebook.entries.copy_(torch.tensor([[0.0, 0.0], [100.0, 100.0]]))
    codebook.count.copy_(torch.tensor([4.0, 4.0]))
    codebook.total.copy_(4 * codebook.entries)
    for _ in range(20):
        codebook(torch.randn(4, 2, 2))
    assert codebook.entries.abs().max() < 10


RANK = """
import sys, torch, torch.distributed as dist
from wmcache.engine.codebook import Codebook
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
torch.manual_seed(rank)
codebook, tokens = Codebook(6, 3, 0.9), torch.load(f"{folder}/tokens.pt")[:, 4 * rank : 4 * rank + 4]
codebook(tokens[0])
torch.save(codebook.state_dict(), f"{folder}/first-{rank}.pt")
codebook(tokens[1])
torch.save(codebook.state_dict(), f"{folder}/second-{rank}.pt")
dist.destroy_process_group()
"""


def test_ranks_have_the_entries_of_one_process(tmp_path: Path) -> None:
    tokens = torch.randn(2, 8, 5, 3, generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    ranks = [subprocess.Popen([sys.executable, "-P", "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    first, second = ([torch.load(tmp_path / f"{step}-{rank}.pt") for rank in range(2)] for step in ("first", "second"))
    # The first entries are tokens of rank 0; from there on nothing is drawn.
    codebook = Codebook(6, 3, 0.9)
    codebook.load_state_dict(first[0])
    codebook(tokens[1])
    for rank in range(2):
        torch.testing.assert_close(first[rank], first[0], rtol=0, atol=0)
        torch.testing.assert_close(second[rank], dict(codebook.state_dict()))
    assert first[0]["entries"].any(1).all()
