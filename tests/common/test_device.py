"""Devices and precisions are chosen by name."""

from __future__ import annotations

import pytest
import torch

from wmcache.common.device import autocast, choose_device, choose_dtype, has_bfloat16
from wmcache.common.errors import UserError


def test_auto_is_a_device_that_works() -> None:
    assert torch.ones(2, device=choose_device("auto")).sum().item() == 2


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:x"])
def test_a_missing_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        choose_device(name)


def test_an_unknown_dtype_lists_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"float8.*auto, float32, bfloat16"):
        choose_dtype("float8", torch.device("cpu"))


def test_auto_dtype_is_bfloat16_only_where_that_is_fast() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == (torch.bfloat16 if has_bfloat16(cpu) else torch.float32)
    assert choose_dtype("float32", cpu) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_run_in_the_chosen_dtype(dtype: torch.dtype) -> None:
    with autocast(torch.device("cpu"), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
