"""Devices and precisions: the only module that knows the names of devices."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from wmcache.common.errors import UserError, reason

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def is_cpu(device: torch.device) -> bool:
    """Return whether the device computes in main memory."""
    return device.type == CPU.type


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name, `auto` for CUDA, Apple's MPS or the CPU; raise UserError where it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device {name!r} is not available ({first}); choose --device auto or cpu") from error
    return device


def visible_gpus() -> list[str]:
    """Return the GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    count, names = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names else [str(number) for number in range(count)]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute precision of a name, `auto` for bfloat16 where the hardware has it; raise UserError for another name."""
    if name == "auto":
        name = "bfloat16" if has_bfloat16(device) else "float32"
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; known are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def release_memory(device: torch.device) -> None:
    """Return cached blocks to the device, so that a smaller batch may fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Transfer:
    """Copies from main memory to a device while it computes; work inside `with` is queued on another stream, and finished at the end."""

    def __init__(self, device: torch.device) -> None:
        """Create the stream, on CUDA."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._context: AbstractContextManager[None] = contextlib.nullcontext()

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a reusable buffer in main memory to send from; pinned where that makes copies faster."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def send(self, values: Tensor) -> Tensor:
        """Return a copy on the device."""
        return values.to(self._device, non_blocking=self._stream is not None)

    def hand_over(self, batch: Mapping[str, Tensor]) -> None:
        """Keep the memory of tensors made inside `with` until the caller's stream has used them."""
        if self._stream is not None:
            for value in batch.values():
                value.record_stream(torch.cuda.current_stream(self._device))

    def __enter__(self) -> None:
        """Switch to the stream for copies."""
        self._context = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        self._context.__enter__()

    def __exit__(self, *raised: object) -> None:
        """Wait for the copies and switch back."""
        if self._stream is not None:
            self._stream.synchronize()
        self._context.__exit__(None, None, None)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16 natively, so that it is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Kernels are those of ATEN_CPU_CAPABILITY, which may be less than the processor has.
    if is_cpu(device) and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Run matrix products in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@contextlib.contextmanager
def compile_errors() -> Iterator[None]:
    """Turn errors of torch.compile, which compiles in the first call, into one line."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (TorchDynamoException, OSError) as error:
        why = f"--compile does not work on this machine ({reason(error, 240)})"
        raise UserError(f"{why}; install a C++ compiler (g++, or the variable CXX), or leave it out") from error


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of matrix products of a tensor, see `autocast`."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def attends_plainly(x: Tensor) -> bool:
    """Return whether attention over these queries is faster as plain products than in PyTorch's kernel."""
    # The kernel's forward pass in bfloat16 on the CPU uses float32, and its backward pass is several times slower.
    return is_cpu(x.device) and x.dtype == torch.bfloat16
