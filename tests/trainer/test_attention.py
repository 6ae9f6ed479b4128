"""Attention without masks equals attention under a mask; rotary angles depend on distances of frames."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wmcache.trainer.models.attention import Block, attend, rotate

TOKENS, HEADS, HEAD_DIM = 3, 2, 4


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [1, 2, 3, 9])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (1, 3), (2, 5)])
def test_it_equals_attention_under_a_mask(queries: int, keys: int, window: int) -> None:
    q = random(2, HEADS, queries * TOKENS, HEAD_DIM, seed=1)
    k, v = random(2, 2, HEADS, keys * TOKENS, HEAD_DIM, seed=2)
    # The newest frames of the keys are the queries' own.
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    mask = ((j <= i) & (i - j < window)).repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, TOKENS, window), expected, rtol=0, atol=1e-6)


def test_rotary_attention_depends_on_distances_of_frames_alone() -> None:
    torch.manual_seed(0)
    block, x = Block(10, HEADS, HEAD_DIM, 12, 0.0, rotary=True).eval(), random(2, 4, TOKENS, 10)
    for first in (1, 7, 60):
        moved, _ = block(x, window=4, first=first)
        torch.testing.assert_close(moved, block(x, window=4)[0], rtol=0, atol=1e-5)
    q, k = random(1, 1, 1, HEAD_DIM, seed=1), random(1, 1, 1, HEAD_DIM, seed=2)
    near, far = ((rotate(q, frame, 1) * rotate(k, 0, 1)).sum() for frame in (1, 2))
    assert not torch.isclose(near, far)
    turned = rotate(random(1, 1, 1, HEAD_DIM).expand(1, 1, 2 * TOKENS, HEAD_DIM), 1, 2)[0, 0].unflatten(0, (2, TOKENS))
    assert torch.equal(turned, turned[:, :1].expand_as(turned))  # all tokens of a frame alike
