"""Attention without masks equals attention under a mask; reused keys and values change nothing; rotary angles depend on distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wmcache.trainer.models.attention import Block, attend, rotate

TOKENS, HEADS, HEAD_DIM, WIDTH = 3, 2, 4, 10


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def make_block(*, conditioned: bool = False, rotary: bool = False) -> Block:
    torch.manual_seed(0)
    return Block(WIDTH, HEADS, HEAD_DIM, 12, 0.0, conditioned=conditioned, rotary=rotary).eval()


def mask_of(queries: int, keys: int, window: int) -> Tensor:
    """[queries * TOKENS, keys * TOKENS], True where a query may see; the newest frames of the keys are the queries' own."""
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    seen = (j <= i) & (i - j < window)
    return seen.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)


@pytest.mark.parametrize("window", [1, 2, 3, 9])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 3), (4, 4), (1, 3), (2, 5), (3, 4)])
def test_it_equals_attention_under_a_mask(queries: int, keys: int, window: int) -> None:
    q = random(2, HEADS, queries * TOKENS, HEAD_DIM, seed=1)
    k, v = random(2, 2, HEADS, keys * TOKENS, HEAD_DIM, seed=2)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(queries, keys, window))
    torch.testing.assert_close(attend(q, k, v, TOKENS, window), expected, rtol=0, atol=1e-6)


def test_rotary_attention_depends_on_distances_of_frames_alone() -> None:
    block, x = make_block(rotary=True), random(2, 4, TOKENS, WIDTH)
    for first in (1, 7, 60):
        moved, _ = block(x, window=4, first=first)
        torch.testing.assert_close(moved, block(x, window=4)[0], rtol=0, atol=1e-5)
    q, k = random(1, 1, 1, HEAD_DIM, seed=1), random(1, 1, 1, HEAD_DIM, seed=2)
    near, far = ((rotate(q, frame, 1) * rotate(k, 0, 1)).sum() for frame in (1, 2))
    assert not torch.isclose(near, far)


def test_a_rotation_keeps_norms_and_is_equal_for_all_tokens_of_a_frame() -> None:
    x = random(1, 1, 1, HEAD_DIM).expand(1, 1, 2 * TOKENS, HEAD_DIM)
    turned = rotate(x, 1, 2)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    first, second = turned[0, 0, :TOKENS], turned[0, 0, TOKENS:]
    assert torch.equal(first, first[:1].expand_as(first))
    assert torch.equal(second, second[:1].expand_as(second))
    assert not torch.isclose(first[0], second[0]).all()
