"""The processes that train one run together, as torchrun or `--devices` starts them: which this one is, and what they exchange.

Rank 0 leads: it alone writes and prints. For a process alone nothing here costs anything.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wmcache.common.device import choose_device
from wmcache.common.errors import UserError, one_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Loss = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: rank 0 validates and saves alone."""
LEAVING = timedelta(seconds=20)
NETWORKS = ("gloo", "NCCL", "TCPStore", "Connection", "Broken pipe")
"""Of these speaks PyTorch where another rank has gone; its errors have no type of their own in all versions."""


class Spoken(Exception):  # noqa: N818 (no error of its own: its cause is, and another rank says it)
    """This rank ends by its cause, and another has already said why the run does."""


@dataclass(frozen=True)
class Ranks:
    """One of the processes that train together; as it is by default, a process alone.

    Attributes:
        rank: of this process, in [0, world). world: how many there are.
        local_rank, local_world: the same among those of this machine.
        parent: the process that started this one.
        store: where ranks leave each other notes, even when some of them are gone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    parent: int = 0
    store: Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether what started the ranks has died, so that nobody would ever end them."""
        return self.world > 1 and os.getppid() != self.parent

    def say(self, line: str) -> None:
        """Print a line, once for all."""
        if self.leads:
            tqdm.write(one_line(line))

    def device(self, name: str) -> torch.device:
        """The device of a name, of which each rank has one of its own, but for the CPU.

        Raises:
            UserError: there is none for this rank.
        """
        if self.world == 1:
            return choose_device(name)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name not in ("cpu", "cuda"):
            raise UserError(f"--device {name} is one device, for {self.world} processes; choose --device cuda or cpu")
        if name == "cuda" and self.local_world > (there := torch.cuda.device_count()):
            raise UserError(
                f"{self.local_world} processes want a CUDA device each, but this machine has {there}; start fewer, or choose --device cpu"
            )
        return choose_device(f"cuda:{self.local_rank}" if name == "cuda" else name)

    def share(self, model: nn.Module, loss: Loss) -> Loss:
        """The loss of a model, whose gradients are then those of all ranks' batches; all must come here, with the same parameters."""
        if self.world == 1:
            return loss
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(_Loss(model, loss))

    def seed(self, seed: int, step: int) -> None:
        """Give dropout and noise draws of their own at each rank and step; a process alone goes on with the generator that it has."""
        if self.world > 1:
            state = np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the ranks of scalars, equal on all of them."""
        return self.agree(values, 0)[0]

    def agree(self, values: dict[str, Tensor], number: int) -> tuple[dict[str, Tensor], int]:
        """Means over the ranks of scalars, and the largest of their numbers; equal on all of them."""
        if self.world == 1:
            return values, number
        import torch.distributed as dist

        mine = torch.stack([*(value.detach().float() for value in values.values())])
        mine = torch.cat([mine, mine.new_tensor([number])])
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        table = torch.stack(parts)
        return dict(zip(values, table[:, :-1].mean(0), strict=True)), int(table[:, -1].max())

    def wait(self) -> None:
        """Until all ranks are here."""
        self.heard(0)

    def heard(self, number: int) -> int:
        """The number that rank 0 has."""
        if self.world == 1:
            return number
        import torch.distributed as dist

        # The CPU's network, whatever trains: it notices when a rank dies.
        told = torch.tensor([int(number) if self.leads else 0])
        dist.all_reduce(told)
        return int(told)


ALONE = Ranks()


class _Loss(nn.Module):
    """A model's loss as DistributedDataParallel wants it: a module's `forward`. Buffers, which never change, are not sent around."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.trained, self._loss = nn.ParameterList(model.parameters()), loss

    def forward(self, batch: Mapping[str, Tensor], pool: int) -> dict[str, Tensor]:
        return self._loss(batch, pool)


def without_reduction(loss: Loss) -> AbstractContextManager[Any]:
    """Forwards and backwards in here leave gradients with the rank that they are of, until one outside reduces them all."""
    hold: Callable[[], AbstractContextManager[Any]] = getattr(loss, "no_sync", nullcontext)
    return hold()


def together() -> bool:
    """Whether torchrun or `--devices` has started this process, beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The ranks that torchrun has started, joined: NCCL between CUDA devices, gloo between CPUs. A process alone where it has not.

    The first rank that ends by an exception raises it. All others raise `Spoken`, so that people read one line.

    Args:
        device: as typed; which network is needed depends on it.

    Raises:
        UserError: there is no such device, the others do not come, or one of them dies.
        Spoken: another rank has said what has happened.
    """
    if not together():
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, world, local_rank, local_world = (int(os.environ[name]) for name in names)
    store: Store | None = None
    try:
        try:
            with _ended_by_signals():
                store = PrefixStore("wmtrain", next(rendezvous("env://"))[0])
                ranks = Ranks(rank, world, local_rank, local_world, os.getppid(), store)
                if (place := ranks.device(device)).type == "cuda":
                    torch.cuda.set_device(place)
                backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
            yield ranks
        except RuntimeError as error:
            if not any(network in str(error) for network in NETWORKS):
                raise
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"a process of this training has died, or cannot be reached ({reason}); "
                "run the same command again, it goes on from the last checkpoint"
            ) from error
        dist.destroy_process_group()
    except BaseException as error:
        # On the way out nobody is told to leave twice.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
        if store and not _is_first_to_speak(store, rank, stopped=isinstance(error, KeyboardInterrupt)):
            raise Spoken from error
        raise


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end this process at once: while it waits for the others in PyTorch, a handler in Python does not run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_first_to_speak(store: Store, rank: int, *, stopped: bool) -> bool:
    """Whether no other rank has; of those that are told to stop, rank 0 leaves first, for the end of any of them ends all."""
    try:
        if stopped and rank > 0:
            store.wait(["spoken"], LEAVING)
        first = bool(store.compare_set("speaker", "", str(rank)) == str(rank).encode())
        if first:
            store.set("spoken", "")
    except RuntimeError:  # its host has gone: better twice than never
        return True
    return first
